"""Importance weights `u` for a sampler whose probabilities differ from the trainer's.

They are a `Context`'s `policy_weights`. Its `sampler_logprobs` and `is_cap` truncate per token too,
by the log-probabilities of that very pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dgrpo.objectives.dgrpo_loss import LOG_RATIO_LIMIT
from dgrpo.objectives.sequences import sequence_sums


def truncated_importance_weights(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    cap: float = 2.0,
    *,
    sequence_ids: Tensor | None = None,
    length_normalised: bool = False,
) -> Tensor:
    """`min(ratio, cap)`, detached, shaped like `logprobs` (log-probabilities of sampled tokens).

    `ratio` is `exp(logprobs - sampler_logprobs)` of the token, or with `sequence_ids` (see
    `sequence_sums`; 1 where -1) of its whole sequence, whose log-ratios are summed;
    `length_normalised` takes their mean, as the sum grows with the length. Per token: TIS; per
    sequence: "When speed kills stability" (2025); both in 2510.26788.
    """
    if not cap > 0:
        raise ValueError(f"cap: got {cap}, expected a positive number, such as 2.0")
    delta = _log_weights(logprobs, sampler_logprobs, sequence_ids, length_normalised)
    return delta.clamp(max=math.log(cap)).exp()


def masked_importance_weights(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    cap: float = 2.0,
    low: float = 0.0,
    *,
    sequence_ids: Tensor | None = None,
    length_normalised: bool = False,
) -> Tensor:
    """`ratio` where `low <= ratio <= cap`, else 0: what is too far off the policy is left out.

    Arguments as in `truncated_importance_weights`. Token level: IcePop, 2510.18855 (low 0.5, cap
    5); sequence level: MIS, 2510.26788. A dropped token keeps its share of the normaliser.
    """
    if not cap > low >= 0:
        raise ValueError(f"cap, low: got {cap} and {low}, expected cap > low >= 0")
    ratio = _log_weights(logprobs, sampler_logprobs, sequence_ids, length_normalised).exp()
    return torch.where((ratio >= low) & (ratio <= cap), ratio, torch.zeros_like(ratio))


def _log_weights(
    logprobs: Tensor, sampler_logprobs: Tensor, sequence_ids: Tensor | None, normalised: bool
) -> Tensor:
    """The detached log-ratio of the token or of its sequence, within ±20 nats."""
    if sampler_logprobs.shape != logprobs.shape:
        raise ValueError(
            f"sampler_logprobs: got shape {tuple(sampler_logprobs.shape)}, expected that of "
            f"logprobs, {tuple(logprobs.shape)}; align them token by token"
        )
    delta = (logprobs - sampler_logprobs).detach()
    if sequence_ids is not None:
        total = sequence_sums(delta, sequence_ids)
        length = sequence_sums(torch.ones_like(delta), sequence_ids).clamp(min=1)
        delta = total / length if normalised else total
    return delta.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
