"""Where a row's prompt and target come from, and what is said of a row that has none."""

import re

import pytest

from dgrpo.data import PromptStream, Source, render_row
from dgrpo.longblocks.tasks import train_tokenizer
from dgrpo.text import BadRow
from dgrpo.trainer.config import Data

ASK = {"role": "user", "content": "u"}
SAY = {"role": "assistant", "content": "t"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
TOOL = {"role": "tool", "content": "42"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [ASK], "completion": [SAY]}, ([ASK], "t")),
        ({"prompt": [SYSTEM, ASK], "completion": [SAY]}, ([SYSTEM, ASK], "t")),
        ({"prompt": [ASK, SAY, ASK], "completion": [SAY]}, ([ASK, SAY, ASK], "t")),
        ({"prompt": [ASK], "completion": [CALL, TOOL, SAY]}, ([ASK, CALL, TOOL], "t")),
        ({"prompt": [ASK, SAY], "completion": [SAY]}, ([ASK, SAY], "t")),
        ({"prompt": "p", "completion": [SAY]}, ("p", "t")),
        ({"prompt": [ASK], "completion": "t"}, ([ASK], "t")),
        ({"messages": [SYSTEM, ASK, CALL, TOOL, SAY]}, ([SYSTEM, ASK, CALL, TOOL], "t")),
        ({"prompt": [ASK], "completion": [CALL]}, ([ASK], None)),  # its text is not all it says
        ({"messages": [ASK, CALL]}, ([ASK], None)),
        ({"messages": [ASK, CALL, TOOL]}, ([ASK, CALL, TOOL], None)),
        ({"prompt": None, "document": "d", "question": "q"}, ("d\n\nq", None)),
    ],
)
def test_conversations(row, expected):
    assert render_row(row, Source()) == expected


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": None}, {}, "row: prompt is null"),
        ({"prompt": ""}, {}, "row: prompt is empty"),
        ({"messages": []}, {}, "row: messages is empty"),
        ({"messages": None, "prompt": None}, {}, "row: messages is null"),
        ({"text": "t"}, {}, "row: missing column (messages or prompt, or document of template"),
        ({"document": "d"}, {}, "row: missing column (messages or prompt, or question of template"),
        ({"p": None}, {"prompt": "p"}, "row: p is null"),
        ({"p": ""}, {"prompt": "p"}, "row: p is empty"),
        ({"prompt": "p"}, {"prompt": "q"}, "row: missing column (q)"),
        ({"prompt": 3}, {}, "row: a prompt that is neither text nor messages (int)"),
        ({"prompt": [ASK], "completion": [ASK]}, {}, "row: a completion that does not end with"),
        ({"prompt": [ASK], "completion": [SAY, TOOL]}, {}, "row: a completion that does not end"),
        ({"prompt": [ASK], "completion": ["t"]}, {}, "row: a completion that does not end with"),
        ({"prompt": "p", "completion": [CALL, TOOL, SAY]}, {}, "row: a text as the prompt of seve"),
        ({"prompt": "p", "completion": {"a": 1}}, {}, "row: a target that is not text (dict)"),
    ],
)
def test_a_row_without_prompt_or_target_says_why(row, options, message):
    with pytest.raises(BadRow, match="^" + re.escape(message)):
        render_row(row, Source(**options))


def test_conversational_rows_become_prompt_and_target():
    tokenizer = train_tokenizer(300, 0)
    tokenizer.chat_template = (
        "{% for m in messages %}<|pad|>{{ m.role }}:{{ m.content }}{% endfor %}<|pad|>assistant:"
    )
    row = {"prompt": [SYSTEM, ASK], "completion": [SAY]}
    stream = PromptStream(Data(sources=[Source(rows=[row])]), tokenizer, require_completion=True)
    (prompt,) = stream.batch(1)
    assert tokenizer.decode(prompt.ids) == "<|pad|>system:s<|pad|>user:u<|pad|>assistant:"
    assert tokenizer.decode(prompt.completion_ids) == "t<|end|>"
