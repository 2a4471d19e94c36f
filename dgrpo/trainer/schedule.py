"""Values that change over the steps of a run: coefficients and the learning rate.

Both are functions of the step alone, so that a resumed run needs no state for them.
"""

from __future__ import annotations

import math

from dgrpo.trainer.config.method import Coefficient, Schedule


def coefficient(value: Coefficient, step: int, total: int | None) -> float:
    """A coefficient at the 0-based `step`: a number is itself, a `Schedule` moves.

    `start` at step 0, `end` from the schedule's last step on; `total` steps unless it says.
    """
    if not isinstance(value, Schedule):
        return value
    steps = value.steps or total
    if value.shape == "constant" or steps is None:
        return value.start
    done = min(1.0, step / max(1, steps - 1))
    if value.shape == "cosine":
        done = (1.0 - math.cos(math.pi * done)) / 2.0
    return value.start + (value.end - value.start) * done


def lr_factor(
    step: int,
    total: int | None,
    *,
    warmup_steps: int,
    decay: str,
    decay_fraction: float,
    final_fraction: float,
) -> float:
    """What the peak learning rate is multiplied with at the 0-based `step` of `total`.

    A linear warm-up, 1 in between, and over the last `decay_fraction` of the steps a "linear" or
    "cosine" way down to `final_fraction` ("constant": none).
    """
    factor = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if decay == "constant" or total is None:
        return factor
    length = max(1, round(total * decay_fraction))
    done = min(1.0, max(0.0, (step + 1 - (total - length)) / length))
    if decay == "cosine":
        done = (1.0 - math.cos(math.pi * done)) / 2.0
    return factor * (1.0 - (1.0 - final_fraction) * done)
