"""A vocabulary split over ranks: merging the shards' statistics, and the agreement before a call.

With pi_r, kappa_r the student's and teacher's mass on shard r, the chain rule gives

    Ent = sum_r pi_r (Ent_r - log pi_r)      KL = sum_r pi_r (KL_r + log pi_r - log kappa_r)

Merging is in rank order on every rank alike, so all hold the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dgrpo_kernels.rows import FLOOR, RowStats


class Shard(NamedTuple):
    """This rank's columns `[start, stop)` of a vocabulary of `total` columns over `group`."""

    group: dist.ProcessGroup
    start: int
    stop: int
    total: int
    widest: int  # columns of the largest shard


def gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' `values`, stacked in rank order on a new first dimension."""
    values = values.contiguous()
    out = values.new_empty(dist.get_world_size(group), *values.shape)
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


def merge_stats(stats: Tensor, shard: Shard, divergence: str, known: Tensor, teacher: bool) -> None:
    """Replace this shard's statistics, an (11, R) view, by those of the whole row.

    One all-gather. known: (R,) bool, the target lies in the vocabulary; elsewhere its
    log-probability becomes NaN. teacher: there are a teacher's logits; without, its rows stay 0.
    """
    each = RowStats(*gather(stats, shard.group).unbind(1))
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


def add_divergence(stats: Tensor, shard: Shard) -> None:
    """Sum the shards' `divergence` and `aux` in rank order. One all-gather."""
    out = RowStats(*stats.unbind(0))
    both = gather(torch.stack([out.divergence, out.aux]), shard.group)
    total = both[0].clone()
    for part in both[1:]:
        total += part
    out.divergence.copy_(total[0])
    out.aux.copy_(total[1])
