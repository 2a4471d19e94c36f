"""Policy-gradient objectives of `(stats, context)`, each with the penalties of its context.

`stats` has `logprobs`, `divergence` and `entropy`; the penalties (β D to the teacher, k3 to the
reference, entropy) are those of `dgrpo`, each skipped where its coefficient is 0.
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
from dgrpo.objectives.sequences import sequence_sums


def grpo(stats: Any, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
    """`w (-u min(ρ A, clip(ρ) A) + β_ref k3 - c_E Ent)`: dGRPO without its teacher. (R,).

    GRPO (2402.03300), Dr.GRPO (2503.20783), DAPO (2503.14476, with `clip_high=0.28`) and BNPO are
    this one loss; they differ in `token_weights(mask, kind)`, and Dr.GRPO in
    `group_advantages(scale="none")`. `context.clip_dual` = c > 1 makes it dual clip (1912.09729).
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

    `s = exp(mean over the sequence of (logp - old_logp))`, the mean held within ±20 nats before
    `exp`. GSPO (2507.18071): there with the "grpo" token weights, `clip_low=3e-4` and
    `clip_high=4e-4`. The ratio couples tokens, so `stats` are those of `linear_token_stats` (or
    `HeadInputs(mode="stats")`) over whole sequences: all (N,), as is `sequence_ids`, int64, -1
    where masked (see `sequence_sums`). Losses (N,); metrics are those of `clipped_policy_loss`,
    of the sequence's ratio on each of its tokens.
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
