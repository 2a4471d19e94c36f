"""The log resumes where its checkpoint is."""

import json
import math
import sys
import types
from contextlib import closing

import pytest
import torch

from dgrpo.trainer.metrics import RunLog, write_rollouts
from dgrpo.trainer.metrics.log import cut


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_a_step(tmp_path, capsys):
    with closing(RunLog(tmp_path, total_steps=2)) as log:
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
    with closing(RunLog(tmp_path, live=False)) as log:
        for step in range(1, 6):
            log.log(step, {"loss": step})
            write_rollouts(tmp_path, step, [{"step": step}])
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed within a write
    (tmp_path / "rollouts/step-00000009-00000.jsonl.gz.tmp").touch()
    with closing(RunLog(tmp_path, resume_step=3, live=False)) as log:
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


def test_another_runs_metrics_are_not_appended_to(tmp_path):
    RunLog(tmp_path, live=False).log(1, {})
    with pytest.raises(ValueError, match="has the metrics of another run"):
        RunLog(tmp_path, live=False)
    RunLog(tmp_path, resume_step=0, live=False).close()
    assert lines(tmp_path / "metrics.jsonl") == []


def test_tensorboard(tmp_path):
    with closing(RunLog(tmp_path, tensorboard=True, live=False)) as log:
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
    with closing(RunLog(tmp_path, wandb="project", settings={"lr": 1}, live=False)) as log:
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


def test_cutting_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", killed)
        cut(path, 1)
    assert lines(path) == [{"step": 1}, {"step": 2}]
    cut(path, 1)
    assert lines(path) == [{"step": 1}]
    cut(tmp_path / "absent", 1)
    assert not (tmp_path / "absent").exists()
