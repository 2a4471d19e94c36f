"""Gradient of rows of logits, from statistics and three numbers per row.

    G_v = a (1[v=y] - p_v) + b dD/dz_v - c p_v (log p_v + entropy),   times d logit / d raw

with dD/dz from `divergences`; that of "bucket", for the columns that a top-k teacher lacks, is
p_v aux - q_v (`RowStats` says what aux and q are).

a = dL/dlogp, b = dL/dD, c = dL/dentropy: given, or computed in the prologue from the clipped dGRPO
objective (`dgrpo_row`).

Traffic: one read of each logits block (8 V bytes with a teacher), one write of G (2 V in bf16).
Grid: SPLITS programs per row, each taking every SPLITS-th block of columns. G is a buffer of its
own: over z, a program would overwrite columns that another has not read.
"""

from __future__ import annotations

from math import inf

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgrpo_kernels import layout as at
from dgrpo_kernels.dgrpo_row import dgrpo_row
from dgrpo_kernels.divergences import DIVERGENCES, NONE, slope
from dgrpo_kernels.logits import FLOOR, LOWEST, chain, load_row, logits_of, rounded
from dgrpo_kernels.rows import Logits, PolicyRows, check_rows


@triton.jit(
    do_not_specialize=["stats_row", "coef_row", "in_row", "out_row"],
    do_not_specialize_on_alignment=[
        "targets_ptr", "stats_ptr", "parameters_ptr", "coef_ptr", "in_ptr", "out_ptr",
    ],
)  # fmt: skip
def _row_grad_kernel(
    z_ptr, t_ptr, z_bias_ptr, t_bias_ptr, targets_ptr, stats_ptr, parameters_ptr, coef_ptr, in_ptr,
    grad_ptr, out_ptr,
    V, z_row, t_row, grad_row, stats_row, coef_row, in_row, out_row,
    z_scale, z_softcap, z_inv_temperature, t_scale, t_softcap, t_inv_temperature, parameter,
    clip_low, clip_high, clip_dual, is_cap, ref_coef, entropy_coef,
    Z_SOFTCAP: tl.constexpr, T_SOFTCAP: tl.constexpr, DIVERGENCE: tl.constexpr,
    ROUND_POLICY: tl.constexpr,
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_SAMPLER: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    stats_ptr += row
    max_z = tl.load(stats_ptr + stats_row * at.MAX_Z)
    log_sum_z = tl.load(stats_ptr + stats_row * at.LOG_SUM_Z)
    logp = tl.load(stats_ptr + stats_row * at.LOGPROBS)
    entropy = tl.load(stats_ptr + stats_row * at.ENTROPY)
    target = tl.load(targets_ptr + row)
    divergence = 0.0 * entropy
    if DIVERGENCE != NONE:
        divergence = tl.load(stats_ptr + stats_row * at.DIVERGENCE_ROW)
        aux = tl.load(stats_ptr + stats_row * at.AUX)
        max_t = tl.load(stats_ptr + stats_row * at.MAX_T)
        log_sum_t = tl.load(stats_ptr + stats_row * at.LOG_SUM_T)
        if parameters_ptr is not None:
            parameter = tl.load(parameters_ptr + row)
    if t_ptr is not None:
        t_ptr += row * t_row
    if ROUND_POLICY:
        max_b = tl.load(stats_ptr + stats_row * at.POLICY_MAX)
        log_sum_b = tl.load(stats_ptr + stats_row * at.POLICY_LOG_SUM)

    if in_ptr is not None:
        loss, ratio, clipped, clamped, a, b, c = dgrpo_row(
            in_ptr + row, in_row, logp, divergence, entropy,
            clip_low, clip_high, clip_dual, is_cap, ref_coef, entropy_coef,
            HAS_OLD, HAS_REF, HAS_WEIGHTS, HAS_SAMPLER,
        )  # fmt: skip
        if split == 0:
            out_ptr += row
            tl.store(out_ptr + out_row * at.LOSSES, loss)
            tl.store(out_ptr + out_row * at.RATIO, ratio)
            tl.store(out_ptr + out_row * at.CLIPPED, clipped.to(tl.float32))
            tl.store(out_ptr + out_row * at.CLAMPED, clamped.to(tl.float32))
            tl.store(out_ptr + out_row * at.COEF_A, a)
            tl.store(out_ptr + out_row * at.COEF_B, b)
            tl.store(out_ptr + out_row * at.COEF_C, c)
    else:
        a = tl.load(coef_ptr + row)
        b = tl.load(coef_ptr + row + coef_row)
        c = tl.load(coef_ptr + row + 2 * coef_row)

    z_ptr += row * z_row
    grad_ptr += row * grad_row
    lanes = tl.arange(0, BLOCK)
    for start in range(split * BLOCK, V, SPLITS * BLOCK):
        cols = start + lanes
        x = load_row(z_ptr, z_bias_ptr, cols, z_row, V)
        z = logits_of(x, z_scale, z_softcap, z_inv_temperature, Z_SOFTCAP)
        u = z - max_z
        p = tl.exp(u - log_sum_z)
        lp = tl.maximum(u - log_sum_z, LOWEST)  # finite: 0 * inf does not arise
        g = -tl.where(c == 0, 0.0, c * p * (lp + entropy))
        if DIVERGENCE != NONE:
            lq = z - max_t - log_sum_t
            if t_ptr is not None:
                y = load_row(t_ptr, t_bias_ptr, cols, t_row, V)
                v = logits_of(y, t_scale, t_softcap, t_inv_temperature, T_SOFTCAP) - max_t
                lq = tl.maximum(v, FLOOR) - log_sum_t
            d = slope(lp, lq, p, divergence, aux, parameter, DIVERGENCE)
            g += tl.where(b == 0, 0.0, b * d)
        policy = p
        if ROUND_POLICY:
            x_b = rounded(x)
            z_b = logits_of(x_b, z_scale, z_softcap, z_inv_temperature, Z_SOFTCAP)
            policy = tl.exp(z_b - max_b - log_sum_b)
        policy = tl.where(a == 0, 0.0, a * (tl.where(cols == target, 1.0, 0.0) - policy))
        factor = chain(x, z_scale, z_softcap, z_inv_temperature, Z_SOFTCAP)
        if ROUND_POLICY and Z_SOFTCAP:
            factor_b = chain(x_b, z_scale, z_softcap, z_inv_temperature, Z_SOFTCAP)
            g = g * factor + policy * factor_b
        else:
            g = (g + policy) * factor
        g = tl.where(x == float("-inf"), 0.0, g)
        tl.store(grad_ptr + cols, g.to(grad_ptr.dtype.element_ty), mask=cols < grad_row)


def row_grad(
    z: Logits,
    t: Logits | None,
    targets: Tensor,
    stats: Tensor,
    coef: Tensor | None,
    out: Tensor,
    *,
    policy: PolicyRows | None = None,
    divergence: str = "reverse_kl",
    parameter: float | Tensor | None = None,
    round_policy: bool = False,
) -> None:
    """Write dL/draw of rows of logits into `out`, (R, V) in the dtype of the matrix products.

    coef: (3, R) fp32 rows a, b, c, or None with `policy`, whose objective then gives them in the
    prologue and fills `policy.outputs`. stats: the finished (11, R) statistics. parameter: the
    divergence's own, a number or (R,) fp32. A zero coefficient skips its term; the loss of a row
    whose log-probability is NaN is NaN.
    """
    teacher = Logits(z.raw) if t is None else t
    for name, block in (("z", z.raw), ("out", out), ("t", teacher.raw)):
        check_rows(name, block)
    rows, V = z.raw.shape
    block, warps, splits = at.grad_block(V)
    per_row = isinstance(parameter, Tensor)
    context = None if policy is None else policy.context
    numbers = (0.0,) * 6
    if context is not None:
        numbers = (
            context.clip_low, context.clip_high, context.clip_dual, context.is_cap,
            context.ref_coef, context.entropy_coef,
        )  # fmt: skip
    inputs, outputs = (None, None) if policy is None else (policy.inputs, policy.outputs)
    strides = (0 if x is None else x.stride(0) for x in (coef, inputs, outputs))
    with torch.cuda.device_of(z.raw):
        _row_grad_kernel[(rows * splits,)](
            z.raw, None if t is None else t.raw, z.bias, teacher.bias, targets, stats,
            parameter if per_row else None, coef, inputs,
            out, outputs,
            V, z.raw.stride(0), teacher.raw.stride(0), out.stride(0), stats.stride(0), *strides,
            *z.scalars, *teacher.scalars, 0.0 if per_row else float(parameter or 0.0),
            *(inf if number is None else float(number) for number in numbers),
            Z_SOFTCAP=z.softcap is not None, T_SOFTCAP=teacher.softcap is not None,
            DIVERGENCE=DIVERGENCES[divergence].code, ROUND_POLICY=round_policy,
            HAS_OLD=getattr(context, "old_logprobs", None) is not None,
            HAS_REF=getattr(context, "ref_logprobs", None) is not None,
            HAS_WEIGHTS=getattr(context, "policy_weights", None) is not None,
            HAS_SAMPLER=getattr(context, "sampler_logprobs", None) is not None,
            SPLITS=splits, BLOCK=block, num_warps=warps,
        )  # fmt: skip
