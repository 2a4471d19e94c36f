"""A vocabulary split over ranks: agreement before a call, and merging the shards' statistics.

With pi_r, kappa_r the student's and teacher's mass on shard r, the chain rule gives

    Ent = sum_r pi_r (Ent_r - log pi_r)      KL = sum_r pi_r (KL_r + log pi_r - log kappa_r)

Merging is in rank order on every rank alike, so all hold the same bits. Without a group there is
one shard, and each of its methods leaves everything as it is.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dgrpo.distributed import place_in
from dgrpo.ops.checks import IGNORE, check_vocabulary
from dgrpo.ops.options import Options
from dgrpo_kernels.rows import FLOOR, RowStats


class Shard(NamedTuple):
    """This rank's columns `[start, stop)` of a vocabulary of `total` columns over `group`."""

    group: dist.ProcessGroup | None  # None = the whole vocabulary is here
    start: int
    stop: int
    total: int
    widest: int  # columns of the largest shard

    @classmethod
    def whole(cls, columns: int, options: Options) -> Shard:
        """All compared columns of a head of `columns`; with a group, `agree` says what is here."""
        if options.group is None:
            columns = check_vocabulary(columns, _teacher_columns(options), options.vocab_size)
        return cls(None, 0, columns, columns, columns)

    @property
    def columns(self) -> int:
        return self.stop - self.start

    @property
    def missing(self) -> float:
        """What the log-probability of a target outside the shard reads."""
        return float("nan") if self.group is None else -float("inf")

    def fits(self, weight: Tensor, teacher_weight: Tensor, options: Options) -> None:
        """Raise for a teacher's gathered head of another vocabulary (sharded: `agree` knows)."""
        if self.group is None:
            check_vocabulary(len(weight), len(teacher_weight), options.vocab_size)

    def local_ids(self, ids: Tensor) -> Tensor:
        """Ids of the whole vocabulary counted from this shard's start, -1 where not on it."""
        ids = torch.where(ids < 0, ids, ids - self.start)
        return torch.where((ids >= 0) & (ids < self.columns), ids, -1)

    def held(self, values: Tensor, ids: Tensor | None = None) -> Tensor:
        """Values that one shard holds, and the others as -inf (those whose `ids` are elsewhere)."""
        if self.group is None:
            return values
        if ids is not None:
            values = values.masked_fill((ids < 0) | (ids >= self.columns), -torch.inf)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def summed(self, values: Tensor) -> Tensor:
        """The sum of all shards' values, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def merge_stats(self, stats: Tensor, divergence: str, known: Tensor, teacher: bool) -> None:
        """Replace this shard's statistics, an (11, R) view, by those of the whole row.

        One all-gather. known: (R,) bool, the target lies in the vocabulary; elsewhere its
        log-probability becomes NaN. teacher: there are a teacher's logits; else its rows stay 0.
        """
        if self.group is not None:
            _merge_stats(stats, self.group, divergence, known, teacher)

    def add_divergence(self, stats: Tensor) -> None:
        """Sum the shards' `divergence` and `aux` in rank order. One all-gather."""
        if self.group is None:
            return
        out = RowStats(*stats.unbind(0))
        both = gather(torch.stack([out.divergence, out.aux]), self.group)
        total = both[0].clone()
        for part in both[1:]:
            total += part
        out.divergence.copy_(total[0])
        out.aux.copy_(total[1])


@contextmanager
def agreed(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Run checks so that an error on one rank raises on all of the group: none waits for another.

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
            f"group: got arguments that raised on its rank {failed[0]}, expected good ones on all "
            "ranks; see that rank's error"
        )


def agree(weight: Tensor, targets: Tensor, options: Options, need: tuple[bool, ...]) -> Shard:
    """This rank's shard; what does not fit raises on all ranks.

    One all-gather and two host syncs. Tokens, and what decides how a call runs, must be the same
    everywhere: rows are replicated over the group.
    """
    group, start, vocab_size = options.group, options.vocab_start, options.vocab_size
    teacher = _teacher_columns(options)
    facts = [
        -1 if start is None else start,
        len(weight),
        -1 if teacher is None else teacher,
        targets.numel(),
        zlib.crc32(_settings(weight, targets, options, need).encode()),
    ]
    everyone = gather(torch.tensor(facts, dtype=torch.int64, device=weight.device), group).tolist()
    rank, _ = place_in(group)
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
    return Shard(group, starts[rank], stop, total, widest)


def _settings(weight: Tensor, targets: Tensor, options: Options, need: tuple[bool, ...]) -> str:
    """All that must be equal on the ranks of a group, or one would wait for another. One sync."""
    given, teacher = options.rows, options.teacher
    unmasked = len(given) if given is not None else int((targets != IGNORE).sum())
    kinds = (teacher and teacher.kind(), options.divergence, options.policy_logits)
    numbers = (options.memory_budget, options.vocab_size, options.check, weight.shape[1], unmasked)
    return repr((kinds, numbers, weight.dtype, need))


def _teacher_columns(options: Options) -> int | None:
    return None if options.teacher is None else options.teacher.columns


def local_part(weight: Tensor) -> Tensor:
    """A `Shard(0)` DTensor's own rows; gradients flow back into it."""
    from torch.distributed.tensor import Shard as ShardPlacement

    if tuple(weight.placements) != (ShardPlacement(0),):
        raise TypeError(
            f"weight: got a DTensor placed {weight.placements}, expected (Shard(0),) with group="
        )
    return weight.to_local()


def gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' `values`, stacked in rank order on a new first dimension."""
    values = values.contiguous()
    out = values.new_empty(place_in(group)[1], *values.shape)
    dist.all_gather_into_tensor(out.flatten(0, 1) if values.dim() else out, values, group=group)
    return out


def _mix(tops: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shards' (max, log-sum), each (W, R), into one, and each shard's log-mass (W, R)."""
    tops = tops.masked_fill(log_sums == -torch.inf, -torch.inf)
    top = tops.amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    masses = (tops - top) + log_sums
    log_sum = masses.logsumexp(0)
    return top, log_sum, (masses - log_sum).nan_to_num(nan=-torch.inf, neginf=-torch.inf)


def _merge_stats(
    stats: Tensor, group: dist.ProcessGroup, divergence: str, known: Tensor, teacher: bool
) -> None:
    each = RowStats(*gather(stats, group).unbind(1))
    out = RowStats(*stats.unbind(0))
    max_z, log_sum_z, log_p = _mix(each.max_z, each.log_sum_z)
    max_b, log_sum_b, log_b = _mix(each.policy_max, each.policy_log_sum)
    p = log_p.exp()
    logprobs = _merge_logprobs(each.logprobs, each.policy_log_sum, log_b)
    out.entropy.copy_((p * (each.entropy - log_p)).where(p > 0, 0).sum(0))
    out.max_z.copy_(max_z)
    out.log_sum_z.copy_(log_sum_z)
    out.policy_max.copy_(max_b)
    out.policy_log_sum.copy_(log_sum_b)
    out.logprobs.copy_(logprobs.where(known, torch.nan))
    if not teacher:
        return
    max_t, log_sum_t, log_q = _mix(each.max_t, each.log_sum_t)
    q = log_q.exp()
    out.max_t.copy_(max_t)
    out.log_sum_t.copy_(log_sum_t)
    own = _merge_logprobs(each.teacher_logprobs, each.log_sum_t, log_q)
    out.teacher_logprobs.copy_(own.where(known, torch.nan))
    if divergence == "reverse_kl":
        kl = each.divergence + log_p - log_q
        held = log_p - each.entropy + log_sum_t - FLOOR  # the teacher forbids all of the shard
        kl = held.where(each.log_sum_t == -torch.inf, kl)
        out.divergence.copy_((p * kl).where(p > 0, 0).sum(0))
    elif divergence == "forward_kl":
        kl = each.divergence + log_q - log_p
        kl = kl.masked_fill(each.log_sum_z == -torch.inf, torch.inf)  # the student forbids it
        out.divergence.copy_((q * kl).where(q > 0, 0).sum(0))


def _merge_logprobs(each: Tensor, log_sums: Tensor, log_masses: Tensor) -> Tensor:
    """(W, R) log-probabilities within shards, -inf where the target is elsewhere, into (R,)."""
    whole = (each + log_masses).masked_fill(log_sums == -torch.inf, -torch.inf)
    return whole.amax(0)
