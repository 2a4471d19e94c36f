"""A rank of `test_vocab_parallel.py`: runs every case of `shard_cases.py` and `shard_edges.py`."""

from __future__ import annotations

import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from tests.ops import shard_cases, shard_edges
from tests.ops.cases import case_of, fp64
from tests.ops.shard_cases import BOUNDS, Ranks

CASES = {**shard_cases.CASES, **shard_edges.CASES}


def worker(rank: int, world: int, folder: str) -> None:
    """Runs every case and saves {case: traceback or None}; the first deadlock ends it."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    ranks = Ranks(dist.group.WORLD, fp64(case_of(24)), rank, BOUNDS[world])
    found: dict[str, str | None] = {}
    for name, case in CASES.items():
        try:
            case(ranks)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
        torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
