"""Rows that name their own reward."""

import time

import pytest

from dgrpo.longblocks import rewards
from dgrpo.longblocks.rewards import by_row


def test_each_row_has_its_own_reward_and_parts():
    found = by_row(
        ["", "", ""],
        ["Answer: a", "Answer: b, c", "n 7"],
        reward=["dgrpo.rewards:exact_match", "item_f1", "dgrpo.rewards:final_number"],
        answer=["a", None, "7"],
        items=[None, ["c", "b"], None],
    )
    assert found == {"reward": [1, 1, 1], "precision": [None, 1, None], "recall": [None, 1, None]}


@pytest.mark.parametrize(
    "path",
    ["os:system", "dgrpo.rewards.runner:score", "by_row", "_function", None, "dgrpo.rewards:os"],
)
def test_data_cannot_name_other_code(path):
    with pytest.raises(ValueError, match="reward: got a row with"):
        by_row([""], ["x"], reward=[path])


def test_other_functions_have_to_be_allowed():
    path = "tests.longblocks.rewards.test_by_row:always"
    assert by_row([""], ["x"], reward=[path], allow=[path]) == {"reward": [0.25]}


def always(prompts, completions, **columns):
    return [0.25] * len(completions)


N = 30_000
LONG = {
    "newlines": "x\n" + "\n" * N + "x",
    "spaces": "x" + " " * N + "x",
    "tabs and stars": "\t*" * N,
    "answers": "Answer:" + " " * N + "\nanswer " * N,
    "quotations": 'Quote: "a' * N + "\n" + 'Quote: "a\n' * N,
    "blocks": "<RETRIEVAL>" * N,
    "labels": "[P1]\n" * N,
    "open tags": "<think>" * N,
    "rules": "|" + " -" * N + "x",
    "headings": "# " * N,
    "digits": "1,000" * N,
    "boxes": "\\boxed{" * N,
    "sentences": "a. " * N,
}
COLUMNS = {
    "answer": ["1"],
    "items": [["1"]],
    "passage_ids": [["P1"]],
    "passages": [["text"]],
    "answerable": [True],
    "points": [["a"]],
    "document": ["a b " * N],
    "completion_tokens": [N],
}


@pytest.mark.parametrize("text", LONG)
def test_no_text_takes_a_reward_long(text):
    """Patterns that backtrack would take minutes on these."""
    columns = {name: [values[0]] for name, values in COLUMNS.items()}
    for name in sorted(set(rewards.__all__) - {"by_row", "judge"}):
        options = {"length": {"max_tokens": 9}, "format_regex": {"pattern": "a+"}}.get(name, {})
        for form in ("bullets", "table", "sections", "") if name == "coverage" else ("",):
            start = time.process_time()
            getattr(rewards, name)([""], [LONG[text]], **columns, form=[form], **options)
            assert time.process_time() - start < 1, (name, form)


def text_alone(prompts, completions, **columns):
    return "x" * len(completions)


def test_a_rows_reward_that_returns_text_is_named():
    path = f"{__name__}:text_alone"
    with pytest.raises(ValueError, match=f"reward '{path}': got the text 'x', expected a list of"):
        by_row(["p"], ["c"], reward=[path], allow=[path])
