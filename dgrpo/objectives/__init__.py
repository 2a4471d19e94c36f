"""Objectives: plain functions of `(stats, context)`, and what is computed before them.

An objective returns losses (R,), already multiplied by `context.token_weights`, or
`(losses, {name: (R,) metric})`. `docs/objectives.md` says how to choose one and how to add one.
"""

from dgrpo.objectives.advantages import group_advantages
from dgrpo.objectives.context import Context
from dgrpo.objectives.dgrpo_loss import dgrpo
from dgrpo.objectives.importance import masked_importance_weights, truncated_importance_weights
from dgrpo.objectives.kl import (
    forward_kl_k3,
    k1_loss,
    kl_advantages,
    reverse_kl_k1,
    reverse_kl_k2,
    reverse_kl_k3,
    reverse_kl_weighted_k3,
)
from dgrpo.objectives.policy import cispo, grpo, gspo, kd, kdrl, opd, sft, vopd
from dgrpo.objectives.sequences import padded_sequence_ids, sequence_sums
from dgrpo.objectives.weights import BatchCounts, batch_counts, token_weights

__all__ = [
    "BatchCounts",
    "Context",
    "batch_counts",
    "cispo",
    "dgrpo",
    "forward_kl_k3",
    "group_advantages",
    "grpo",
    "gspo",
    "k1_loss",
    "kd",
    "kdrl",
    "kl_advantages",
    "masked_importance_weights",
    "opd",
    "padded_sequence_ids",
    "reverse_kl_k1",
    "reverse_kl_k2",
    "reverse_kl_k3",
    "reverse_kl_weighted_k3",
    "sequence_sums",
    "sft",
    "token_weights",
    "truncated_importance_weights",
    "vopd",
]
