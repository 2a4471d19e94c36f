"""The loss head: public functions over blocks of logits that never all exist."""

from dgrpo.ops.autograd import LossOutput
from dgrpo.ops.losses import (
    DgrpoOutput,
    LogprobsOutput,
    linear_dgrpo_loss,
    linear_logprobs,
    linear_loss,
    linear_token_stats,
)
from dgrpo.ops.options import DIVERGENCE_OPTIONS, Options
from dgrpo.ops.steps import TokenStats
from dgrpo.ops.teachers import TeacherHead, TopKTeacher

__all__ = [
    "DIVERGENCE_OPTIONS",
    "DgrpoOutput",
    "LogprobsOutput",
    "LossOutput",
    "Options",
    "TeacherHead",
    "TokenStats",
    "TopKTeacher",
    "linear_dgrpo_loss",
    "linear_logprobs",
    "linear_loss",
    "linear_token_stats",
]
