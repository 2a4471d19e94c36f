"""What the ranks of a vocabulary-parallel call tell each other before its first real collective."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from dgrpo.ops.shards import Shard, gather


@contextmanager
def agreed(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Run checks so that an error on one rank raises on all of the group: nobody waits for it.

    One all-gather of a flag and one host sync; without a group, nothing.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as problem:
        if group is None:
            raise
        error = problem
    if group is None:
        return
    cuda = dist.get_backend(group) == "nccl"
    flag = torch.tensor([error is not None], device="cuda" if cuda else "cpu", dtype=torch.int64)
    failed = [rank for rank, (bad,) in enumerate(gather(flag, group).tolist()) if bad]
    if error is not None:
        raise error
    if failed:
        raise ValueError(
            f"group: got arguments that rank {failed[0]} of it refused, expected good ones on all "
            "ranks; see that rank's error"
        )


def agree(
    group: dist.ProcessGroup,
    device: torch.device,
    *,
    start: int | None,
    columns: int,
    teacher_columns: int | None,
    vocab_size: int | None,
    tokens: int,
    settings: str,
) -> tuple[Shard, int]:
    """This rank's shard and its number of compared columns; what does not fit raises on all ranks.

    One all-gather and one host sync. `tokens` and `settings` must be the same everywhere: rows are
    replicated over the group.
    """
    digest = zlib.crc32(settings.encode())
    teacher = -1 if teacher_columns is None else teacher_columns
    facts = [-1 if start is None else start, columns, teacher, tokens, digest]
    everyone = gather(torch.tensor(facts, dtype=torch.int64, device=device), group).tolist()
    rank = dist.get_rank(group)
    begin = 0
    for other, (given, width, teacher_width, count, other_digest) in enumerate(everyone):
        if given not in (-1, begin):
            raise ValueError(
                f"vocab_start: got {given} on rank {other} of the group, expected {begin}, since "
                "shards follow each other in rank order"
            )
        last = other == len(everyone) - 1
        if teacher_width not in (-1, width) and not (last and vocab_size is not None):
            raise ValueError(
                f"teacher.weight: got a shard of {teacher_width} columns on rank {other} of the "
                f"group, expected {width}; student and teacher shard on equal boundaries"
            )
        if (count, other_digest) != tuple(everyone[0][3:]):
            raise ValueError(
                f"group: got other tokens or options on rank {other} than on rank 0, expected the "
                "same rows and settings on all ranks of a vocabulary-parallel group"
            )
        begin += width
    starts = [sum(fact[1] for fact in everyone[:other]) for other in range(len(everyone) + 1)]
    total = starts[-1] if vocab_size is None else vocab_size
    if total > starts[-1]:
        raise ValueError(f"vocab_size: got {vocab_size}, expected at most {starts[-1]}")
    if total <= starts[-2]:
        raise ValueError(
            f"vocab_size: got {vocab_size}, expected more than {starts[-2]}, so that each shard "
            "keeps a column"
        )
    stop = min(starts[rank + 1], total)
    widest = max(fact[1] for fact in everyone)
    return Shard(group, starts[rank], stop, total, widest), stop - starts[rank]


def local_part(weight: Tensor) -> Tensor:
    """A `Shard(0)` DTensor's own rows; gradients flow back into it."""
    from torch.distributed.tensor import Shard as ShardPlacement

    if tuple(weight.placements) != (ShardPlacement(0),):
        raise TypeError(
            f"weight: got a DTensor placed {weight.placements}, expected (Shard(0),) with group="
        )
    return weight.to_local()
