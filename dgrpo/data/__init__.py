"""Long-context data: prompts for training, the LongBlocks dataset, and tasks made here."""

from dgrpo.longblocks.dataset import load_longblocks
from dgrpo.text.problems import BadRow, Report
from dgrpo.data.prompts import PromptStream
from dgrpo.data.render import Prompt, Source, render_row
from dgrpo.data.rows import load_rows
from dgrpo.text.encode import count_tokens, encode_chat, encode_text
from dgrpo.longblocks.tasks.tokenizers import train_tokenizer

__all__ = [
    "BadRow",
    "Prompt",
    "PromptStream",
    "Report",
    "Source",
    "count_tokens",
    "encode_chat",
    "encode_text",
    "load_longblocks",
    "load_rows",
    "render_row",
    "train_tokenizer",
]
