"""The report: whole on runs that broke off, one file that needs nothing else, safe with text."""

import gzip
import json
import os
import re

import pytest

from dgrpo.trainer.report import write_report
from dgrpo.trainer.report.page import choose, embed, spread
from dgrpo.trainer.report.panels import ceiling, panels, points, smooth
from dgrpo.trainer.report.read import read_lines, read_rollouts, read_run

EVIL = "</script><script>document.title='broken'</script><!-- <b>\u2028 & é 🙂"


def rollout(step, group=0, index=0, text=("a", " b\n"), **values):
    count = len(text)
    record = {
        "step": step,
        "group": group,
        "index": index,
        "prompt": EVIL,
        "prompt_tokens": 3,
        "tokens": list(range(count)),
        "text": list(text),
        "reward": 0.5,
        "advantage": -1,
        "divergence": [0.25 * i for i in range(count)],
        "clipped": [i % 2 for i in range(count)],
    }
    return record | values


def write_run(folder, steps, rollouts=(), tail=""):
    (folder / "rollouts").mkdir(parents=True)
    lines = [
        json.dumps({"step": s, "loss": 1 / s, "reward": s / 10, "time/step": 2.0}) for s in steps
    ]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines) + tail)
    for record in rollouts:
        path = folder / f"rollouts/step-{record['step']:08d}-00000.jsonl.gz"
        with gzip.open(path, "at") as file:
            file.write(json.dumps(record) + "\n")


def data_of(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def test_a_run_that_broke_off(tmp_path):
    rollouts = [rollout(1, index=i) for i in range(2)] + [rollout(2, text=[EVIL, ""])]
    write_run(tmp_path / "run", [1, 2, 3], rollouts, tail='{"step": 4, "lo')
    cut = tmp_path / "run/rollouts/step-00000002-00000.jsonl.gz"
    with gzip.open(cut, "at", compresslevel=0) as file:
        file.write("x" * 1000)
    os.truncate(cut, cut.stat().st_size - 500)
    report = write_report(tmp_path / "run")
    assert report.curves == tmp_path / "run/curves.png"
    assert report.curves.read_bytes().startswith(b"\x89PNG")
    page = report.page.read_text()
    data = data_of(page)
    (run,) = data["runs"]
    assert data["title"] == "run"
    assert run["notes"] == ["metrics.jsonl: 1 unreadable line", "rollouts: 1 unreadable"]
    assert run["rollouts"] == rollouts
    assert data["panels"][0] == {"title": "reward", "lines": [["reward", "reward"]]}
    reward = {"steps": [1, 2, 3], "values": [0.1, 0.2, 0.3], "mean": None, "top": None}
    assert run["series"]["reward"] == reward
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_the_page_needs_nothing_else_and_text_stays_text(tmp_path):
    write_run(tmp_path, [1], [rollout(1, text=[EVIL])])
    page = write_report(tmp_path).page.read_text()
    assert page.count("</script>") == 2 and page.count("<script") == 2 and "<!--" not in page
    assert not re.search(r"""(src|href|action)\s*=|@import|url\(|fetch\(|import\(""", page)
    assert set(re.findall(r"https?://[^\s\"'`)]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "@@" not in page
    assert data_of(page)["runs"][0]["rollouts"][0]["text"] == [EVIL]
    assert embed({"a": "</script>\u2028"}) == '{"a":"\\u003c/script>\\u2028"}'


def test_template_marks_in_a_rollout_stay(tmp_path):
    write_run(tmp_path, [1], [rollout(1, text=["@@STYLE@@", "@@DATA@@", "\\1"])])
    page = write_report(tmp_path).page.read_text()
    assert data_of(page)["runs"][0]["rollouts"][0]["text"] == ["@@STYLE@@", "@@DATA@@", "\\1"]


def test_stages_of_a_run(tmp_path):
    write_run(tmp_path / "b-first", [1, 2])
    write_run(tmp_path / "a-second", [1, 2, 3])
    os.utime(tmp_path / "b-first/metrics.jsonl", (1, 1))
    data = data_of(write_report(tmp_path).page.read_text())
    assert [run["name"] for run in data["runs"]] == ["b-first", "a-second"]
    assert [run["shown"] for run in data["runs"]] == [False, True]


def test_a_run_before_its_first_step(tmp_path):
    write_run(tmp_path, [])
    report = write_report(tmp_path)
    data = data_of(report.page.read_text())
    assert data["panels"] == [] and data["runs"][0]["facts"] == [["steps", "0, not finished"]]
    assert report.curves.stat().st_size > 0


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="expected a run's folder: it, or a folder in it, has metrics"
    ):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="which is no folder"):
        write_report(tmp_path / "absent")


def test_lines_that_are_no_metrics_are_left_out(tmp_path):
    write_run(
        tmp_path, [1], tail='[1]\nnull\n\n{"no": "step"}\n{"step": 2, "loss": null, "name": "x"}\n'
    )
    (stage,) = read_run(tmp_path)
    assert stage.steps == [1, 2]
    assert stage.series == {"loss": [1.0, None], "reward": [0.1, None], "time/step": [2.0, None]}
    assert stage.notes == ["metrics.jsonl: 2 unreadable lines", "not finite: loss at step 2"]
    assert read_lines(b'{"a": 1}\n\xff\n') == ([{"a": 1}], 1)


def test_unreadable_rollouts_are_counted(tmp_path):
    path = tmp_path / "step-00000001-00000.jsonl.gz"
    path.write_bytes(b"no gzip")
    assert read_rollouts(path) == ([], 1)
    path.write_bytes(gzip.compress(b'{"step": 1}\n{"half'))
    assert read_rollouts(path) == ([], 2)


# Which rollouts


def test_rollouts_are_chosen_evenly_over_the_steps(tmp_path):
    write_run(tmp_path, [1], [rollout(s, g) for s in range(1, 10) for g in range(2)])
    paths = sorted((tmp_path / "rollouts").iterdir())
    size = len(embed([rollout(1)]).encode())
    steps = lambda limit: [(r["step"], r["group"]) for r in choose(paths, limit)[0]]  # noqa: E731
    assert choose(paths, 10**6)[1] == [] and len(choose(paths, 10**6)[0]) == 18
    assert steps(0) == [(9, 0)]
    assert steps(3 * size) == [(1, 0), (5, 0), (9, 0)]
    assert choose(paths, 3 * size)[1] == ["of 9 steps with rollouts, 3 are on this page"]
    assert len(steps(11 * size)) == 11 and {(s, 0) for s in range(1, 10)} < set(steps(11 * size))
    assert choose(paths, 11 * size)[1] == [
        "7 rollouts found no room on this page; all are in rollouts/"
    ]


def test_every_beginning_is_spread():
    assert spread(0) == [] and spread(1) == [0] and spread(9)[:5] == [8, 0, 4, 2, 6]
    for count in range(1, 40):
        assert sorted(spread(count)) == list(range(count))


def test_numbers_that_are_no_json_become_null(tmp_path):
    write_run(tmp_path, [1], [rollout(1, divergence=[float("nan"), float("inf")])])
    data = data_of(write_report(tmp_path).page.read_text())
    assert data["runs"][0]["rollouts"][0]["divergence"] == [None, None]


# Curves


def test_panels_are_the_known_ones_then_groups_then_the_rest():
    names = [
        "zeta",
        "time/step",
        "time/train",
        "reward/format",
        "reward",
        "evaluation/length_x",
        "loss",
    ]
    assert [(p.title, [label for _, label in p.lines]) for p in panels(names)] == [
        ("reward", ["reward"]),
        ("loss", ["loss"]),
        ("held-out: length x", ["length x"]),
        ("parts of the reward", ["format"]),
        ("seconds", ["step", "train"]),
        ("zeta", ["zeta"]),
    ]


def test_smoothing():
    assert points([1, 2, 3], [None, 5.0, 6.0]) == ([2, 3], [5.0, 6.0])
    assert smooth([float(i) for i in range(39)]) is None and smooth([1.0] * 100) is None
    mean = smooth([float(i) for i in range(100)])
    assert mean[50] == 50 and mean[0] == 1.0 and len(mean) == 100
    assert smooth([float(i) for i in range(100)], top=10.0)[50:] == [10.0] * 50


def test_a_long_evaluation_does_not_flatten_the_times():
    names = [p.lines for p in panels(["time/step", "time/evaluation", "time/train"])]
    assert names == [
        (("time/evaluation", "time/evaluation"),),
        (("time/step", "step"), ("time/train", "train")),
    ]
    slow = [1.0, 1.0, 1.0, 1.0, 60.0, 1.0, 1.0, 1.0]
    assert ceiling("time/step", slow) == 2.5 and ceiling("time/step", [1.0, 2.0, 3.0, 4.0]) is None
    assert ceiling("loss", slow) is None and ceiling("time/evaluation", slow) is None


def test_a_long_curve_keeps_its_last_point(tmp_path):
    write_run(tmp_path, range(1, 4001))
    line = data_of(write_report(tmp_path).page.read_text())["runs"][0]["series"]["loss"]
    assert len(line["steps"]) < 1500 and line["steps"][0] == 1 and line["steps"][-1] == 4000
    assert line["values"][-1] == 0.00025
