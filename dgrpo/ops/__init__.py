"""The loss head: public functions over blocks of logits that never all exist."""

from dgrpo.ops.losses import DgrpoOutput, LossOutput, linear_dgrpo_loss, linear_loss
from dgrpo.ops.statistics import LogprobsOutput, linear_logprobs, linear_token_stats
from dgrpo.ops.steps import TokenStats
from dgrpo.ops.teachers import TeacherHead, TopKTeacher

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
