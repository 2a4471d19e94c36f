"""dGRPO: the clipped policy objective plus a divergence to a teacher (arXiv 2605.12227).

The plain twin of the fused kernel `dgrpo_kernels.row_grad`; both are tested against each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dgrpo.objectives.context import Context

LOG_RATIO_LIMIT = 20.0  # nats; beyond it the ratio is held constant, its gradient zero


def log_ratio(new: Tensor, old: Tensor) -> Tensor:
    """`new - old`, clamped to ±20 nats: no gradient beyond. Any shape, natural logarithms."""
    return (new - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def scaled(coef: float | Tensor, value: Tensor) -> Tensor | float:
    """`coef * value`, exactly 0 where `coef` is 0, whatever `value` is there (also inf or NaN)."""
    if not isinstance(coef, Tensor):
        return coef * value if coef else 0.0
    # Selecting before the product keeps 0 * inf out of the backward pass too.
    return coef * torch.where(coef == 0, torch.zeros_like(value), value)


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """`r - log r - 1` with `r = ref / policy`: as a loss, the gradient of the *forward* KL."""
    delta = log_ratio(ref_logprobs, logprobs)
    return delta.exp() - delta - 1


def _both_forbid(logprobs: Tensor, old: Tensor) -> Tensor:
    """(R,) bool: both log-probabilities are -inf, whose difference is undefined."""
    return (logprobs == -torch.inf) & (old == -torch.inf)


def policy_ratio(logprobs: Tensor, context: Context) -> Tensor:
    """`exp(logp - old_logp)`, 1 with gradient when on-policy, and constant where A = 0. (R,)."""
    old = logprobs.detach() if context.old_logprobs is None else context.old_logprobs
    # A token without advantage takes no part: an infinite or undefined ratio there must not count.
    # Nor does one that both policies forbid.
    apart = (context.advantages == 0) | _both_forbid(logprobs, old)
    delta = torch.where(apart, torch.zeros_like(logprobs), logprobs - old)
    return delta.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def importance(logprobs: Tensor, context: Context) -> Tensor | None:
    """The detached weight `u` of the policy term. (R,), or None when there is none.

    From the sampler's log-probabilities: `min(exp(logp - sampler_logp), is_cap)` (TIS, 2510.26788).
    """
    if context.sampler_logprobs is None:
        return context.policy_weights
    weight = log_ratio(logprobs.detach(), context.sampler_logprobs).exp()
    return weight if context.is_cap is None else weight.clamp(max=context.is_cap)


def clipped_policy_loss(logprobs: Tensor, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
    """`-u min(rho A, clip(rho, 1 - low, 1 + high) A)` (PPO 1707.06347, GRPO 2402.03300). (R,).

    With `clip_dual` = c the term of a negative advantage is at most `-c A` (dual clip, 1912.09729).
    Metrics: `ratio`, `clipped` (the clip stops the gradient), `clamped` (log-ratio beyond ±20).
    """
    advantages = context.advantages
    ratio = policy_ratio(logprobs, context)
    low = ratio.clamp(min=1 - context.clip_low, max=context.clip_dual)
    bounded = torch.where(advantages > 0, ratio.clamp(max=1 + context.clip_high), low)
    loss = -advantages * bounded
    weight = importance(logprobs, context)
    if weight is not None:
        loss = scaled(weight, loss)
    with torch.no_grad():
        old = context.old_logprobs
        delta = torch.zeros_like(logprobs)
        if old is not None:
            delta = (logprobs - old).masked_fill(_both_forbid(logprobs, old), 0)
        metrics = {
            "ratio": delta.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp(),
            "clipped": (bounded != ratio) & (advantages != 0),
            "clamped": delta.abs() > LOG_RATIO_LIMIT,
        }
    return loss, metrics


def with_penalties(policy_loss: Tensor, stats: Any, context: Context) -> Tensor:
    """`w (policy_loss + beta D + beta_ref k3(logp, ref_logp) - c_E Ent)`. (R,)."""
    loss = policy_loss + scaled(context.teacher_coef, stats.divergence)
    if context.ref_logprobs is not None and context.ref_coef:
        loss = loss + context.ref_coef * k3(stats.logprobs, context.ref_logprobs)
    loss = loss - scaled(context.entropy_coef, stats.entropy)
    return scaled(context.token_weights, loss)


def dgrpo(stats: Any, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
    """The dGRPO objective of arXiv 2605.12227, per token. Losses (R,), weighted.

    `w (-u min(rho A, clip(rho) A) + beta D + beta_ref k3(logp, ref_logp) - c_E Ent)`

    `stats` has `logprobs`, `divergence` and `entropy`, each (R,). β = 0.5 is the paper's, with no
    second reference penalty. Metrics: those of `clipped_policy_loss`.
    """
    policy_loss, metrics = clipped_policy_loss(stats.logprobs, context)
    return with_penalties(policy_loss, stats, context), metrics
