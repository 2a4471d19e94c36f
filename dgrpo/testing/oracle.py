"""The fp64 oracle of the loss head: materialised logits, plain formulas, autograd's gradients.

Shares no code with the library, and keeps several (N, V) fp64 tensors. N tokens, R unmasked
tokens, V vocabulary, H student width, K top-k.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # the target of a token without loss
LOG_RATIO_LIMIT = 20.0  # nats
TAIL_FLOOR = 1e-7  # least probability of a top-k teacher's tail bucket
ABSENT = -1e9  # log-probability of a bucket that is not there: its exp is 0 in fp64
TEACHER_FLOOR = -1e6  # nats below its peak at which a teacher's logit counts in a divergence


class OracleStats(NamedTuple):
    """Per-token statistics, (N,) fp64; the first three differentiable, all 0 where masked."""

    logprobs: Tensor
    divergence: Tensor
    entropy: Tensor
    teacher_logprobs: Tensor


class OracleOutput(NamedTuple):
    """A loss, its per-token statistics (like targets, 0 where masked) and its gradients; fp64."""

    loss: Tensor
    logprobs: Tensor
    teacher_logprobs: Tensor
    divergence: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor  # bool: the clip stops the policy gradient
    clamped: Tensor  # bool: the log-ratio lies beyond 20 nats
    d_hidden: Tensor  # shaped like hidden
    d_weight: Tensor  # (V, H)
    d_bias: Tensor | None  # (V,)


def oracle(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    policy_weights: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    is_cap: float | None = None,
    token_weights: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_dual: float | None = None,
    teacher_coef: float | Tensor = 0.5,
    ref_coef: float = 0.0,
    entropy_coef: float = 0.0,
    **head: Any,
) -> OracleOutput:
    """`dgrpo.linear_dgrpo_loss` and its gradients in fp64; arguments as there.

    hidden (..., H) and weight (V, H) of any float dtype; targets and every per-token tensor (...);
    head: those of `oracle_stats`.

        loss = Σ_n w (-u min(ρA, clip(ρ) A) + β D + β_ref k3(logp, ref_logp) - c_E Ent)
    """
    if policy_weights is not None and sampler_logprobs is not None:
        raise ValueError("sampler_logprobs: got both this and policy_weights, expected one of them")
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    flat = leaves[0].reshape(-1, leaves[0].shape[-1])
    leaf_bias = leaves[2] if bias is not None else None
    stats = oracle_stats(flat, leaves[1], targets.reshape(-1), bias=leaf_bias, **head)

    keep = targets.reshape(-1) != IGNORED
    rows = keep.nonzero()[:, 0]

    def at(values: float | Tensor) -> Tensor:
        """A per-token argument at the unmasked tokens, (R,) fp64."""
        values = torch.as_tensor(values, dtype=torch.float64, device=rows.device)
        return values.expand(targets.shape).reshape(-1)[rows]

    logp, divergence, entropy = (field[rows] for field in stats[:3])
    advantage = at(advantages)
    delta = logp - (logp.detach() if old_logprobs is None else at(old_logprobs))
    # A token that the student forbids (-inf) is as on-policy as any, and gets no gradient.
    delta = torch.where(delta.isnan() & (logp == -math.inf), 0.0, delta)
    ratio = delta.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    low, high = 1 - clip_low, 1 + clip_high
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    clipped = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
    if clip_dual is not None:
        clipped |= (advantage < 0) & (ratio > clip_dual)
        floor = torch.where(advantage < 0, clip_dual * advantage, -math.inf)
        surrogate = torch.maximum(surrogate, floor)
    surrogate = torch.where(advantage == 0, 0.0, surrogate)
    if policy_weights is not None:
        surrogate = at(policy_weights) * surrogate
    if sampler_logprobs is not None:
        mismatch = (logp.detach() - at(sampler_logprobs)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        surrogate = mismatch.exp().clamp(max=is_cap or math.inf) * surrogate
    losses = -surrogate + at(teacher_coef) * divergence - entropy_coef * entropy
    if ref_logprobs is not None:
        gap = (at(ref_logprobs) - logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        losses = losses + ref_coef * (gap.exp() - gap - 1)
    weights = at(1 / max(len(rows), 1) if token_weights is None else token_weights)
    loss = (weights * losses).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    of_rows = (ratio, clipped, delta.abs() > LOG_RATIO_LIMIT)
    full = (x.new_zeros(len(keep)).index_copy(0, rows, x) for x in of_rows)
    per_token = (stats.logprobs, stats.teacher_logprobs, stats.divergence, stats.entropy, *full)
    return OracleOutput(
        loss.detach(),
        *(x.detach().reshape(targets.shape) for x in per_token),
        *gradients,
        *([None] if bias is None else []),
    )


def oracle_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: Any = None,
    *,
    bias: Tensor | None = None,
    divergence: str = "reverse_kl",
    divergence_clip: float | None = None,
    jsd_beta: float = 0.5,
    jeffreys_weight: float | Tensor = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    policy_logits: str = "float32",
) -> OracleStats:
    """Log-probability of the target, divergence to the teacher and entropy of each token.

    hidden (N, H), weight (V, H), bias (V,): used in fp64, differentiated by autograd.
    targets: (N,) int64, -100 = masked.
    teacher: anything with the fields of `dgrpo.TeacherHead` or `dgrpo.TopKTeacher`, or None.
    policy_logits: "bfloat16" takes the log-probability from the linear layer's output rounded to
        bf16, with a straight-through gradient.
    """
    rows = (targets != IGNORED).nonzero()[:, 0]
    labels = targets[rows, None]
    linear = hidden.double()[rows] @ weight.double()[:vocab_size].T
    if bias is not None:
        linear = linear + bias.double()[:vocab_size]
    log_p = _finish(linear, logit_scale, logit_softcap, temperature).log_softmax(-1)
    policy = log_p
    if policy_logits == "bfloat16":
        through = torch.where(linear.isinf(), 0.0, linear - linear.detach())
        rounded = linear.float().bfloat16().double().detach() + through
        policy = _finish(rounded, logit_scale, logit_softcap, temperature).log_softmax(-1)
    logp = policy.gather(1, labels)[:, 0]
    entropy = -_times(log_p.exp(), log_p).sum(-1)
    value, teacher_logp = torch.zeros_like(logp), torch.zeros_like(logp)
    if teacher is not None:
        if hasattr(teacher, "token_ids"):
            ids = teacher.token_ids.flatten(0, -2)[rows]
            present = (ids >= 0).any(1)  # a row of padding alone has no teacher
            p, q, teacher_logp = _buckets(log_p, labels, teacher, rows)
        else:
            source = rows if teacher.rows is None else teacher.rows[rows]
            present = source >= 0
            p, q = log_p, _teacher_logits(teacher, source.clamp(min=0), vocab_size)
            q = _finish(q, teacher.logit_scale, teacher.logit_softcap, teacher_temperature)
            teacher_logp = q.log_softmax(-1).gather(1, labels)[:, 0]
            q = torch.maximum(q, q.amax(-1, keepdim=True) + TEACHER_FLOOR).log_softmax(-1)
        shares = torch.as_tensor(jeffreys_weight, dtype=p.dtype, device=p.device)
        shares = shares.reshape(-1)[rows] if shares.dim() else shares
        value = _divergence(p, q, divergence, divergence_clip, jsd_beta, shares)
        teacher_logp, value = (torch.where(present, x, 0.0) for x in (teacher_logp, value))
    empty = torch.zeros(len(targets), dtype=torch.float64, device=hidden.device)
    fields = (logp, value, entropy, teacher_logp.detach())
    return OracleStats(*(empty.index_copy(0, rows, field) for field in fields))


def _finish(linear: Tensor, scale: float, softcap: float | None, temperature: float) -> Tensor:
    """Scale, soft cap and temperature, in this order. A bias of -inf forbids its token."""
    logits = linear * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / temperature).masked_fill(linear == -math.inf, -math.inf)


def _teacher_logits(teacher: Any, source: Tensor, vocab_size: int | None) -> Tensor:
    """The linear layer's output of a full-vocabulary teacher at its rows `source`, (R, V) fp64."""
    hidden = teacher.hidden.detach().reshape(-1, teacher.hidden.shape[-1]).double()
    picked = hidden[source.to(hidden.device)].to(source.device)
    linear = picked @ teacher.weight.detach().double()[:vocab_size].T
    return linear if teacher.bias is None else linear + teacher.bias.detach().double()[:vocab_size]


def _buckets(
    log_p: Tensor, labels: Tensor, teacher: Any, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log p, log q over the K teacher tokens and a tail bucket, (R, K + 1); log q of the target."""
    vocab = log_p.shape[1]
    ids = teacher.token_ids.flatten(0, -2)[rows]
    given = teacher.logprobs.flatten(0, -2)[rows].double()
    there = ids >= 0
    # Padding points to a column of its own, so that scattering it leaves the vocabulary alone.
    ids = torch.where(there, ids, vocab)
    wide = torch.cat([log_p, torch.full_like(log_p[:, :1], ABSENT)], 1)
    tail_p = wide.scatter(1, ids, ABSENT).logsumexp(-1, keepdim=True)
    tail_p = tail_p.masked_fill(tail_p < ABSENT / 2, -math.inf)  # the student forbids all of it
    log_q = torch.where(there, given.clamp(min=TEACHER_FLOOR), ABSENT)
    tail_q = (1 - log_q.exp().sum(-1, keepdim=True)).clamp(min=TAIL_FLOOR).log()
    # A tail without columns is no bucket.
    has_tail = there.sum(-1, keepdim=True) < vocab
    tail_p, tail_q = (torch.where(has_tail, x, ABSENT) for x in (tail_p, tail_q))
    if teacher.target_logprobs is not None:
        target = teacher.target_logprobs.reshape(-1)[rows].double()
    else:
        hit = (ids == labels) & there
        target = torch.where(hit.any(1), torch.where(hit, log_q, 0.0).sum(1), tail_q[:, 0])
    return torch.cat([wide.gather(1, ids), tail_p], 1), torch.cat([log_q, tail_q], 1), target


def _times(p: Tensor, values: Tensor) -> Tensor:
    """`p * values`, 0 where p is 0, whatever the value is there; its gradient too."""
    return p * torch.where(p > 0, values, 0.0)


def _divergence(
    log_p: Tensor, log_q: Tensor, name: str, clip: float | None, beta: float, share: Tensor
) -> Tensor:
    """D(p, q) over the last axis by its definition; log-probabilities (R, V), fp64."""
    p, q = log_p.exp(), log_q.exp()
    if name == "reverse_kl":
        return _times(p, log_p - log_q).sum(-1)
    if name == "forward_kl":
        return _times(q, log_q - log_p).sum(-1)
    if name == "clipped_forward_kl":
        return _times(q, log_q - log_p).clamp(max=clip).sum(-1)
    if name == "jsd":
        log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
        return (beta * _times(q, log_q - log_m) + (1 - beta) * _times(p, log_p - log_m)).sum(-1)
    if name == "jeffreys":
        share = share[..., None]
        forward, reverse = _times(share * q, log_q - log_p), _times(p, log_p - log_q)
        return (forward + (1 - share) * reverse).sum(-1)
    known = "reverse_kl, forward_kl, clipped_forward_kl, jsd or jeffreys"
    raise ValueError(f"divergence: got {name!r}, expected {known}")
