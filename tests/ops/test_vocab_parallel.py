"""Vocabulary-parallel heads on 2 and 4 gloo ranks against one process.

All cases of a world size run in one group of processes; `shard_runs.py` is what they run.
"""

import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessException

from tests.ops import shard_runs

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def run(world, folder, limit=240):
    """Each rank's {case: traceback or None}."""
    context = mp.start_processes(
        shard_runs.worker,
        args=(world, str(folder)),
        nprocs=world,
        join=False,
        start_method="spawn",
    )
    end = time.monotonic() + limit
    try:
        while time.monotonic() < end and not context.join(timeout=5):
            pass
    except ProcessException as error:
        print(error)  # what the ranks saved says more
    finally:
        for process in context.processes:
            process.kill()
    files = [folder / f"{rank}.pt" for rank in range(world)]
    return [torch.load(file) if file.exists() else {} for file in files]


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def results(request, tmp_path_factory):
    return run(request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", shard_runs.CASES)
def test_sharded(results, name):
    for rank, found in enumerate(results):
        assert name in found, f"rank {rank} never came to it: an earlier case hung"
        assert found[name] is None, f"rank {rank}:\n{found[name]}"
