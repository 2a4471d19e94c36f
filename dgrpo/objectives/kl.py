"""Sampled KL terms, each `w coef estimate`, named by the gradient that they have.

p is the policy, q the teacher with `context.teacher_coef` (or, with `against="reference"`,
`context.ref_logprobs` with `ref_coef`), y the sampled token, `gap = log p_y - log q_y` within ±20
nats. As losses for y ~ p, the estimates k1, k2 and k3 of KL(p‖q) (Schulman, "Approximating KL
divergence", 2020) have the expected gradients 0, that of KL(p‖q) and that of KL(q‖p) (2506.09477,
2510.01555). A token without a teacher (divergence and log-probability 0) is skipped.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from dgrpo.objectives.context import Context
from dgrpo.objectives.dgrpo_loss import clipped_policy_loss, k3, log_ratio, policy_ratio, scaled


def kl_advantages(
    stats: Any, context: Context, against: str = "teacher", baseline: Tensor | None = None
) -> Tensor:
    """`-coef (gap - baseline)`, detached: k1 as an advantage, with the reverse-KL gradient. (R,).

    Add it to `context.advantages` to put reward and KL under one clip. A baseline may be anything
    that does not depend on the sampled token.
    """
    gap, coef = _gap(stats, context, against)
    if baseline is not None:
        gap = gap - baseline.detach()
    return torch.zeros_like(gap) - scaled(coef, gap)


def reverse_kl_k1(stats: Any, context: Context, against: str = "teacher") -> Tensor:
    """`-w u min(ρ a, clip(ρ) a)` with `a = -coef sg(gap)`: k1 in the policy gradient. (R,).

    Gradient: that of the reverse KL, also off the sampling policy within the clip (2510.01555;
    "On-policy distillation", Thinking Machines, 2025). The value is no estimate of the KL.
    """
    advantages = kl_advantages(stats, context, against)
    loss, _ = clipped_policy_loss(stats.logprobs, replace(context, advantages=advantages))
    return scaled(context.token_weights, loss)


def reverse_kl_k2(stats: Any, context: Context, against: str = "teacher") -> Tensor:
    """`w coef gap² / 2`: on-policy, the gradient of the reverse KL (2510.01555). (R,).

    Token by token the gradient of `reverse_kl_k1`; it knows no ratio, so it is biased off-policy.
    """
    gap, coef = _gap(stats, context, against)
    return _term(context, coef, _straight_through(gap.square() / 2, gap, stats.logprobs))


def reverse_kl_k3(stats: Any, context: Context, against: str = "teacher") -> Tensor:
    """`w coef k3` in value, the gradient of k2 (verl's "k3+"): on-policy the reverse KL's. (R,)."""
    gap, coef = _gap(stats, context, against)
    value = k3(gap, torch.zeros_like(gap))
    return _term(context, coef, _straight_through(value, gap, stats.logprobs))


def reverse_kl_weighted_k3(stats: Any, context: Context, against: str = "teacher") -> Tensor:
    """`w coef ρ k3`, differentiated through ρ: the reverse KL's gradient, off-policy too. (R,).

    DeepSeek-V3.2 (2512.02556, eq. 7). On-policy (no `old_logprobs`) it is, token by token, k2.
    """
    other, coef = _other(stats, context, against)
    ratio = policy_ratio(stats.logprobs, replace(context, advantages=torch.ones_like(other)))
    return _term(context, coef, ratio * k3(stats.logprobs, other))


def forward_kl_k3(stats: Any, context: Context, against: str = "teacher") -> Tensor:
    """`w coef (exp(-gap) + gap - 1)`: on-policy, the gradient of the *forward* KL(q‖p). (R,).

    This is GRPO's penalty (2402.03300): its value estimates the reverse KL, its gradient p - q is
    the forward KL's (2506.09477). Unbounded where p is far below q.
    """
    other, coef = _other(stats, context, against)
    return _term(context, coef, k3(stats.logprobs, other))


def k1_loss(stats: Any, context: Context, against: str = "teacher") -> NoReturn:
    """Raises ValueError: `w coef gap` as a loss has expected gradient 0 (2506.09477)."""
    raise ValueError(
        "k1_loss: got k1 = log p - log q as a loss, whose expected gradient is 0, expected an "
        "estimate that teaches; use reverse_kl_k1 (k1 in the policy gradient) or reverse_kl_k2"
    )


def _gap(stats: Any, context: Context, against: str) -> tuple[Tensor, float | Tensor]:
    """The detached gap (R,), and its coefficient."""
    other, coef = _other(stats, context, against)
    return log_ratio(stats.logprobs.detach(), other), coef


def _other(stats: Any, context: Context, against: str) -> tuple[Tensor, float | Tensor]:
    """The log-probabilities (R,) to compare with, and their coefficient."""
    if against == "teacher":
        name, other, coef = "teacher_logprobs", stats.teacher_logprobs, context.teacher_coef
    elif against == "reference":
        name, other, coef = "ref_logprobs", context.ref_logprobs, context.ref_coef
    else:
        raise ValueError(f'against: got {against!r}, expected "teacher" or "reference"')
    if other is None:
        way_out = "give the op a teacher" if against == "teacher" else "put them into the Context"
        raise ValueError(f"{name}: got None, expected one log-probability per token; {way_out}")
    # A token that is skipped compares with itself: 0 * NaN must not come up in the backward pass.
    skipped = context.token_weights == 0
    if isinstance(coef, Tensor):
        skipped = skipped | (coef == 0)
    if against == "teacher":  # both are 0 also where p and q are sure of y, and the gap is nothing
        skipped = skipped | ((other == 0) & (stats.divergence == 0))
    return torch.where(skipped, stats.logprobs, other).detach(), coef


def _straight_through(value: Tensor, slope: Tensor, logprobs: Tensor) -> Tensor:
    """`value`, with the gradient `slope` with respect to `logprobs`."""
    return value + slope * (logprobs - logprobs.detach())


def _term(context: Context, coef: float | Tensor, value: Tensor) -> Tensor:
    """`w coef value`, exactly 0 where either factor is."""
    return scaled(context.token_weights, torch.zeros_like(value) + scaled(coef, value))
