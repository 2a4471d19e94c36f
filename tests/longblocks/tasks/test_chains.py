"""The small chain task and its tokenizer."""

import json

import numpy as np
import pytest

from dgrpo.data import load_rows
from dgrpo.longblocks.tasks import train_tokenizer
from dgrpo.longblocks.tasks.chains import ChainTask, rows, write
from dgrpo.longblocks.tasks.haystack import source_lines
from dgrpo.longblocks.tasks.tokenizer import invented_names
from dgrpo.text import encode_text


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def follow(document, start):
    """An independent solver: reads the chain from the text."""
    names, lines = invented_names(64), document.split("\n")
    facts = {n: line[len(n) :] for line in lines for n in names if line.startswith(n)}
    path = []
    while start in facts:
        start = facts[start]
        path.append(start)
    return path


def test_tokenizer_is_the_same_each_time_and_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    assert train_tokenizer().get_vocab() == tokenizer.get_vocab() and len(tokenizer) == 576
    tokenizer.save_pretrained(tmp_path)
    text = "Lines, été\n  and 42 BivegBuloq\n"
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text


def test_names_and_digits_and_line_ends_are_single_tokens(tokenizer):
    text = f"{invented_names(64)[5]}{invented_names(64)[9]}42\n"
    assert len(encode_text(tokenizer, text)) == 5
    assert invented_names(64)[:10] == invented_names(10) and len(set(invented_names(3000))) == 3000


def test_lines_are_tokenised_independently(tokenizer):
    lines = ["def f(x):\n", "return 1\n", "BivegBuloq\n", "# end\n"]
    whole = encode_text(tokenizer, "".join(lines))
    assert whole == [i for line in lines for i in encode_text(tokenizer, line)]


@pytest.mark.parametrize(
    "options",
    [{}, {"tokens": None}, {"tokens": 700, "hops": 5, "chains": 3}, {"hops": 1, "queries": 2}],
)
def test_every_row_is_solved_by_reading_its_document(tokenizer, options):
    task = ChainTask(tokenizer, **options)
    for i in range(40):
        row = task.row(i)
        path = follow(row["document"], row["question"][1:])
        assert row["completion"] == "".join(path) and row["aliases"] == [path[-1]] == [
            row["answer"]
        ]
        assert row["prompt"] == row["document"] + row["question"]
        assert len(row["distractors"]) == task.chains - 1
        assert row["answer"] not in row["distractors"]
        if task.tokens:
            used = len(encode_text(tokenizer, row["document"]))
            assert task.tokens - 60 <= used <= task.tokens


def test_three_ways_to_say_the_steps(tokenizer):
    chain = ["Biveg", "Buloq", "42"]
    said = {s: ChainTask(tokenizer, steps=s).completion(chain) for s in ("path", "links", "answer")}
    assert said == {"path": "Buloq42", "links": "BivegBuloq\nBuloq42", "answer": "42"}


def test_rows_depend_on_seed_split_and_number_alone(tokenizer):
    one, two = ChainTask(tokenizer), ChainTask(tokenizer)
    two.row(7)
    assert one.row(3) == two.row(3) and one.row(3) != one.row(4)
    assert one.row(3)["document"] != ChainTask(tokenizer, seed=1).row(3)["document"]
    assert one.row(0)["document_id"] == one.row(3)["document_id"] != one.row(4)["document_id"]


def test_splits_share_no_line(tokenizer):
    tasks = [ChainTask(tokenizer, split=s) for s in ("train", "validation", "test")]
    train, validation, test = (task.lines for task in tasks)
    assert train + validation + test == source_lines()
    assert len(train) > 7.9 * len(validation) and len(test) >= len(validation)


def test_depths_are_uniform(tokenizer):
    task = ChainTask(tokenizer, tokens=400)
    depths = np.sort([d for i in range(300) for d in task.row(4 * i)["depths"]])
    n = len(depths)
    gap = np.max(np.abs(depths + 0.02 - np.arange(n) / n))  # lines start at their depth
    assert gap < 1.63 / np.sqrt(n) + 0.03  # Kolmogorov-Smirnov at 1 %, and the width of a line


def test_segments_answer_every_query(tokenizer):
    task = ChainTask(tokenizer)
    pieces = task.segments(2)["segments"]
    assert [piece["loss"] for piece in pieces] == [False] + [False, True] * 4
    assert [p["text"] for p in pieces[2::2]] == [task.row(8 + i)["completion"] for i in range(4)]


def test_rows_as_a_source_and_as_a_file(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = {"tokenizer": str(tmp_path / "tokenizer"), "count": 6, "tokens": 128, "chains": 2}
    found = load_rows("dgrpo.longblocks.tasks.chains:rows", options=options)
    assert len(found) == 6 and len({row["id"] for row in found}) == 6
    write(tmp_path / "rows.jsonl", found)
    assert list(load_rows(tmp_path / "rows.jsonl")) == list(found)
    assert json.dumps(found[0])
    assert "segments" in rows(tokenizer, count=1, segments=True)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chains": 40, "hops": 2}, "names: got 64"),
        ({"steps": "all"}, "steps: got 'all'"),
        ({"split": "dev"}, "split: got 'dev'"),
        ({"tokens": 20}, "tokens: got 20"),
        ({"digits": 1, "chains": 10, "hops": 1}, "digits: got 1"),
    ],
)
def test_impossible_tasks_say_why(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        ChainTask(tokenizer, **options)
