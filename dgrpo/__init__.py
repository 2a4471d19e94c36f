"""Fused loss heads for post-training language models on very long sequences.

`linear_dgrpo_loss` and its siblings compute GRPO, distillation and other objectives from hidden
states and LM-head weights; the `[tokens, vocabulary]` logits never exist.
"""

from dgrpo.ops import (
    DgrpoOutput,
    LogprobsOutput,
    LossOutput,
    TeacherHead,
    TokenStats,
    TopKTeacher,
    linear_dgrpo_loss,
    linear_logprobs,
    linear_loss,
    linear_token_stats,
)

__version__ = "0.1.0"

__all__ = [
    "DgrpoOutput",
    "LogprobsOutput",
    "LossOutput",
    "TeacherHead",
    "TokenStats",
    "TopKTeacher",
    "linear_dgrpo_loss",
    "linear_logprobs",
    "linear_loss",
    "linear_token_stats",
]
