"""The clipped dGRPO objective of one token, in the gradient kernel's prologue.

    loss = w (-u min(rho A, clip(rho) A) + beta D + beta_ref k3(logp, ref) - c_E entropy)

and its slopes a = dL/dlogp, b = dL/dD, c = dL/dentropy (dGRPO, arXiv 2605.12227). The plain twin is
`dgrpo.objectives.dgrpo`; both are tested against each other.
"""

from __future__ import annotations

from math import inf

import triton
import triton.language as tl

from dgrpo_kernels import layout as at
from dgrpo_kernels.rows import PolicyRows


@triton.jit
def _clamp_log(x):
    return tl.minimum(tl.maximum(x, -20.0), 20.0)


@triton.jit
def dgrpo_row(
    in_ptr, in_row, logp, divergence, entropy,
    clip_low, clip_high, clip_dual, is_cap, ref_coef, entropy_coef,
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_SAMPLER: tl.constexpr,
):  # fmt: skip
    """Loss, ratio, flags and (a, b, c) of one token; a zero coefficient skips its term."""
    weight = tl.load(in_ptr + in_row * at.TOKEN_WEIGHTS)
    advantage = tl.load(in_ptr + in_row * at.ADVANTAGES)
    teacher_coef = tl.load(in_ptr + in_row * at.TEACHER_COEF)
    delta = 0.0 * weight
    forbidden = logp == float("-inf")  # the student cannot say it: nothing to learn from
    if HAS_OLD:
        old = tl.load(in_ptr + in_row * at.OLD_LOGPROBS)
        delta = tl.where(forbidden & (old == logp), delta, logp - old)
    clamped = tl.abs(delta) > 20.0
    ratio = tl.exp(_clamp_log(delta))
    low = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), clip_dual)
    bounded = tl.where(advantage > 0, tl.minimum(ratio, 1.0 + clip_high), low)
    idle = advantage == 0
    clipped = (bounded != ratio) & (advantage != 0)
    loss = tl.where(idle, 0.0, -advantage * bounded)
    a = tl.where(idle | clipped | clamped | forbidden, 0.0, -advantage * ratio)
    if HAS_WEIGHTS:
        u = tl.load(in_ptr + in_row * at.POLICY_WEIGHTS)
        loss = tl.where(u == 0, 0.0, u * loss)
        a = tl.where(u == 0, 0.0, u * a)
    if HAS_SAMPLER:
        sampler = tl.load(in_ptr + in_row * at.SAMPLER_LOGPROBS)
        u = tl.minimum(tl.exp(_clamp_log(logp - sampler)), is_cap)
        loss *= u
        a *= u
    loss += tl.where(teacher_coef == 0, 0.0, teacher_coef * divergence)
    if HAS_REF:
        delta_ref = tl.load(in_ptr + in_row * at.REF_LOGPROBS) - logp
        inside = tl.abs(delta_ref) <= 20.0
        delta_ref = _clamp_log(delta_ref)
        r = tl.exp(delta_ref)
        loss += tl.where(ref_coef == 0, 0.0, ref_coef * (r - delta_ref - 1.0))
        a += tl.where((ref_coef == 0) | (inside == 0), 0.0, ref_coef * (1.0 - r))
    loss -= tl.where(entropy_coef == 0, 0.0, entropy_coef * entropy)
    skip = weight == 0
    loss = tl.where(skip, 0.0, weight * loss)
    loss = tl.where(logp == logp, loss, float("nan"))
    a = tl.where(skip, 0.0, weight * a)
    b = tl.where(skip | (teacher_coef == 0), 0.0, weight * teacher_coef)
    c = tl.where(skip, 0.0, -weight * entropy_coef)
    return loss, ratio, clipped, clamped, a, b, c


@triton.jit
def store_policy(out_ptr, out_row, loss, ratio, clipped, clamped, a, b, c):
    """One token's `PolicyOutputs`."""
    tl.store(out_ptr + out_row * at.LOSSES, loss)
    tl.store(out_ptr + out_row * at.RATIO, ratio)
    tl.store(out_ptr + out_row * at.CLIPPED, clipped.to(tl.float32))
    tl.store(out_ptr + out_row * at.CLAMPED, clamped.to(tl.float32))
    tl.store(out_ptr + out_row * at.COEF_A, a)
    tl.store(out_ptr + out_row * at.COEF_B, b)
    tl.store(out_ptr + out_row * at.COEF_C, c)


def policy_numbers(policy: PolicyRows | None) -> tuple[float, ...]:
    """The objective's numbers, in the order of the kernels' arguments; infinite where None."""
    if policy is None:
        return (0.0,) * 6
    given = policy.context
    numbers = (
        given.clip_low, given.clip_high, given.clip_dual, given.is_cap, given.ref_coef,
        given.entropy_coef,
    )  # fmt: skip
    return tuple(inf if number is None else float(number) for number in numbers)


def policy_flags(policy: PolicyRows | None) -> dict[str, bool]:
    """Which of the objective's optional inputs are there."""
    context = None if policy is None else policy.context
    flags = {
        "HAS_OLD": "old_logprobs", "HAS_REF": "ref_logprobs", "HAS_WEIGHTS": "policy_weights",
        "HAS_SAMPLER": "sampler_logprobs",
    }  # fmt: skip
    return {flag: getattr(context, name, None) is not None for flag, name in flags.items()}
