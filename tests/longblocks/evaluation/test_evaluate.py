"""Scoring completions of rows, also of rows, models and rewards that fail."""

import json

import numpy as np
import pytest

from dgrpo.data import load_rows
from dgrpo.longblocks.evaluation import Item, Results, compare, evaluate


def rows(n=6, **changes):
    base = {"reward": "dgrpo.rewards:exact_match", "task": "t", "length": 4096}
    return [
        base
        | {"id": f"r{i}", "prompt": f"say {i}", "aliases": [str(i)], "depths": [i / n]}
        | changes
        for i in range(n)
    ]


def perfect(prompts, max_tokens):
    return [f"Answer: {prompt.split()[1]}" for prompt in prompts]


def half(prompts, max_tokens):
    return [f"Answer: {int(p.split()[1]) // 2 * 2}" for p in prompts]


def test_scores_by_task_and_length():
    results = evaluate(perfect, [*rows(), *rows(task="u", length=8192)], batch_size=4)
    assert results.by_task["t"].mean == 1.0 and results.by_length[8192].n == 6
    assert evaluate(half, rows()).by_task["t"].mean == 0.5
    assert results.items[0].completion == "Answer: 0" and not results.counts


def test_prompts_are_rendered_as_in_training():
    seen = []

    def generate(prompts, max_tokens):
        seen.extend(prompts)
        return ["A"] * len(prompts)

    chat = [{"role": "user", "content": "hello"}]
    some = [{"document": "D", "question": "Q", "answer": "A"}, {"messages": chat, "answer": "A"}]
    evaluate(generate, [row | {"reward": "exact_match"} for row in some])
    assert seen == ["D\n\nQ", chat]


def test_limits_are_the_callers_or_the_rows():
    seen = []

    def generate(prompts, max_tokens):
        seen.append((len(prompts), max_tokens))
        return [""] * len(prompts)

    some = [*rows(2), *rows(2, max_tokens=7)]
    evaluate(generate, some)
    evaluate(generate, some, max_tokens=5)
    assert seen == [(2, 256), (2, 7), (4, 5)]


def test_a_failing_prompt_costs_itself_only():
    def generate(prompts, max_tokens):
        if any("3" in prompt for prompt in prompts):
            raise MemoryError("too long")
        return perfect(prompts, max_tokens)

    lines = []
    results = evaluate(generate, rows(), log=lines.append)
    assert len(results.items) == 5 and results.counts == {"generation failed": 1}
    assert "r3: generation failed (MemoryError: too long)" in lines[0]


def test_too_few_completions_are_a_failure_not_a_shift():
    results = evaluate(lambda prompts, n: ["Answer: 0"][: len(prompts)], rows(3))
    assert [item.id for item in results.items] == ["r0", "r1", "r2"]
    assert [item.score for item in results.items] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": None}, "prompt is null"),
        ({"prompt": 3}, "a prompt that is neither text nor messages"),
        ({"reward": None}, "no reward"),
        ({"reward": "os:getcwd"}, "unknown reward"),
        ({"reward": "dgrpo.rewards:nothing"}, "unknown reward"),
        ({"aliases": None}, "reward failed"),
    ],
)
def test_bad_rows_are_reported_and_counted(change, reason):
    bad = rows(1)[0] | change
    results = evaluate(perfect, [rows()[1], bad])
    assert len(results.items) == 1 and results.counts == {reason: 1}
    assert results.failures[0].startswith(f"r0: {reason}")
    assert f"without a score: 1 {reason}" in results.table()


def stop(prompts, completions, **columns):
    raise SystemExit(0)


ODD = {
    "text": ("1.0", "got the text '1.0', expected a list of 1 numbers"),
    "texts": (["1.0"], "got the text '1.0', expected a number"),
    "infinite": ([float("inf")], "got inf, expected a number"),
    "nothing": (None, "got None"),
    "two": ([1.0, 1.0], "got 2 values for 1 completions"),
    "dict": ({"score": [1.0]}, 'expected the key "reward"'),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_score_is_none(kind):
    value, message = ODD[kind]
    results = evaluate(perfect, rows(1), reward=lambda p, c, **columns: value)
    assert not results.items and message in results.failures[0]


def test_a_reward_of_the_callers_scores_all_rows():
    seen = []

    def reward(prompts, completions, *, task, **columns):
        seen.append((prompts, completions, task, "reward" in columns))
        return {"reward": [0.5], "odd": [float("nan")]}

    results = evaluate(perfect, [rows(1)[0], rows(1, reward="os:getcwd")[0]], reward=reward)
    assert [item.score for item in results.items] == [0.5, 0.5]
    assert seen[0] == (["say 0"], ["Answer: 0"], ["t"], False) and results.items[0].parts == {}


def test_a_reward_that_exits_costs_its_row():
    assert evaluate(perfect, rows(2), reward=stop).counts == {"reward failed": 2}


def test_unreadable_lines_of_a_file_are_counted(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([json.dumps(rows()[0]), "{", json.dumps(rows()[2])]))
    results = evaluate(perfect, load_rows(file))
    assert len(results.items) == 2 and results.counts == {"bad JSON": 1}


def test_lengths_are_nominal_or_rounded_up(tmp_path):
    class Words:
        def __call__(self, text, **options):
            return {"input_ids": text.split()}

    some = [*rows(1, length=None, tokens=3900), *rows(1, length=None)]
    assert [item.length for item in evaluate(perfect, some).items] == [4096, 0]


def test_the_table_shows_percent_intervals_and_chance():
    results = evaluate(half, [*rows(chance=0.25), *rows(task="u", length=8192, chance=0.25)])
    lines = results.table().split("\n")
    assert lines[0].split("|")[1:7] == [
        c.ljust(len(x)) for c, x in zip(
            [" task", " 4k", " 8k", " all", " n", " chance"], lines[0].split("|")[1:7], strict=True
        )
    ]  # fmt: skip
    assert "50.0 [18.8, 81.2]" in lines[2] and "25.0" in lines[2]
    assert lines[-1].startswith("| mean over items")


def test_json_holds_everything(tmp_path):
    results = evaluate(half, rows())
    results.to_json(tmp_path / "r.json")
    again = Results.from_json(tmp_path / "r.json")
    assert again.items == results.items and again.by_task == results.by_task


def test_the_map_puts_scores_where_the_needles_are(tmp_path):
    items = [
        Item(f"{d}{n}", "t", n, float(d < 0.5), (d,)) for d in (0.0, 0.55, 1.0) for n in (1, 2)
    ]
    grid = Results(items).grid()
    assert grid.shape == (10, 2)
    assert grid[0].tolist() == [1.0, 1.0] and grid[5].tolist() == grid[9].tolist() == [0.0, 0.0]
    assert np.isnan(grid[3]).all()
    Results(items).heatmap(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    Results([]).heatmap(tmp_path / "empty.png")


def test_two_models_are_compared_on_the_items_that_both_have():
    before, after = evaluate(half, rows(40)), evaluate(perfect, rows(42)[2:])
    found = compare(before, after)["t"]
    assert found.n == 38 and found.mean == 0.5 and found.low > 0
    with pytest.raises(ValueError, match="evaluate both on the same rows"):
        compare(before, evaluate(perfect, rows(2, task="other")))
