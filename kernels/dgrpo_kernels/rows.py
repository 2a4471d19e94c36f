"""What the row kernels read and write. Plain torch, no Triton."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

ROW_MULTIPLE = 16  # elements; row strides are multiples, so that every load is 16 bytes wide

RAW, SCALED, CAPPED = 0, 1, 2  # what turns raw values into logits: see `dgrpo_kernels.logits`

FLOOR = -1e6  # nats below the peak at which a teacher's logit is held: its KLs stay finite


class RowStats(NamedTuple):
    """Views of the `(11, R)` buffer that the kernels share; each field (R,) fp32 (fp64 in fp64).

    With `u = z - max_z` and `v = t - max_t`: `log p = u - log_sum_z`, `log q = v - log_sum_t`. The
    maximum and the rest of a log-sum-exp are kept apart, since their sum loses digits that a
    near-equal teacher's divergence is made of.

    "bucket", the divergence's slope in a top-k teacher's tail, is `p_v aux - q_v`. Reverse KL and
    JSD: aux = r_tail - mean r and q = 0. Forward KLs: aux = mass of the unclipped q, and q is the
    teacher's tail in the student's shape, `log q_v = z_v - max_t - log_sum_t`, also where p
    underflows.
    """

    max_z: Tensor
    log_sum_z: Tensor
    max_t: Tensor
    log_sum_t: Tensor
    logprobs: Tensor  # log p of the target, of the rounded row when the policy is rounded
    teacher_logprobs: Tensor
    divergence: Tensor
    entropy: Tensor
    aux: Tensor  # a second number of some divergences: see `divergences`; bucket: see above
    policy_max: Tensor  # of the row rounded to bf16, = max_z without rounding
    policy_log_sum: Tensor


STATS = len(RowStats._fields)


class Logits(NamedTuple):
    """A block of raw logits and their transform.

    raw: (R, V) fp32, unit column stride, row stride a multiple of 16 elements; what stands between
        V and the row stride is never used. bias: None or fp32 of that padded length. holes: some
        logits may be -inf (a bias masks tokens, a top-k teacher's columns were taken out).
    """

    raw: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    holes: bool = True

    @property
    def form(self) -> int:
        """RAW, SCALED or CAPPED."""
        if self.softcap is not None:
            return CAPPED
        return RAW if self.scale == self.temperature == 1 else SCALED

    @property
    def scalars(self) -> tuple[float, float, float]:
        """What the kernels take of the transform: scale, soft cap, 1 / temperature."""
        return float(self.scale), float(self.softcap or 1.0), 1.0 / self.temperature


class PolicyInputs(NamedTuple):
    """Rows of the `(7, R)` fp32 buffer that the fused dGRPO objective reads."""

    token_weights: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    policy_weights: Tensor
    sampler_logprobs: Tensor
    teacher_coef: Tensor


class PolicyOutputs(NamedTuple):
    """Rows of the `(7, R)` fp32 buffer that the fused dGRPO objective writes."""

    losses: Tensor
    ratio: Tensor
    clipped: Tensor  # 0 or 1
    clamped: Tensor  # 0 or 1
    a: Tensor
    b: Tensor
    c: Tensor


POLICY_INPUTS, POLICY_OUTPUTS = len(PolicyInputs._fields), len(PolicyOutputs._fields)


class PolicyRows(NamedTuple):
    """What the fused dGRPO objective needs for R rows.

    inputs: (7, R), see `PolicyInputs`; a row that `context` lacks is never read. outputs: (7, R),
    see `PolicyOutputs`. context: the call's `dgrpo.objectives.Context`: its numbers, and which of
    the optional inputs are None.
    """

    inputs: Tensor
    outputs: Tensor
    context: Any


def check_rows(name: str, values: Tensor) -> None:
    """Raise for a block that the kernels would read with narrow loads or out of bounds."""
    if values.stride(1) != 1 or values.stride(0) % ROW_MULTIPLE:
        raise ValueError(
            f"{name}: got strides {tuple(values.stride())}, expected unit column stride and a row "
            f"stride that is a multiple of {ROW_MULTIPLE}"
        )
