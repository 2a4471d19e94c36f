"""What the page says first: settings, outcome, time; and several runs on one page."""

import json
from pathlib import Path

import pytest

from dgrpo.cli import main
from dgrpo.trainer.config import dump, validate
from dgrpo.trainer.report import distinct, write_report
from dgrpo.trainer.report.read import read_run
from dgrpo.trainer.report.summary import changes, facts, settings
from tests.trainer.report.runs import data_of, write_run


def stage_of(folder, metrics, done=False, **values):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step} | line) for step, line in enumerate(metrics, 1)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    if values:
        sources = {"sources": [{"path": "rows.jsonl", "weight": 2.0}]}
        model = {"model": {"name": "student"}, "data": sources}
        (folder / "settings.yaml").write_text(dump(validate(model | values)))
    if done:
        (folder / "done.yaml").touch()
    (stage,) = read_run(folder)
    return stage


def test_start_and_end_are_means_of_a_tenth_but_held_out_scores_are_single(tmp_path):
    metrics = [{"reward": i / 100, "evaluation/reward": i / 20, "loss": 1.0} for i in range(20)]
    stage = stage_of(tmp_path, metrics)
    reward, held_out, loss = changes(stage)
    assert reward.title == "reward" and reward.over == 2
    assert (reward.start, reward.end) == pytest.approx((0.005, 0.185))
    assert held_out[:] == ("held-out reward", 0.0, 0.95, 1)
    assert loss.start == loss.end == 1.0


def test_a_single_step_and_no_metric_at_all(tmp_path):
    assert changes(stage_of(tmp_path / "one", [{"loss": 2.0}])) == [("loss", 2.0, 2.0, 1)]
    assert changes(stage_of(tmp_path / "none", [{}])) == []


def test_facts(tmp_path):
    metrics = [{"time/step": 40.0, "time/evaluation": 5.0}, {"time/step": 85.0}]
    wanted = {"teacher": {"name": "big"}, "steps": 9}
    assert facts(stage_of(tmp_path / "a", metrics, **wanted)) == [
        ("method", "dgrpo"),
        ("model", "student"),
        ("teacher", "big"),
        ("steps", "2 of 9, not finished"),
        ("time", "0:02:05 training, 0:00:05 evaluation"),
    ]
    sft = {"method": {"preset": "sft"}, "model": {"name": "m", "lora": {"rank": 4}}}
    assert facts(stage_of(tmp_path / "b", metrics[:1], done=True, **sft)) == [
        ("method", "sft"),
        ("model", "m, LoRA of rank 4"),
        ("steps", "1, finished"),
        ("time", "0:00:40 training, 0:00:05 evaluation"),
    ]


def test_settings_are_those_that_matter(tmp_path):
    values = {"method": {"preset": "sft"}, "rollout": {"max_tokens": 7}, "log": {"samples": 3}}
    common, (own,) = settings([stage_of(tmp_path, [{}], seed=5, **values)])
    assert common == [
        ("seed", "5"),
        ("data.sources", "[{path: rows.jsonl, weight: 2.0}]"),
        ("rollout.max_tokens", "7"),
        ("batch.prompts", "16"),
        ("optimizer.lr", "1.0e-06"),
    ]
    assert own == []


def test_settings_that_differ_are_each_runs_own(tmp_path):
    ends = {"metric": "loss", "above": 2.0}
    first = stage_of(tmp_path / "a", [{}], method={"preset": "sft"}, seed=5, until=ends)
    second = stage_of(tmp_path / "b", [{}], method={"preset": "sft"}, optimizer={"lr": 1.0})
    common, own = settings([first, second, stage_of(tmp_path / "c", [{}])])
    assert [name for name, _ in common] == ["data.sources", "batch.prompts"]
    told = ("seed", "until.metric", "until.above", "optimizer.lr")
    assert own == [
        list(zip(told, ("5", "loss", "2.0", "1.0e-06"), strict=True)),
        list(zip(told, ("0", "null", "null", "1.0"), strict=True)),
        [],
    ]


def test_a_settings_file_that_cannot_be_read_is_noted(tmp_path):
    stage_of(tmp_path, [{"loss": 1.0}])
    for text in (b"\x00\xff", b"a: [", b"- 1"):
        (tmp_path / "settings.yaml").write_bytes(text)
        (run,) = data_of(write_report(tmp_path).page.read_text())["runs"]
        assert run["notes"] == ["settings.yaml: unreadable"]
    (tmp_path / "settings.yaml").write_text("later: {setting: 1}\nmethod: 3\n1: x\n")
    data = data_of(write_report(tmp_path).page.read_text())
    assert data["settings"] == [["later", "{setting: 1}"], ["method", "3"], ["1", "x"]]


def test_values_that_are_not_finite_are_noted(tmp_path):
    nan = float("nan")
    metrics = [{"loss": 1.0, "a": nan}, {"loss": nan, "a": nan}, {"loss": None, "a": nan}]
    stage = stage_of(tmp_path, metrics)
    assert stage.notes == ["not finite: loss at 2 steps from 2 on, a at 3 steps from 1 on"]
    assert stage.series == {"loss": [1.0, None, None]}


# Several runs


def test_several_runs_share_a_page(tmp_path, capsys):
    for name, steps in (("x/run", [1, 2]), ("y/run", [1, 2, 3])):
        write_run(tmp_path / name, steps)
    folders = [str(tmp_path / name) for name in ("x/run", "y/run", "x/../x/run")]
    assert main(["report", *folders, "--out", str(tmp_path / "both")]) == 0
    assert str(tmp_path / "both/report.html") in capsys.readouterr().out
    data = data_of((tmp_path / "both/report.html").read_text())
    assert data["title"] == "x/run · y/run"
    assert [(run["name"], run["shown"]) for run in data["runs"]] == [
        ("x/run", True),
        ("y/run", True),
    ]
    assert [run["series"]["loss"]["steps"] for run in data["runs"]] == [[1, 2], [1, 2, 3]]
    assert write_report(*folders).page == tmp_path / "x/run/report.html"
    assert main(["report", folders[0], str(tmp_path / "absent")]) == 2
    assert f"got {tmp_path / 'absent'}, which is no folder" in capsys.readouterr().err


def test_of_several_runs_with_stages_the_last_stages_are_shown(tmp_path):
    for name in ("a/first", "a/last", "b"):
        write_run(tmp_path / name, [1])
    data = data_of(write_report(tmp_path / "a", tmp_path / "b").page.read_text())
    assert [(run["name"], run["shown"]) for run in data["runs"]] == [
        ("a/first", False),
        ("a/last", True),
        ("b", True),
    ]


def test_names_tell_runs_apart():
    paths = [Path("/r/a/run"), Path("/r/b/run"), Path("/r/c/other")]
    assert distinct(paths[1:]) == ["run", "other"]
    assert distinct([Path("/r/a"), Path("/r/a/a")]) == ["a", "a/a"]
    assert distinct(paths) == ["a/run", "b/run", "c/other"]
    with pytest.raises(ValueError, match="got none, expected the folder of at least one run"):
        write_report()
