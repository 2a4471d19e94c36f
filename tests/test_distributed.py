"""Where a process stands among the ranks, and that nothing else in the trainer asks for it."""

import ast
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dgrpo.distributed import FirstRankFailed, Ranks, leave, make_mesh, ranks, start

DGRPO = Path(__file__).parent.parent / "dgrpo"
# Of torch.distributed: who asks it for ranks or sums has another notion of them than `Ranks`.
OURS = {"get_rank", "get_world_size", "is_initialized", "all_reduce", "all_gather_object"}


def failing():
    raise OSError("no disk")


def check_alone(found):
    assert (found.rank, found.world, found.data_rank, found.data_world) == (0, 1, 0, 1)
    assert found.first
    assert found.totals([2, math.inf]) == [2.0, math.inf] and found.maxima([3]) == [3]
    assert found.gather("here") == ["here"] and found.apart(timedelta(hours=1)) is found
    assert found.only_first(lambda: "done") == "done"
    with pytest.raises(OSError, match="no disk"):
        found.only_first(failing)


def test_without_a_process_group_there_is_one_rank():
    assert ranks() == Ranks()
    check_alone(ranks())


def test_one_process_can_start_too(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    try:
        device = start("cpu")
        assert start("cpu") == device == torch.device("cpu")  # a second call changes nothing
        assert ranks().mesh.mesh_dim_names == ("shard",)
        check_alone(ranks())
        with pytest.raises(ValueError, match="replicas: got 2, expected a divisor of the 1 ranks"):
            make_mesh(device, replicas=2)
        with pytest.raises(ValueError, match="device: got 'tpu'"):
            start("tpu")
    finally:
        leave()
    assert ranks() == Ranks()


def _rank(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for replicas, shape in ((None, None), (1, (2,)), (2, (2, 1))):
        if replicas is not None:
            start("cpu", replicas)
        found = ranks()
        assert (found.rank, found.world) == (found.data_rank, found.data_world) == (rank, 2)
        assert found.first == (rank == 0)
        assert shape is None or tuple(found.mesh.shape) == shape
        assert found.totals([0.1 * rank, 1]) == [0.1, 2.0]
        assert math.isnan(found.totals([math.nan if rank else 1.0])[0])
        assert found.maxima([rank, 5 - rank]) == [1, 5]
        for group in (found, found.apart(timedelta(minutes=1))):
            assert group.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
        assert found.only_first(lambda: 3) == (None if rank else 3)
        with pytest.raises(FirstRankFailed if rank else OSError, match="no disk"):
            found.only_first(failing)
    leave()


def test_two_ranks_sum_and_gather(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"),), nprocs=2)


def asked(source):
    """The functions of torch.distributed about ranks and sums that a module calls."""
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return {f.attr for f in calls if isinstance(f, ast.Attribute) and f.attr in OURS}


def test_nothing_else_asks_torch_for_ranks():
    others = [
        path
        for path in DGRPO.rglob("*.py")
        if path.name != "distributed.py" and DGRPO / "ops" not in path.parents
    ]
    assert others and not {
        str(path): found for path in others if (found := asked(path.read_text()))
    }
    assert asked((DGRPO / "distributed.py").read_text())
    assert asked("import torch.distributed as dist\nrank = dist.get_rank()") == {"get_rank"}
