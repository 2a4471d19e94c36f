"""The whole trainer on two gloo ranks: the steps of one process, and a change of their number."""

import multiprocessing
import os
import socket

import pytest

from dgrpo.trainer import train
from dgrpo.trainer.config import validate
from tests.trainer.home import make_home, metrics, settings  # noqa: F401

RANKS = 2


IN_FLIGHT = {"batch": {"prompts": 4, "updates": 2, "tokens": 64}, "checkpoint": {"every": 1}}
CASES = {
    # uneven: rank 0 has two prompts and rank 1 one, and other numbers of micro-batches
    "uneven": ("dgrpo", {"batch": {"prompts": 3, "tokens": 48}}),
    "gspo": ("dgrpo", {"method": {"objective": "gspo"}, "batch": {"prompts": 4, "updates": 2}}),
    "ssopd": ("ssopd", {}),
    "muon": ("sft", {"batch": {"prompts": 5}, "optimizer": {"kind": "muon", "lr": 1e-3}}),
    "in_flight": ("dgrpo", {**IN_FLIGHT, "steps": 3}),  # ends within a batch of rollouts
}


def case(home, out, name):
    """The settings of a case, in the folder of its name."""
    preset, groups = CASES[name]
    if name == "uneven":
        held_out = {"sources": [{"path": str(home / "rows.jsonl")}], "count": 3}
        groups = {**groups, "evaluate": held_out}
    return settings(home, out / name, preset, **groups)


def one_rank(rank, port, wanted):
    """What torchrun starts, for one run after the other."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for one in wanted:
        train(one)


@pytest.fixture(scope="module")
def on_ranks(home, tmp_path_factory):
    """The folder in which all cases were trained on two ranks."""
    out = tmp_path_factory.mktemp("ranks")
    wanted = [case(home, out, name) for name in CASES]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dgrpo.trainer"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = [context.Process(target=one_rank, args=(r, port, wanted)) for r in range(RANKS)]
    for process in group:
        process.start()
    for process in group:
        process.join(240)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in group] == [0] * RANKS
    return out


def assert_alike(ours, theirs, rel=1e-4):
    """The same metrics up to rounding, step by step."""
    assert len(ours) == len(theirs)
    for line, other in zip(ours, theirs, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            close = {"sampler_mismatch": 1e-5, "sampler_mismatch_max": 1e-5}.get(name, 1e-6)
            assert value == pytest.approx(other[name], rel=rel, abs=close), name


@pytest.mark.parametrize("name", ["uneven", "gspo", "ssopd", "muon"])
def test_two_ranks_take_the_steps_of_one(home, on_ranks, tmp_path, name):
    train(case(home, tmp_path, name))
    rel = 2e-3 if name == "muon" else 1e-4  # Muon's iteration runs in bfloat16
    assert_alike(metrics(on_ranks / name), metrics(tmp_path / name), rel)


def test_a_run_goes_on_with_fewer_ranks(home, on_ranks, tmp_path):
    whole = validate({**case(home, tmp_path, "in_flight").model_dump(), "steps": 4})
    train(whole)
    train(validate({**whole.model_dump(), "out": str(on_ranks / "in_flight")}))
    assert_alike(metrics(on_ranks / "in_flight"), metrics(tmp_path / "in_flight"))
