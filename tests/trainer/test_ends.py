"""How a run ends and goes on: until, data, NaN, kills, signals, stages, a profile."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from dgrpo.trainer import Diverged, record, train, train_stages
from dgrpo.trainer.build import build
from dgrpo.trainer.checkpoint import CheckpointError
from dgrpo.trainer.collect import decode
from dgrpo.trainer.config import load, validate
from tests.trainer.home import HOOKS, make_home, metrics, settings  # noqa: F401


def steep_loss(stats, context):
    """A loss whose gradient overflows a large step."""
    return -1e4 * context.token_weights * stats.logprobs


def nan_loss(stats, context):
    """A loss that is NaN."""
    return stats.logprobs * float("nan")


def test_until_ends_a_run(home, tmp_path):
    until = {"metric": "loss", "above": -100.0, "min_steps": 3}
    out = train(settings(home, tmp_path, "sft", steps=10, until=until))
    assert out.step == 3


def test_a_run_ends_with_its_data(home, tmp_path):
    out = train(settings(home, tmp_path, "sft", steps=None, epochs=1, batch={"prompts": 10}))
    assert out.step == 3  # 24 rows: 10, 10, 4


def test_the_time_of_an_evaluation_is_no_part_of_a_step(home, tmp_path, monkeypatch):
    def slow(*arguments):
        time.sleep(2)
        return decode(*arguments)

    monkeypatch.setattr(record, "decode", slow)  # only the evaluation decodes there
    held_out = {"sources": [{"path": str(home / "rows.jsonl")}], "count": 2, "every": 1}
    train(settings(home, tmp_path, "sft", steps=2, evaluate=held_out))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("time/evaluation", 0) >= 2] == [0, 1, 2]
    assert all(line["time/step"] < 2 for line in lines[1:])


def test_non_finite_steps_are_skipped_and_end_the_run(home, tmp_path):
    optimizer = {"kind": "adamw", "lr": 0.1, "max_skipped": 3}
    method = {"preset": "grpo", "objective": f"{__name__}:nan_loss"}
    wanted = settings(home, tmp_path, "grpo", method=method, optimizer=optimizer, steps=10)
    with pytest.raises(Diverged, match="not finite in 3 steps in a row .* parameters are good"):
        train(wanted)
    assert [line["skipped"] for line in metrics(tmp_path)] == [1, 2, 3]
    good = validate({**wanted.model_dump(), "steps": 4, "method": {"preset": "grpo"}})
    with pytest.raises(ValueError, match="--allow-changes"):
        build(good)
    # The last good state was saved: it is the starting one.
    run = build(good, allow_changes=True)
    start = AutoModelForCausalLM.from_pretrained(home / "student")
    for ours, theirs in zip(run.model.model.parameters(), start.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert run.state.step == 3
    run.close()


def test_parameters_that_are_not_finite_are_not_saved(home, tmp_path):
    checkpoint = {"every": 1, "keep": 1, "export": False}
    train(settings(home, tmp_path, "sft", steps=1, checkpoint=checkpoint))
    groups = {
        "method": {"preset": "sft", "objective": f"{__name__}:steep_loss"},
        "optimizer": {"lr": 3e38, "max_skipped": 2},
    }
    wanted = settings(home, tmp_path, "sft", steps=9, checkpoint=checkpoint, **groups)
    with pytest.raises(
        Diverged, match=r"parameters are not finite either, checkpoint: steps \[1\]"
    ):
        train(wanted, allow_changes=True)
    train(settings(home, tmp_path, "sft", steps=2, checkpoint=checkpoint), allow_changes=True)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported the trainer already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dgrpo.trainer"])
    return context


def durable(home, out):
    """Settings that exercise what a checkpoint holds: updates in flight, Adam, data, evaluation."""
    return settings(
        home,
        out,
        steps=8,
        batch={"prompts": 4, "updates": 2, "tokens": 64},
        optimizer={"kind": "adamw", "lr": 0.01, "warmup_steps": 3},
        checkpoint={"every": 1, "keep": 2, "asynchronous": True, "export": True},
        evaluate={"sources": [{"path": str(home / "rows.jsonl")}], "count": 4, "every": 4},
    )


def lines(folder):
    """How many steps have been logged."""
    path = folder / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def test_a_killed_run_goes_on_bitwise(home, tmp_path, processes):
    train(durable(home, tmp_path / "whole"))
    folder, chance = tmp_path / "killed", random.Random(0)
    wanted = durable(home, folder)
    for until in (0, 1, 3, 5):  # lines to wait for, then a random part of a step or of a save
        process = processes.Process(target=train, args=(wanted,))
        process.start()
        while lines(folder) < until and process.is_alive():
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.15))
        assert process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    train(wanted)
    assert metrics(folder) == metrics(tmp_path / "whole")
    ours, whole = (tmp_path / name / "export/model.safetensors" for name in ("killed", "whole"))
    assert ours.read_bytes() == whole.read_bytes()


def test_changed_settings_are_told_when_a_run_goes_on(home, tmp_path, capsys):
    adamw = {"kind": "adamw", "lr": 0.01}
    first = settings(home, tmp_path, "sft", optimizer=adamw)
    train(first)
    wanted = settings(home, tmp_path, "sft", optimizer={**adamw, "weight_decay": 0.5})
    assert train(wanted)[:2] == ("already done", 2)
    text = capsys.readouterr().out
    assert "changed since the last start: optimizer.weight_decay: 0.0 -> 0.5" in text
    assert "no step is left" in text
    run = build(wanted)  # and they hold: the checkpoint does not bring the old ones back
    assert run.optimizers[0].param_groups[0]["weight_decay"] == 0.5
    run.close()
    with pytest.raises(CheckpointError, match="got SGD, the checkpoint has AdamW"):
        build(settings(home, tmp_path, "sft"))
    assert load(tmp_path / "settings.yaml")[""] == first  # the others trained nothing


def test_sigterm_ends_a_run_with_a_checkpoint(home, tmp_path, processes):
    wanted = validate({**durable(home, tmp_path).model_dump(), "steps": 10_000})
    process = processes.Process(target=train, args=(wanted,))
    process.start()
    while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 3:
        time.sleep(0.05)
    process.terminate()
    process.join(20)
    assert process.exitcode == 0
    run = build(wanted)
    assert run.state.step == metrics(tmp_path)[-1]["step"] >= 2
    run.close()


# -- stages ------------------------------------------------------------------------------------


def test_two_stages_learn_and_are_not_run_twice(home, tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(
        f"""
        out: {tmp_path / "run"}
        epochs: null
        model: {{name: {home / "student"}}}
        teacher: {{name: {home / "teacher"}}}
        data: {{sources: [{{path: {home / "rows.jsonl"}}}]}}
        batch: {{prompts: 8, tokens: 256}}
        optimizer: {{lr: 0.01, warmup_steps: 0}}
        log: {{progress: false}}
        rewards: {{functions: [{{path: "{HOOKS}:parity"}}], timeout: null}}
        rollout: {{group_size: 2, max_tokens: 4}}
        stages:
          - {{name: sft, steps: 12, method: {{preset: sft}}}}
          - name: dgrpo
            steps: 2
            evaluate: {{sources: [{{path: {home / "rows.jsonl"}}}], count: 5}}
        """
    )
    outcomes = train_stages(load(path))
    assert [outcome.status for outcome in outcomes.values()] == ["finished", "finished"]
    nll = [line["nll"] for line in metrics(tmp_path / "run/sft")]
    assert nll[-1] < 0.7 * nll[0]
    scores = [line for line in metrics(tmp_path / "run/dgrpo") if "evaluation/reward" in line]
    assert [line["step"] for line in scores] == [0, 2]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/dgrpo/export")
    assert model.config.model_type == "qwen3"
    again = train_stages(load(path))
    assert [outcome.status for outcome in again.values()] == ["already done"] * 2


def test_profile_is_written(home, tmp_path):
    train(settings(home, tmp_path, "sft", log={"progress": False, "profile_steps": [2, 2]}))
    trace = json.loads((tmp_path / "profile/trace-00000.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"step/forward", "step/backward", "step/update"} <= names
    assert (tmp_path / "profile/memory-00000.txt").stat().st_size > 0
