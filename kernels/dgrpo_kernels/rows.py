"""What the row kernels read and write, and the codes of the divergences. Plain torch, no Triton."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from torch import Tensor

ROW_MULTIPLE = 16  # elements; row strides are multiples, so that every load is 16 bytes wide

FLOOR = -1e6  # nats below the peak at which a teacher's logit is held: its KLs stay finite

# "bucket" is the gradient of any divergence over a top-k teacher's buckets, in the tail's columns.
DIVERGENCES = {
    "none": 0,
    "reverse_kl": 1,
    "forward_kl": 2,
    "clipped_forward_kl": 3,
    "jsd": 4,
    "bucket": 5,
}


class RowStats(NamedTuple):
    """Views of the `(11, R)` buffer that the kernels share; each field (R,) fp32 (fp64 in fp64).

    With `u = z - max_z` and `v = t - max_t`: `log p = u - log_sum_z`, `log q = v - log_sum_t`. The
    maximum and the rest of a log-sum-exp are kept apart, since their sum loses digits that a
    near-equal teacher's divergence is made of.

    "bucket", D's gradient in the tail's columns, is `p_v aux - q_v`. Reverse KL and JSD: aux =
    r_tail - mean r and q = 0. Forward KLs: aux = mass of the unclipped q, and q is the teacher's
    tail in the student's shape, `log q_v = z_v - max_t - log_sum_t`, also where p underflows.
    """

    max_z: Tensor
    log_sum_z: Tensor
    max_t: Tensor
    log_sum_t: Tensor
    logprobs: Tensor  # log p of the target, of the rounded row when the policy is rounded
    teacher_logprobs: Tensor
    divergence: Tensor
    entropy: Tensor
    aux: Tensor  # clipped forward KL: S; JSD: KL(p‖M); bucket: see above
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


POLICY_INPUTS = 7  # weights, advantages, old, ref, policy weights, sampler, teacher coefficients
POLICY_OUTPUTS = 7  # losses, ratio, clipped, clamped, a, b, c


class PolicyRows(NamedTuple):
    """What the fused dGRPO objective needs for R rows.

    inputs: (7, R) fp32 rows: token weights, advantages, old, reference, policy weights, sampler
        log-probabilities, teacher coefficients; an absent one is flagged and never read.
    outputs: (7, R) fp32 rows: losses, ratio, clipped (0 or 1), clamped (0 or 1), a, b, c.
    """

    inputs: Tensor | None
    outputs: Tensor | None
    has_old: bool = False
    has_ref: bool = False
    has_weights: bool = False
    has_sampler: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float = inf
    is_cap: float = inf
    ref_coef: float = 0.0
    entropy_coef: float = 0.0


NO_POLICY = PolicyRows(None, None)  # coefficients come from outside


def check_rows(name: str, values: Tensor) -> None:
    """Refuse a block that the kernels would read with narrow loads or out of bounds."""
    if values.stride(1) != 1 or values.stride(0) % ROW_MULTIPLE:
        raise ValueError(
            f"{name}: got strides {tuple(values.stride())}, expected unit column stride and a row "
            f"stride that is a multiple of {ROW_MULTIPLE}"
        )
