"""Which rollouts the page holds, and its numbers."""

from dgrpo.trainer.report import write_report
from dgrpo.trainer.report.page import choose, embed, spread
from tests.trainer.report.runs import data_of, rollout, write_run


def test_rollouts_are_chosen_evenly_over_the_steps(tmp_path):
    write_run(tmp_path, [1], [rollout(s, g) for s in range(1, 10) for g in range(2)])
    paths = sorted((tmp_path / "rollouts").iterdir())
    size = len(embed([rollout(1, g) for g in range(2)]).encode())
    steps = lambda limit: [(r["step"], r["group"]) for r in choose(paths, limit)[0]]  # noqa: E731
    assert choose(paths, 10**6)[1] == [] and len(choose(paths, 10**6)[0]) == 18
    assert steps(0) == [(9, 0), (9, 1)]
    assert steps(3 * size) == [(s, g) for s in (1, 5, 9) for g in range(2)]
    assert choose(paths, 3 * size)[1] == ["of 9 steps with rollouts, 3 are on this page"]


def test_every_beginning_is_spread():
    assert spread(0) == [] and spread(1) == [0] and spread(9)[:5] == [8, 0, 4, 6, 2]
    for count in range(1, 40):
        assert sorted(spread(count)) == list(range(count))


def test_numbers_that_are_no_json_become_null(tmp_path):
    write_run(tmp_path, [1], [rollout(1, divergence=[float("nan"), float("inf")])])
    data = data_of(write_report(tmp_path).page.read_text())
    assert data["runs"][0]["rollouts"][0]["divergence"] == [None, None]


def test_a_long_curve_keeps_its_last_point(tmp_path):
    write_run(tmp_path, range(1, 4001))
    line = data_of(write_report(tmp_path).page.read_text())["runs"][0]["series"]["loss"]
    assert len(line["steps"]) < 1500 and line["steps"][0] == 1 and line["steps"][-1] == 4000
    assert line["values"][-1] == 0.00025
