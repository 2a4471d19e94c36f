"""Reading data: rows of files or of the hub, rendered to prompts, as a stream that resumes."""

from dgrpo.extras import require

require(__name__, "numpy", "datasets")

from dgrpo.data.books import Books, no_document
from dgrpo.data.prompts import PromptStream
from dgrpo.data.render import Prompt, Source, render_row
from dgrpo.data.row_stream import RowStream
from dgrpo.data.rows import load_rows

__all__ = [
    "Books",
    "Prompt",
    "PromptStream",
    "RowStream",
    "Source",
    "load_rows",
    "no_document",
    "render_row",
]
