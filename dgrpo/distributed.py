"""Where this process stands among the ranks, and the one sum over them that a step needs.

Everything works without `torch.distributed` initialised: one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")


class FirstRankFailed(ValueError):
    """What rank 0 does for all of them failed there; its own error says why."""


def rank() -> int:
    """This process's rank, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of ranks, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def totals(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value summed over the ranks, in fp64. COLLECTIVE; a sync. NaN and infinity spread."""
    if world() == 1:
        return [float(value) for value in values]
    summed = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.tolist()


def first(call: Callable[[], _T]) -> _T | None:
    """`call()` on rank 0, None elsewhere. COLLECTIVE.

    Raises what it raises, and there `FirstRankFailed` on the other ranks.
    """
    value, error = None, None
    if rank() == 0:
        try:
            value = call()
        except Exception as caught:
            error = caught
    if world() > 1:
        told = [None if error is None else str(error)]
        dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        if rank() and told[0] is not None:
            raise FirstRankFailed(told[0])
    if error is not None:
        raise error
    return value


def wait() -> None:
    """Waits for all ranks."""
    if world() > 1:
        dist.barrier()


def leave() -> None:
    """Ends this process's part in torch.distributed, where it has one."""
    if dist.is_initialized():
        dist.destroy_process_group()
