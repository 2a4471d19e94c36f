"""Tasks in the manner of RULER, and those of data make as an evaluation."""

import email

import numpy as np
import pytest

from dgrpo.data.rows import load_rows
from dgrpo.longblocks.evaluation import RULER_TASKS, evaluate, made, ruler
from dgrpo.longblocks.tasks import train_tokenizer
from dgrpo.longblocks.tasks.catalog import MakeSettings
from dgrpo.longblocks.tasks.make import make
from dgrpo.text import count_tokens

HAYSTACK = email.__path__[0]
LENGTHS = (2048, 6000)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(1024, 0)


@pytest.fixture(scope="module")
def rows(tokenizer):
    return list(ruler(tokenizer, lengths=LENGTHS, count=4, haystack=HAYSTACK))


def test_every_task_at_every_length(rows):
    assert len(rows) == 4 * len(RULER_TASKS) * len(LENGTHS)
    assert len({row["id"] for row in rows}) == len(rows)


def test_lengths_are_met(rows, tokenizer):
    for row in rows:
        real = count_tokens(tokenizer, f"{row['document']}\n\n{row['question']}")
        assert 0.85 * row["length"] < real <= row["length"], row["id"]


def test_references_solve_all_and_wrong_answers_none(rows):
    answers = iter([row["response_reference"] for row in rows])
    right = evaluate(lambda prompts, n: [next(answers) for _ in prompts], rows)
    assert all(item.score == 1.0 for item in right.items) and len(right.items) == len(rows)
    for pick in (
        lambda row: "Answer: " + ", ".join(row["distractors"][:4]),
        lambda row: "",
        lambda row: row["document"],
        lambda row: "Answer: " + ", ".join([*(row["items"] or row["aliases"]), "Other"]),
    ):
        answers = iter([pick(row) for row in rows])
        wrong = evaluate(lambda prompts, n, a=answers: [next(a) for _ in prompts], rows)
        assert all(item.score < 1.0 for item in wrong.items)


def test_needles_stand_in_the_document(rows):
    for row in rows:
        for line in row["evidence"].split("\n"):
            assert line in row["document"]
        if row["task"] in ("multi_value", "multi_query"):
            assert len(row["items"]) == len(row["depths"]) == 4


def test_word_lists_have_the_counts_that_they_ask_for(rows):
    for row in rows:
        if row["task"].endswith("_words"):
            words = [word for word in row["document"].split() if not word.endswith(".")]
            names, counts = np.unique(words, return_counts=True)
            top = names[np.argsort(-counts)][: len(row["items"])]
            assert set(top) == set(row["items"])


def test_single_needles_go_through_all_depths(tokenizer):
    some = ruler(tokenizer, ["single_needle"], (4096,), 20, haystack=HAYSTACK)
    depths = [row["depths"][0] for row in some]
    for i, depth in enumerate(depths):
        assert i % 10 / 10 - 0.03 <= depth <= (i % 10 + 1) / 10 + 0.03


def test_rows_depend_on_seed_and_number_alone(tokenizer):
    def make(count, seed):
        return list(ruler(tokenizer, ["multi_key"], (2048,), count, seed, HAYSTACK))

    assert make(2, 0) == make(3, 0)[:2] and make(1, 0) != make(1, 1)


def test_wrong_arguments(tokenizer):
    with pytest.raises(ValueError, match="tasks: got .'haystack'"):
        ruler(tokenizer, ["haystack"])
    with pytest.raises(ValueError, match="lengths: got"):
        ruler(tokenizer, lengths=(100,))


class Oracle:
    """Stands in for a model: its completions are all the same."""

    tokenizer = "bytes"

    def __call__(self, prompts, max_tokens):
        return ["Answer: nothing"] * len(prompts)


def test_tasks_of_data_make_by_length_and_count():
    rows = list(made("bytes", ["relations", "definition"], (1000, 1500), 2, seed=3))
    found = sorted((row["task"], row["length"]) for row in rows)
    assert found == sorted((t, n) for t in ("relations", "definition") for n in (1000, 1500) * 2)
    assert rows == list(made("bytes", ["relations", "definition"], (1000, 1500), 2, seed=3))
    right = {row["question"]: row["response_reference"] for row in rows}
    results = evaluate(
        lambda prompts, n: [next(r for q, r in right.items() if q in p) for p in prompts], rows
    )
    assert [item.score for item in results.items] == [1.0] * 8
    assert results.lengths == [1000, 1500]


def test_rows_are_those_of_the_test_split(tmp_path):
    tasks = ("relations", "quoting")
    folder = str(tmp_path / "rows")
    make(
        MakeSettings(folder, tasks, 4, (4000,), split="test", seed=1),
        log=lambda line: None,
        show=False,
    )
    rows = list(made("bytes", tasks, (4000,), 2, seed=1))
    assert [row["document"] for row in rows] == [row["document"] for row in load_rows(folder)]


def test_wrong_arguments_of_made():
    with pytest.raises(ValueError, match=r"tasks: got \['single_needle'\], expected all or var"):
        made("bytes", ["single_needle"], (1000,), 2)
    with pytest.raises(ValueError, match="tokens: got"):
        made("bytes", [], (10,), 2)
