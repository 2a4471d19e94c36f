"""Policy gradients, supervised fine-tuning and distillation: objectives of `(stats, context)`.

`stats` has `logprobs`, `divergence` and `entropy`. Policy gradients have the penalties of `dgrpo`
(β D to the teacher, k3 to the reference, entropy), each skipped where its coefficient is 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dgrpo.objectives.context import Context
from dgrpo.objectives.dgrpo_loss import (
    clipped_policy_loss,
    dgrpo,
    importance,
    policy_ratio,
    scaled,
    with_penalties,
)
from dgrpo.objectives.kl import kl_advantages, reverse_kl_k2
from dgrpo.objectives.sequences import sequence_sums


def grpo(stats: Any, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
    """`w (-u min(ρ A, clip(ρ) A) + β_ref k3 - c_E Ent)`: dGRPO without its teacher. (R,).

    GRPO (2402.03300), Dr.GRPO (2503.20783), DAPO (2503.14476, with `clip_high=0.28`) and BNPO are
    this one loss with different `token_weights`, Dr.GRPO with `group_advantages(scale="none")`.
    """
    return dgrpo(stats, replace(context, teacher_coef=0.0))


def cispo(stats: Any, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
    """`-w u sg(clip(ρ, 1 - low, 1 + high)) A logp`, and the penalties. (R,).

    CISPO (MiniMax-M1, 2506.13585): the detached weight is clipped, so no token loses its gradient.
    The paper has no lower clip, which is `clip_low=1`. Metrics: `ratio`, `clipped`.
    """
    ratio = policy_ratio(stats.logprobs.detach(), context)
    bounded = ratio.clamp(1 - context.clip_low, 1 + context.clip_high)
    weight = importance(stats.logprobs, context)
    coef = bounded * context.advantages if weight is None else weight * bounded * context.advantages
    metrics = {"ratio": ratio, "clipped": bounded != ratio}
    return with_penalties(-scaled(coef, stats.logprobs), stats, context), metrics


def gspo(stats: Any, context: Context, sequence_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """`-w u min(s A, clip(s, 1 - low, 1 + high) A)` with one ratio s per sequence, and penalties.

    `s = exp(mean over the sequence of (logp - old_logp))`, the mean held within ±20 nats. GSPO
    (2507.18071): "grpo" token weights, `clip_low=3e-4`, `clip_high=4e-4`. The ratio couples tokens,
    so `stats` are those of `linear_token_stats` (or `HeadInputs(mode="stats")`) over whole
    sequences, all (N,), as are `sequence_ids` (see `sequence_sums`), losses and metrics (those of
    `clipped_policy_loss`, of the sequence's ratio).
    """
    old = stats.logprobs.detach() if context.old_logprobs is None else context.old_logprobs
    length = sequence_sums(torch.ones_like(stats.logprobs), sequence_ids).clamp(min=1)
    mean = sequence_sums(stats.logprobs - old, sequence_ids) / length
    of_sequence = replace(
        context,
        old_logprobs=torch.zeros_like(mean),
        policy_weights=importance(stats.logprobs, context),
        sampler_logprobs=None,
    )
    policy_loss, metrics = clipped_policy_loss(mean, of_sequence)
    return with_penalties(policy_loss, stats, context), metrics


def sft(stats: Any, context: Context) -> Tensor:
    """`-w logp`: the negative log-likelihood of the given tokens. (R,)."""
    return scaled(context.token_weights, -stats.logprobs)


def kd(stats: Any, context: Context) -> Tensor:
    """`w β D`: the divergence to the teacher at the given tokens, over the whole vocabulary. (R,).

    The source of the tokens makes the method: distillation on given targets with "forward_kl"
    (1503.02531) or "jsd" (GKD, 2306.13649), on-policy distillation on the student's own samples
    with "reverse_kl" (MiniLLM, 2306.08543).
    """
    divergence = torch.zeros_like(stats.logprobs) + scaled(context.teacher_coef, stats.divergence)
    return scaled(context.token_weights, divergence)


opd = kd  # the same arithmetic


def vopd(stats: Any, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
    """`-w u min(ρ a, clip(ρ) a)` with `a = -β sg(gap - KL)`, `gap = log p_y - log q_y`. (R,).

    vOPD (2605.07865): `reverse_kl_k1` with its expectation as a detached baseline, so the gradient
    is unbiased and varies less. KL is `stats.divergence` under `divergence="reverse_kl"`, which may
    be that of a `TopKTeacher`. Metrics: those of `clipped_policy_loss`.
    """
    advantages = kl_advantages(stats, context, baseline=stats.divergence)
    loss, metrics = clipped_policy_loss(stats.logprobs, replace(context, advantages=advantages))
    return scaled(context.token_weights, loss), metrics


def kdrl(stats: Any, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo + reverse_kl_k2`: KDRL (2506.02208), whose coefficient is annealed. (R,)."""
    losses, metrics = grpo(stats, context)
    return losses + reverse_kl_k2(stats, context), metrics
