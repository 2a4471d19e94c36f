"""The divergence to a top-k teacher: K columns and one bucket for all others.

    u_b = log-mass of bucket b;  D over the buckets' p and q;  dD/dz_v = p_v (r_b(v) - mean r)

A bucket without columns takes no part; one whose columns the student forbids has p = 0. (R, K)
arithmetic in torch: the kernels see the row with the K columns taken out, and get back three
numbers a row for the tail (see `RowStats`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dgrpo_kernels.rows import FLOOR, Logits, RowStats

LEAST_TAIL = 1e-7  # the teacher's tail mass is never taken as less


class TopKRows(NamedTuple):
    """A part's top-k columns. All (R, K)."""

    ids: Tensor  # of this shard, -1 = absent
    logprobs: Tensor  # of the student
    slope: Tensor  # dD/dz
    chain: Tensor  # d logit / d raw
    policy_probs: Tensor  # of the student, as the policy term sees it
    policy_chain: Tensor


def _logits(raw: Tensor, at: Logits) -> tuple[Tensor, Tensor]:
    """Logits of raw values (bias added) and their slope; -inf stays, with slope 0."""
    absent = raw == -torch.inf
    x = raw.masked_fill(absent, 0) * at.scale
    slope = torch.full_like(x, at.scale / at.temperature)
    if at.softcap is not None:
        bent = torch.tanh(x / at.softcap)
        x, slope = at.softcap * bent, slope * (1 - bent * bent)
    return (x / at.temperature).masked_fill(absent, -torch.inf), slope.masked_fill(absent, 0)


def _merge(top: Tensor, log_sum: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tail and columns into one row: (max, log-sum), log-mass of the tail, log p of the columns."""
    top = top.masked_fill(log_sum == -torch.inf, -torch.inf)
    best = torch.maximum(top, columns.amax(-1)) if columns.shape[1] else top
    masses = torch.cat([((top - best) + log_sum)[:, None], columns - best[:, None]], 1)
    masses = masses.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    total = masses.logsumexp(1)
    masses = masses - total[:, None]
    return best, total, masses[:, 0], masses[:, 1:]


def tail_logprob(logprobs: Tensor) -> Tensor:
    """log(1 - sum of a teacher's top-k probabilities), (R,) fp64: fp32 would lose a small tail."""
    return torch.log1p(-logprobs.double().exp().sum(1).clamp(max=1 - LEAST_TAIL))


def merge_topk(
    z: Logits,
    taken: Tensor,
    ids: Tensor,
    target_raw: Tensor,
    targets_known: Tensor,
    teacher_logprobs: Tensor,
    has_tail: Tensor,
    stats: Tensor,
    *,
    divergence: str,
    divergence_clip: float | None,
    jsd_beta: float,
    round_policy: bool,
) -> TopKRows:
    """Finish `stats` (11, R), measured over the tail, with the K columns; returns those columns.

    taken: (R, K) raw student logits of the columns, -inf where absent. target_raw: (R,) raw logit
    of the target. targets_known: (R,) bool, in the vocabulary. teacher_logprobs: (R, K), -inf where
    absent; the same on all shards. has_tail: (R,) bool, the vocabulary has more columns.
    """
    out = RowStats(*stats.unbind(0))
    columns, chain = _logits(taken, z)
    target = _logits(target_raw[:, None], z)[0][:, 0]
    tail_entropy = out.entropy.clone()
    top, log_sum, tail, lp = _merge(out.max_z, out.log_sum_z, columns)
    lq = teacher_logprobs.to(lp.dtype)
    rest = tail_logprob(teacher_logprobs).to(lp.dtype).masked_fill(~has_tail, -torch.inf)
    buckets = torch.cat([tail[:, None], lp], 1), torch.cat([rest[:, None], lq], 1)
    value, slope, aux, log_q = _bucket_divergence(*buckets, divergence, divergence_clip, jsd_beta)
    own = lp.masked_fill(lp == -torch.inf, 0)
    entropy = tail.exp() * (tail_entropy - tail).nan_to_num(posinf=0.0) - (lp.exp() * own).sum(1)
    policy_top, policy_sum, policy, policy_chain = top, log_sum, lp, chain
    if round_policy:
        coarse = Logits(taken, None, z.scale, z.softcap, z.temperature)
        columns, policy_chain = _logits(taken.bfloat16().to(taken.dtype), coarse)
        target = _logits(target_raw.bfloat16().to(taken.dtype)[:, None], coarse)[0][:, 0]
        policy_top, policy_sum, _, policy = _merge(out.policy_max, out.policy_log_sum, columns)
    gone = (log_q == -torch.inf) | (out.log_sum_z == -torch.inf)
    out.max_t.copy_(out.max_z)
    out.log_sum_t.copy_((out.log_sum_z - log_q).masked_fill(gone, torch.inf))
    out.max_z.copy_(top)
    out.log_sum_z.copy_(log_sum)
    out.policy_max.copy_(policy_top)
    out.policy_log_sum.copy_(policy_sum)
    out.logprobs.copy_(((target - policy_top) - policy_sum).where(targets_known, torch.nan))
    out.entropy.copy_(entropy)
    out.divergence.copy_(value)
    out.aux.copy_(aux)
    return TopKRows(ids, lp, slope, chain, policy.exp(), policy_chain)


def _bucket_divergence(
    lp: Tensor, lq: Tensor, divergence: str, clip: float | None, jsd_beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """D (R,), dD/dz of the K columns (R, K), the tail's aux and log q (R,). Bucket 0 is the tail.

    Both masses are -inf where a bucket has no columns, lp alone where the student forbids them.
    """
    p, q = lp.exp(), lq.exp()
    tail, lq = lq[:, 0], lq.clamp(min=FLOOR)
    nothing = torch.full_like(tail, -torch.inf)
    if divergence in ("forward_kl", "clipped_forward_kl"):
        term = (q * (lq - lp)).masked_fill(q == 0, 0)  # inf where p alone is 0
        kept = torch.ones_like(q, dtype=torch.bool)
        if divergence == "clipped_forward_kl":
            kept = term < clip
            term = term.clamp(max=clip)
        q = q.where(kept, 0)
        mass = q.sum(1)
        slope = p[:, 1:] * mass[:, None] - q[:, 1:]
        return term.sum(1), slope, mass, tail.where(kept[:, 0], nothing)
    lp = lp.masked_fill(lp == -torch.inf, 0)  # p is 0 there
    if divergence == "reverse_kl":
        r = lp - lq
        value = (p * r).sum(1)
        return value, p[:, 1:] * (r[:, 1:] - value[:, None]), r[:, 0] - value, nothing
    if divergence == "jsd":
        parts = torch.tensor([1 - jsd_beta, jsd_beta], dtype=torch.float64).log().tolist()
        student = lp.masked_fill(p == 0, -torch.inf) + parts[0]
        teacher = lq.masked_fill(q == 0, -torch.inf) + parts[1]
        mix = torch.logaddexp(student, teacher).masked_fill((p == 0) & (q == 0), 0)
        r = lp - mix
        to_student = (p * r).sum(1)
        to_teacher = (q * (lq - mix)).sum(1)
        value = jsd_beta * to_teacher + (1 - jsd_beta) * to_student
        r = (1 - jsd_beta) * (r - to_student[:, None])
        return value, p[:, 1:] * r[:, 1:], r[:, 0], nothing


def topk_grad(rows: TopKRows, targets: Tensor, entropy: Tensor, coef: Tensor) -> Tensor:
    """dL/draw of the K columns, (R, K), from (3, R) coefficients a, b, c."""
    a, b, c = coef[:, :, None].unbind(0)
    here = (rows.ids == targets[:, None]).to(entropy.dtype)
    p = rows.logprobs.exp()
    own = rows.logprobs.masked_fill(p == 0, 0)
    g = (b * rows.slope).masked_fill(b == 0, 0)
    g = g - (c * p * (own + entropy[:, None])).masked_fill(c == 0, 0)
    policy = (a * (here - rows.policy_probs)).masked_fill(a == 0, 0)
    return g * rows.chain + policy * rows.policy_chain
