"""Supervised fine-tuning and distillation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dgrpo.objectives.context import Context
from dgrpo.objectives.dgrpo_loss import clipped_policy_loss, scaled
from dgrpo.objectives.kl import kl_advantages, reverse_kl_k2
from dgrpo.objectives.policy import grpo


def sft(stats: Any, context: Context) -> Tensor:
    """`-w logp`: the negative log-likelihood of the given tokens. (R,)."""
    return scaled(context.token_weights, -stats.logprobs)


def kd(stats: Any, context: Context) -> Tensor:
    """`w β D`: the divergence to the teacher at the given tokens, over the whole vocabulary. (R,).

    D is the op's `divergence`, and the source of the tokens makes the method: knowledge
    distillation on given targets with "forward_kl" (1503.02531) or "jsd" (GKD, 2306.13649),
    on-policy distillation on the student's own samples with "reverse_kl" (MiniLLM, 2306.08543).
    """
    divergence = torch.zeros_like(stats.logprobs) + scaled(context.teacher_coef, stats.divergence)
    return scaled(context.token_weights, divergence)


opd = kd  # the same arithmetic: on-policy distillation differs in who wrote the tokens


def vopd(stats: Any, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
    """`-w u min(ρ a, clip(ρ) a)` with `a = -β sg(gap - KL)`, `gap = log p_y - log q_y`. (R,).

    vOPD, "KL for a KL: on-policy distillation with control variate baseline" (2605.07865): the
    sampled reverse KL of `reverse_kl_k1`, its expectation as a detached baseline, so the gradient
    is unbiased and varies less. KL is `stats.divergence` under `divergence="reverse_kl"`: of a
    `TeacherHead` the full one, of a `TopKTeacher` the top-k one, which is as unbiased. Metrics:
    those of `clipped_policy_loss`.
    """
    advantages = kl_advantages(stats, context, baseline=stats.divergence)
    loss, metrics = clipped_policy_loss(stats.logprobs, replace(context, advantages=advantages))
    return scaled(context.token_weights, loss), metrics


def kdrl(stats: Any, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo + reverse_kl_k2`: reward and sampled reverse KL to the teacher. (R,).

    KDRL (2506.02208), whose coefficient is annealed.
    """
    losses, metrics = grpo(stats, context)
    return losses + reverse_kl_k2(stats, context), metrics
