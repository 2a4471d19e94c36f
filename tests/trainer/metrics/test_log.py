"""The log resumes where its checkpoint is, and the display suits where it is shown."""

import io
import json
import math
import sys
import types

import pytest
import torch

from dgrpo.trainer.metrics import RunLog, write_rollouts
from dgrpo.trainer.metrics import display as display_module
from dgrpo.trainer.metrics.display import Display, duration
from dgrpo.trainer.metrics.lines import cut


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_a_step(tmp_path, capsys):
    with RunLog(tmp_path, total_steps=2) as log:
        log.log(1, {"loss": 0.5, "clipped": torch.tensor(0.25), "stage": "sft", "bad": math.nan})
        assert lines(tmp_path / "metrics.jsonl") == [
            {"step": 1, "loss": 0.5, "clipped": 0.25, "stage": "sft", "bad": None}
        ]
        log.message("a word")
        log.log(2, {"reward": 1, "divergence": 0.125, "time/tokens_per_second": 1234.5})
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("step 1/2  loss 0.5  clipped 25.00%  left 0:0")
    assert out[1] == "a word"
    assert out[2] == "step 2/2  reward 1.000  KL 0.1250  tokens/s 1,234"
    log.close()


def test_resuming_cuts_back_to_the_checkpoint(tmp_path):
    with RunLog(tmp_path, live=False) as log:
        for step in range(1, 6):
            log.log(step, {"loss": step})
            write_rollouts(tmp_path, step, [{"step": step}])
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed within a write
    (tmp_path / "rollouts/step-00000009-00000.jsonl.gz.tmp").touch()
    with RunLog(tmp_path, resume_step=3, live=False) as log:
        log.log(4, {"loss": 40})
    assert [(line["step"], line["loss"]) for line in lines(path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]
    assert [p.name[5:13] for p in sorted((tmp_path / "rollouts").iterdir())] == [
        "00000001",
        "00000002",
        "00000003",
    ]
    assert not list(tmp_path.glob("*.tmp"))


def test_cutting_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", killed)
        cut(path, 1)
    assert lines(path) == [{"step": 1}, {"step": 2}]
    assert cut(path, 1) == 1 and lines(path) == [{"step": 1}]
    assert cut(tmp_path / "absent", 1) == 0


def test_another_runs_metrics_are_not_appended_to(tmp_path):
    RunLog(tmp_path, live=False).log(1, {})
    with pytest.raises(ValueError, match="has the metrics of another run"):
        RunLog(tmp_path, live=False)
    RunLog(tmp_path, resume_step=0, live=False).close()
    assert lines(tmp_path / "metrics.jsonl") == []


def test_tensorboard(tmp_path):
    with RunLog(tmp_path, tensorboard=True, live=False) as log:
        log.log(1, {"loss": 0.5})
        log.sync()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5)]


def test_wandb_run_is_resumed_by_its_id(tmp_path, monkeypatch):
    calls = []

    def init(**options):
        calls.append(options)
        log = lambda metrics, step: calls.append((step, metrics))  # noqa: E731
        return types.SimpleNamespace(id="abc", log=log, finish=lambda: calls.append("finish"))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with RunLog(tmp_path, wandb="project", settings={"lr": 1}, live=False) as log:
        log.log(1, {"loss": 0.5, "stage": "sft"})
    RunLog(tmp_path, resume_step=1, wandb="project", live=False).close()
    assert calls[0]["id"] is None and calls[0]["config"] == {"lr": 1}
    assert calls[1:3] == [(1, {"loss": 0.5}), "finish"]
    assert calls[3]["id"] == "abc" and calls[3]["resume"] == "allow"


def test_a_missing_sink_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb, or turn wandb off"):
        RunLog(tmp_path / "a", wandb="project", live=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard, or turn tensorboard off"):
        RunLog(tmp_path / "b", tensorboard=True, live=False)


# The display


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_live_display_shows_the_last_steps_and_the_time_left(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in {"TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    display = Display(100, done=40)
    for step in range(41, 61):
        display.update({"step": step, "reward": 0.5, "divergence": 0.1, "memory/peak_gib": 3.25})
    display.message("[bold] is text")
    display.close()
    output = terminal.getvalue()
    assert "\x1b[" in output and "[bold] is text" in output
    last = output[output.rindex("reward") :]
    assert "3.2 GiB" in last and "60/100" in last and " left" in last and " 52 " not in last
    assert "KL" in output and "clipped" not in output


@pytest.mark.parametrize("variable", [{"CI": "true"}, {"TERM": "dumb"}], ids=["CI", "dumb"])
def test_a_log_gets_lines(monkeypatch, variable):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    Display(None).update({"step": 7, "loss": 1.0})
    assert terminal.getvalue() == "step 7  loss 1\n"


def test_the_time_left_is_that_of_the_steps_since_the_start(monkeypatch):
    clock = iter((0, 30, 30))
    monkeypatch.setattr(
        display_module, "time", types.SimpleNamespace(monotonic=lambda: next(clock))
    )
    display = Display(100, done=40, live=False)
    assert display.time_left(40) == "" and display.time_left(50) == "2:30"
    assert display.time_left(100) == "" and Display(None, live=False).time_left(5) == ""


def test_durations():
    assert [duration(s) for s in (0, 59.6, 3599, 3723)] == ["0:00", "1:00", "59:59", "1:02:03"]
