"""What a run says about itself: per-step numbers, a live display, and rollouts to read.

Names are those of the loss's outputs and arguments (`loss`, `divergence`, `clipped`, `lr`).
Everything that may differ between two equal runs starts with `time/` or `memory/`.
"""

from dgrpo.trainer.metrics.log import RunLog
from dgrpo.trainer.metrics.reduce import StepMetrics
from dgrpo.trainer.metrics.rollouts import rollout_record, token_pieces, write_rollouts

__all__ = ["RunLog", "StepMetrics", "rollout_record", "token_pieces", "write_rollouts"]
