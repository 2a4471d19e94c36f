"""Every divergence D between student p and teacher q in the kernels: value and slope side by side.

    reverse KL           KL(p‖q)                      dD/dz = p (log p - log q - D)
    forward KL           KL(q‖p)                      dD/dz = p - q
    clipped forward KL   sum min(q log(q/p), C)       dD/dz = p S - q 1[q log(q/p) < C]
    JSD                  beta KL(q‖M) + (1-beta) KL(p‖M)
                                                      dD/dz = (1-beta) p (log p - log M - KL(p‖M))
    Jeffreys             w KL(q‖p) + (1-w) KL(p‖q)
                                                      dD/dz = w (p - q)
                                                              + (1-w) p (log p - log q - KL(p‖q))

with S the sum of the unclipped q and M = (1-beta) p + beta q (the JSD's convention is TRL's, GKD
2306.13649; w = 1/2 is half of what Jeffreys 1946 defines).

One of one pass is summed online in `row_stats` (`online_terms`) and finished by `online_value`. One
of two passes needs both normalisers first: `row_divergence` sums the value and `aux` (S, KL(p‖M) or
KL(p‖q)) column by column (`column_terms`). `slope` is dD/dz of a block of columns.

To add a divergence: an entry, its functions, and a branch where they are called.
`dgrpo.ops.divergences` is the twin in plain torch.

u, v: logits less the row's maximum. lp, lq: log p, log q. parameter: C, beta or w, one per row.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from dgrpo_kernels.logits import FLOOR, exp


class Divergence(NamedTuple):
    """The compile-time code, and how many passes over the row its value takes."""

    code: int
    passes: int


DIVERGENCES = {
    "none": Divergence(0, 0),
    "reverse_kl": Divergence(1, 1),
    "forward_kl": Divergence(2, 1),
    "clipped_forward_kl": Divergence(3, 2),
    "jsd": Divergence(4, 2),
    "jeffreys": Divergence(6, 2),
    "bucket": Divergence(5, 0),  # the slope of any of them in a top-k teacher's tail: see RowStats
}
NONE = tl.constexpr(DIVERGENCES["none"].code)
REVERSE_KL = tl.constexpr(DIVERGENCES["reverse_kl"].code)
FORWARD_KL = tl.constexpr(DIVERGENCES["forward_kl"].code)
CLIPPED_FORWARD_KL = tl.constexpr(DIVERGENCES["clipped_forward_kl"].code)
JSD = tl.constexpr(DIVERGENCES["jsd"].code)
JEFFREYS = tl.constexpr(DIVERGENCES["jeffreys"].code)


# reverse KL: the sum of e^u (u - v)


@triton.jit
def _move_reverse_kl(cross, sum_z, step_z, step_t, decay_z):
    return decay_z * (cross + (step_z - step_t) * sum_z)


@triton.jit
def _reverse_kl_slope(p, lp, lq, divergence):
    return p * (lp - lq - divergence)


# forward KL: the sum of e^v (v - u)


@triton.jit
def _move_forward_kl(cross, sum_t, step_z, step_t, decay_t):
    # Infinite where the student forbids what the teacher says, until that q underflows.
    return tl.where(decay_t > 0, decay_t * (cross + (step_t - step_z) * sum_t), 0.0)


@triton.jit
def _forward_kl_slope(p, lq):
    return p - exp(lq)


# clipped forward KL


@triton.jit
def _clipped_forward_kl_terms(q, lp, lq, clip):
    term = tl.where(q > 0, q * (lq - lp), 0.0)
    return tl.minimum(term, clip), tl.where(term < clip, q, 0.0)


@triton.jit
def _clipped_forward_kl_slope(p, lp, lq, aux, clip):
    q = exp(lq)
    unclipped = q * (lq - lp) < clip
    return p * aux - tl.where(unclipped, q, 0.0)


# JSD


@triton.jit
def _jsd_terms(p, q, lp, lq, beta):
    lp = tl.where(p > 0, lp, FLOOR)
    top = tl.maximum(lp, lq)
    log_mix = top + tl.log((1.0 - beta) * exp(lp - top) + beta * exp(lq - top))
    student = tl.where(p > 0, p * (lp - log_mix), 0.0)
    teacher = tl.where(q > 0, q * (lq - log_mix), 0.0)
    return beta * teacher + (1.0 - beta) * student, student


@triton.jit
def _jsd_slope(p, lp, lq, aux, beta):
    x = lp + tl.log(1.0 - beta)
    y = lq + tl.log(beta)
    top = tl.maximum(x, y)
    log_mix = top + tl.log(exp(x - top) + exp(y - top))
    return (1.0 - beta) * p * (lp - log_mix - aux)


# Jeffreys


@triton.jit
def _jeffreys_terms(p, q, lp, lq, weight):
    student = tl.where(p > 0, p * (lp - lq), 0.0)
    teacher = tl.where(q > 0, weight * q * (lq - lp), 0.0)
    return tl.where(weight == 0, 0.0, teacher) + (1.0 - weight) * student, student


@triton.jit
def _jeffreys_slope(p, lp, lq, aux, weight):
    return weight * (p - exp(lq)) + (1.0 - weight) * p * (lp - lq - aux)


# what the row kernels call


@triton.jit
def online_terms(u, v, e, f, HOLES: tl.constexpr, DIVERGENCE: tl.constexpr):
    """Each column's part of the sum of a divergence of one pass. e, f: e^u, e^v."""
    if DIVERGENCE == REVERSE_KL:
        terms = e * (u - v)
        weight = e
    else:
        terms = f * (v - u)
        weight = f
    return tl.where(weight > 0, terms, 0.0) if HOLES else terms


@triton.jit
def move_online(
    cross, sum_z, sum_t, step_z, step_t, decay_z, decay_t, DIVERGENCE: tl.constexpr
):  # fmt: skip
    """That sum after the maxima moved by `-step`. decay: e^step; sum_z, sum_t: of e^u, e^v."""
    if DIVERGENCE == REVERSE_KL:
        cross = _move_reverse_kl(cross, sum_z, step_z, step_t, decay_z)
    else:
        cross = _move_forward_kl(cross, sum_t, step_z, step_t, decay_t)
    return cross


@triton.jit
def online_value(cross, total_z, total_t, log_sum_z, log_sum_t, DIVERGENCE: tl.constexpr):
    """A divergence of one pass from its finished sum."""
    if DIVERGENCE == REVERSE_KL:
        value = cross / total_z - log_sum_z + log_sum_t
    else:
        value = cross / total_t + log_sum_z - log_sum_t
    return value


@triton.jit
def column_terms(p, q, lp, lq, parameter, DIVERGENCE: tl.constexpr):
    """Each column's part of the value and of `aux`, of a divergence of two passes."""
    if DIVERGENCE == CLIPPED_FORWARD_KL:
        value, aux = _clipped_forward_kl_terms(q, lp, lq, parameter)
    elif DIVERGENCE == JSD:
        value, aux = _jsd_terms(p, q, lp, lq, parameter)
    else:
        value, aux = _jeffreys_terms(p, q, lp, lq, parameter)
    return value, aux


@triton.jit
def slope(lp, lq, p, divergence, aux, parameter, DIVERGENCE: tl.constexpr):
    """dD/dz of a block of columns. `lp` is finite, and `lq` too but for "bucket"."""
    if DIVERGENCE == REVERSE_KL:
        g = _reverse_kl_slope(p, lp, lq, divergence)
    elif DIVERGENCE == FORWARD_KL:
        g = _forward_kl_slope(p, lq)
    elif DIVERGENCE == CLIPPED_FORWARD_KL:
        g = _clipped_forward_kl_slope(p, lp, lq, aux, parameter)
    elif DIVERGENCE == JSD:
        g = _jsd_slope(p, lp, lq, aux, parameter)
    elif DIVERGENCE == JEFFREYS:
        g = _jeffreys_slope(p, lp, lq, aux, parameter)
    else:
        g = p * aux - exp(lq)
    return g
