"""Resuming on another number of ranks, and errors of one rank that reach all."""

import contextlib
import random
import resource

import numpy
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from dgrpo.distributed import make_mesh
from dgrpo.trainer.checkpoint import Checkpointer, CheckpointError, RunState, export, files
from dgrpo.trainer.checkpoint.state import share
from tests.trainer.checkpoint.runs import assert_same, everything, make, step_folder, train
from tests.trainer.checkpoint.test_export import logits, policy_of, tiny_llama


def on_ranks(count, work, *args, tmp_path, monkeypatch):
    """Runs `work(rank, *args)` on `count` gloo ranks."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    store = tmp_path / f"store-{count}"
    torch.multiprocessing.spawn(_rank, (count, str(store), work, args), nprocs=count)


def _rank(rank, count, store, work, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    try:
        work(rank, *args)
    finally:
        dist.destroy_process_group()


def check_two_ranks(rank, folder):
    # 1 → 2: what one process saved
    model, optimizer = make(seed=rank + 20, shard=True)
    checkpointer = Checkpointer(folder / "one")
    state = checkpointer.restore(model, optimizer)
    assert_same(everything(model, optimizer), load_file(folder / "one.safetensors"))
    assert [entry["id"] for entry in state.rollouts] == ([0, 1] if rank == 0 else [2, 3, 4])
    draws: list = [None, None]
    dist.all_gather_object(draws, (random.random(), numpy.random.rand(), torch.rand(()).item()))
    assert all(a != b for a, b in zip(*draws, strict=True))  # the new rank has numbers of its own

    # A new run on two ranks, saved while training goes on
    files.PART = 400  # several files per rank
    checkpointer = Checkpointer(folder / "two", keep=5)
    train(model, optimizer, 2)
    rollouts = [{"id": 10 * rank + i} for i in range(3)]
    checkpointer.save(model, optimizer, RunState(step=4, rollouts=rollouts))
    expected = everything(model, optimizer)
    if rank == 0:
        save_file(expected, folder / "two.safetensors")
    losses = train(model, optimizer, 2)

    # The same number of ranks: bitwise, each its own random numbers and rollouts
    other, its_optimizer = make(seed=5, shard=True)
    state = checkpointer.restore(other, its_optimizer)
    assert state.rollouts == rollouts
    assert_same(everything(other, its_optimizer), expected)
    assert train(other, its_optimizer, 2) == losses

    # One rank fails, and both hear of it: on writing, and before
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))
    expect(
        lambda: (checkpointer.save(model, optimizer, RunState(step=6)), checkpointer.wait()),
        "rank 1: .*step-00000006.tmp/rank-00001.json",
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    broken = RunState(step=6, rollouts=[object()] if rank == 1 else [])
    expect(
        lambda: (checkpointer.save(model, optimizer, broken), checkpointer.wait()),
        "rank 1: TypeError: state: got <object object at .*> of type object",
    )
    checkpointer.save(model, optimizer, RunState(step=6))
    checkpointer.wait()
    assert checkpointer.steps() == [4, 6]

    # A missing rank
    missing = step_folder(folder / "two", 6) / "tensors-00001-00000.safetensors"
    if rank == 0:
        missing.unlink()
    dist.barrier()
    expect(lambda: checkpointer.restore(other, its_optimizer, step=6), f"{missing}: No such file")
    assert checkpointer.restore(other, its_optimizer).step == 4
    if rank == 1:
        other.body = nn.Linear(6, 6)
    expect(lambda: checkpointer.restore(other, its_optimizer), "rank 1: ")
    checkpointer.close()

    # Export of a sharded model, and one that rank 0 cannot write
    from dgrpo.trainer.policy import fsdp

    policy = policy_of(tiny_llama())
    fsdp.shard(policy, make_mesh(torch.device("cpu")))
    export(policy, folder / "exported")
    if rank == 0:
        (folder / "file").touch()
    dist.barrier()
    expect(lambda: export(policy, folder / "file/below"), "export to .*file/below: ")


def expect(call, pattern):
    with pytest.raises(CheckpointError, match=pattern):
        call()


def check_four_ranks(rank, folder):
    model, optimizer = make(seed=rank + 30, shard=True)
    state = Checkpointer(folder / "two").restore(model, optimizer)
    assert_same(everything(model, optimizer), load_file(folder / "two.safetensors"))
    ids = [0, 1, 2, 10, 11, 12]
    assert [entry["id"] for entry in state.rollouts] == share(ids, rank, 4)


def test_another_number_of_ranks(tmp_path, monkeypatch):
    """1 → 2 → 1, 2 → 4: parameters and optimiser state are equal, and errors reach every rank."""
    model, optimizer = make()
    train(model, optimizer, 2)
    with contextlib.closing(Checkpointer(tmp_path / "one")) as checkpointer:
        checkpointer.save(
            model, optimizer, RunState(step=2, rollouts=[{"id": i} for i in range(5)])
        )
    save_file(everything(model, optimizer), tmp_path / "one.safetensors")
    on_ranks(2, check_two_ranks, tmp_path, tmp_path=tmp_path, monkeypatch=monkeypatch)

    other, its_optimizer = make(seed=6)
    state = Checkpointer(tmp_path / "two").restore(other, its_optimizer)
    assert_same(everything(other, its_optimizer), load_file(tmp_path / "two.safetensors"))
    assert [entry["id"] for entry in state.rollouts] == [0, 1, 2, 10, 11, 12]
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(logits(exported), logits(tiny_llama()))
    on_ranks(4, check_four_ranks, tmp_path, tmp_path=tmp_path, monkeypatch=monkeypatch)
