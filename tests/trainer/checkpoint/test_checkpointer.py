"""A resumed run is bitwise the uninterrupted one."""

import contextlib
import json
import pickle
import random
import threading

import numpy
import pytest
import torch

from dgrpo.trainer.checkpoint import Checkpointer, RunState, files, storage
from tests.trainer.checkpoint.runs import (
    assert_same,
    everything,
    make,
    saved_at,
    step_folder,
    train,
)

# Resuming


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, asynchronous):
    random.seed(1), numpy.random.seed(2)
    model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    train(model, optimizer, 3)
    scheduler.step()
    state = RunState(
        step=3,
        data={"epoch": 1, "order": (4, 2)},
        skipped=12,
        rollouts=[{"tokens": torch.arange(4), "reward": 0.1, "text": "naïve </s>"}],
    )
    checkpointer = Checkpointer(tmp_path, asynchronous=asynchronous)
    checkpointer.save(model, optimizer, state)
    rest = train(model, optimizer, 4)
    checkpointer.close()

    random.seed(5), numpy.random.seed(5)
    other, its_optimizer = make(seed=9)
    restored = Checkpointer(tmp_path).restore(other, its_optimizer)
    assert restored.shared() == state.shared()
    assert restored.rollouts[0]["tokens"].tolist() == [0, 1, 2, 3]
    assert restored.rollouts[0]["text"] == "naïve </s>"
    assert train(other, its_optimizer, 4) == rest
    assert_same(everything(other, its_optimizer), everything(model, optimizer))
    assert its_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert other.head.weight is other.embed.weight


def test_saving_before_the_first_step_changes_nothing(tmp_path):
    """torch's own get_optimizer_state_dict would take a step to make Adam's state."""
    model, optimizer = make()
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        checkpointer.save(model, optimizer, RunState())
    assert not optimizer.state
    other, its_optimizer = make(seed=3)
    train(other, its_optimizer, 2)
    assert Checkpointer(tmp_path).restore(other, its_optimizer).step == 0
    assert not its_optimizer.state
    assert_same(everything(other), everything(model))


def test_the_state_is_that_of_the_call_while_training_goes_on(tmp_path, monkeypatch):
    begin = threading.Event()
    write = files.write_tensors
    monkeypatch.setattr(files, "write_tensors", lambda *args: begin.wait(20) and write(*args))
    model, optimizer = make()
    train(model, optimizer, 1)
    expected, rollout = everything(model, optimizer), torch.zeros(2)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(model, optimizer, RunState(step=1, rollouts=[rollout]))
    train(model, optimizer, 2)
    rollout += 1
    assert checkpointer.steps() == []  # not current before it is complete
    begin.set()
    checkpointer.wait()
    other, its_optimizer = make(seed=4)
    assert checkpointer.restore(other, its_optimizer).rollouts[0].tolist() == [0, 0]
    assert_same(everything(other, its_optimizer), expected)


def test_several_optimizers_and_one_without_state(tmp_path):
    def build(seed):
        model, _ = make(seed)
        adam = torch.optim.Adam([model.embed.weight], lr=1e-2)
        return model, [adam, torch.optim.SGD(model.body.parameters(), lr=0.1)]

    model, optimizers = build(0)
    for optimizer in optimizers:
        train(model, optimizer, 2)
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        checkpointer.save(model, optimizers, RunState(step=2))
    other, others = build(1)
    Checkpointer(tmp_path).restore(other, others)
    assert_same(everything(other, *others), everything(model, *optimizers))


def test_frozen_parameters_can_stay_out(tmp_path):
    model, optimizer = make()
    with contextlib.closing(Checkpointer(tmp_path, frozen=False)) as checkpointer:
        checkpointer.save(model, optimizer, RunState(step=1))
    index = json.loads((step_folder(tmp_path, 1) / storage.INDEX).read_text())
    assert "model.body.weight" in index and "model.frozen.weight" not in index
    other, its_optimizer = make(seed=1)
    frozen = other.frozen.weight.clone()
    Checkpointer(tmp_path, frozen=False).restore(other, its_optimizer)
    assert torch.equal(other.frozen.weight, frozen)
    assert torch.equal(other.body.weight, model.body.weight)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    saved_at(tmp_path, 1)
    assert {p.suffix for p in step_folder(tmp_path, 1).iterdir()} == {".json", ".safetensors"}

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(module, name, refuse)
    assert Checkpointer(tmp_path).restore(*make()).step == 1


def test_no_checkpoint_is_none(tmp_path):
    assert Checkpointer(tmp_path / "absent").restore(*make()) is None


# Keeping


def test_the_last_ones_are_kept(tmp_path):
    saved_at(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_an_older_one_goes_only_when_the_new_one_is_complete(tmp_path, monkeypatch):
    saved_at(tmp_path, 1, keep=1)
    seen = []
    sync = files.sync_folder
    monkeypatch.setattr(
        files, "sync_folder", lambda path: (seen.append(files.complete_steps(tmp_path)), sync(path))
    )
    saved_at(tmp_path, 2, keep=1)
    assert seen == [[1], [1, 2]] and files.complete_steps(tmp_path) == [2]


def test_later_ones_are_set_aside_on_resume_and_removed_by_the_next_save(tmp_path, capsys):
    saved_at(tmp_path, 1, 2, 3)
    model, optimizer = make()
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        assert checkpointer.restore(model, optimizer, step=1).step == 1
        assert "later steps [2, 3]" in capsys.readouterr().out
        assert checkpointer.steps() == [1]
        train(model, optimizer, 1)
        checkpointer.save(model, optimizer, RunState(step=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
