"""The tasks of data make as an evaluation."""

import pytest

from dgrpo.data.rows import load_rows
from dgrpo.longblocks.evaluation import evaluate
from dgrpo.longblocks.evaluation.made import made
from dgrpo.longblocks.tasks.catalog import MakeSettings
from dgrpo.longblocks.tasks.make import make


class Oracle:
    """Stands in for a model: its completions are all the same."""

    tokenizer = "bytes"

    def __call__(self, prompts, max_tokens):
        return ["Answer: nothing"] * len(prompts)


def test_tasks_by_length_and_count():
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


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"tasks: got \['single_needle'\], expected all or var"):
        made("bytes", ["single_needle"], (1000,), 2)
    with pytest.raises(ValueError, match="tokens: got"):
        made("bytes", [], (10,), 2)
