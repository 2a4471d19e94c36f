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

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgrpo_kernels import layout as at
from dgrpo_kernels import logits
from dgrpo_kernels.dgrpo_row import dgrpo_row, policy_flags, policy_numbers, store_policy
from dgrpo_kernels.divergences import DIVERGENCES, NONE, slope
from dgrpo_kernels.logits import FLOOR, LOG2E, LOWEST, chain, exp, load_raw, logits_of, rounded
from dgrpo_kernels.rows import CAPPED, Logits, PolicyRows, check_rows

FOLDS = ("none", "reverse_kl")  # their slopes are linear in u and v


@triton.jit
def fold(
    a, b, c, log_sum_z, log_sum_t, entropy, divergence, factor, TEACHER: tl.constexpr
):  # fmt: skip
    """Coefficients with which G is `p (of_u u + of_v v + fixed)`, but for the target's 1."""
    of_u = -c
    of_v = 0.0 * c
    fixed = tl.where(c == 0, 0.0, c * (log_sum_z - entropy)) - a
    if TEACHER:
        of_u += b
        of_v = -b
        fixed += tl.where(b == 0, 0.0, b * (log_sum_t - log_sum_z - divergence))
    return of_u * factor, of_v * factor, fixed * factor


@triton.jit
def folded(
    cols, z_ptr, t_ptr, z_row, t_row, z_factor, t_factor, max_z, max_t, log2_sum, of_u, of_v, fixed,
    Z_FORM: tl.constexpr, T_FORM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`p (of_u u + of_v v + fixed)` of a block of columns: all of G but the target's 1."""
    x = load_raw(z_ptr, None, cols, z_row, MASKED)
    if t_ptr is not None:
        y = load_raw(t_ptr, None, cols, t_row, MASKED)
    u = logits_of(x, z_factor, 1.0, 1.0, Z_FORM, False) - max_z
    g = u * of_u + fixed
    if t_ptr is not None:
        g += (logits_of(y, t_factor, 1.0, 1.0, T_FORM, False) - max_t) * of_v
    return tl.exp2(u * LOG2E - log2_sum) * g


@triton.jit
def _general(
    cols, target, z_ptr, t_ptr, z_bias_ptr, t_bias_ptr, z_row, t_row,
    z_scale, z_softcap, z_inv_temperature, t_scale, t_softcap, t_inv_temperature,
    max_z, log_sum_z, max_t, log_sum_t, max_b, log_sum_b, entropy, divergence, aux, parameter,
    a, b, c,
    Z_FORM: tl.constexpr, T_FORM: tl.constexpr, HOLES: tl.constexpr, T_HOLES: tl.constexpr,
    DIVERGENCE: tl.constexpr, ROUND_POLICY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """G of a block of columns, term by term."""
    x = load_raw(z_ptr, z_bias_ptr, cols, z_row, MASKED)
    z = logits_of(x, z_scale, z_softcap, z_inv_temperature, Z_FORM, HOLES)
    lp = z - max_z - log_sum_z
    p = exp(lp)
    if HOLES:
        lp = tl.maximum(lp, LOWEST)  # finite: 0 * inf does not arise
    g = -tl.where(c == 0, 0.0, c * p * (lp + entropy))
    if DIVERGENCE != NONE:
        lq = z - max_t - log_sum_t
        if t_ptr is not None:
            y = load_raw(t_ptr, t_bias_ptr, cols, t_row, MASKED)
            v = logits_of(y, t_scale, t_softcap, t_inv_temperature, T_FORM, T_HOLES) - max_t
            lq = (tl.maximum(v, FLOOR) if T_HOLES else v) - log_sum_t
        d = slope(lp, lq, p, divergence, aux, parameter, DIVERGENCE)
        g += tl.where(b == 0, 0.0, b * d)
    policy = p
    if ROUND_POLICY:
        x_b = rounded(x)
        z_b = logits_of(x_b, z_scale, z_softcap, z_inv_temperature, Z_FORM, HOLES)
        policy = exp(z_b - max_b - log_sum_b)
    policy = tl.where(a == 0, 0.0, a * (tl.where(cols == target, 1.0, 0.0) - policy))
    factor = chain(x, z_scale, z_softcap, z_inv_temperature, Z_FORM)
    if ROUND_POLICY and Z_FORM == logits.CAPPED:
        factor_b = chain(x_b, z_scale, z_softcap, z_inv_temperature, Z_FORM)
        g = g * factor + policy * factor_b
    else:
        g = (g + policy) * factor
    return tl.where(x == float("-inf"), 0.0, g) if HOLES else g


@triton.jit
def write(grad_ptr, cols, g, grad_row, MASKED: tl.constexpr):
    g = g.to(grad_ptr.dtype.element_ty)
    if MASKED:
        tl.store(grad_ptr + cols, g, mask=cols < grad_row)
    else:
        tl.store(grad_ptr + cols, g)


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
    Z_FORM: tl.constexpr, T_FORM: tl.constexpr, HOLES: tl.constexpr, T_HOLES: tl.constexpr,
    DIVERGENCE: tl.constexpr, ROUND_POLICY: tl.constexpr,
    FOLDED: tl.constexpr,  # no holes, soft cap or rounded policy; no divergence but the reverse KL
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
    aux = divergence
    max_t = max_z
    log_sum_t = log_sum_z
    if DIVERGENCE != NONE:
        divergence = tl.load(stats_ptr + stats_row * at.DIVERGENCE_ROW)
        aux = tl.load(stats_ptr + stats_row * at.AUX)
        max_t = tl.load(stats_ptr + stats_row * at.MAX_T)
        log_sum_t = tl.load(stats_ptr + stats_row * at.LOG_SUM_T)
        if parameters_ptr is not None:
            parameter = tl.load(parameters_ptr + row)
    max_b = max_z
    log_sum_b = log_sum_z
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
            store_policy(out_ptr + row, out_row, loss, ratio, clipped, clamped, a, b, c)
    else:
        a = tl.load(coef_ptr + row)
        b = tl.load(coef_ptr + row + coef_row)
        c = tl.load(coef_ptr + row + 2 * coef_row)

    z_ptr += row * z_row
    grad_ptr += row * grad_row
    if t_ptr is not None:
        t_ptr += row * t_row
    lanes = tl.arange(0, BLOCK)
    blocks = V // BLOCK
    full = blocks * BLOCK
    last = tl.where(split == blocks % SPLITS, V, full)  # whose turn the rest of the columns is
    STEP: tl.constexpr = SPLITS * BLOCK
    if FOLDED:
        factor = z_scale * z_inv_temperature
        of_u, of_v, fixed = fold(
            a, b, c, log_sum_z, log_sum_t, entropy, divergence, factor, t_ptr is not None
        )  # fmt: skip
        if t_ptr is not None:
            # A skipped teacher may hold NaN: the student's own row stands in for it.
            t_ptr = tl.where(b == 0, z_ptr, t_ptr)
            max_t = tl.where(b == 0, max_z, max_t)
        t_factor = t_scale * t_inv_temperature
        log2_sum = log_sum_z * LOG2E
        for REST in tl.static_range(2):
            for start in range(full if REST else split * BLOCK, last if REST else full, STEP):
                cols = start + lanes
                g = folded(
                    cols, z_ptr, t_ptr, z_row, t_row, factor, t_factor, max_z, max_t, log2_sum,
                    of_u, of_v, fixed, Z_FORM, T_FORM, REST == 1,
                )  # fmt: skip
                write(grad_ptr, cols, g, grad_row, REST == 1)
        if (target >= 0) & (target < V) & (target // BLOCK % SPLITS == split):
            tl.debug_barrier()  # its column was written above, by another thread
            g = a * factor + folded(
                target, z_ptr, t_ptr, z_row, t_row, factor, t_factor, max_z, max_t,
                log2_sum, of_u, of_v, fixed, Z_FORM, T_FORM, False,
            )  # fmt: skip
            tl.store(grad_ptr + target, g.to(grad_ptr.dtype.element_ty))
    else:
        for REST in tl.static_range(2):
            for start in range(full if REST else split * BLOCK, last if REST else full, STEP):
                cols = start + lanes
                g = _general(
                    cols, target, z_ptr, t_ptr, z_bias_ptr, t_bias_ptr, z_row, t_row,
                    z_scale, z_softcap, z_inv_temperature, t_scale, t_softcap, t_inv_temperature,
                    max_z, log_sum_z, max_t, log_sum_t, max_b, log_sum_b, entropy, divergence, aux,
                    parameter, a, b, c,
                    Z_FORM, T_FORM, HOLES, T_HOLES, DIVERGENCE, ROUND_POLICY, REST == 1,
                )  # fmt: skip
                write(grad_ptr, cols, g, grad_row, REST == 1)


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
    teacher = z if t is None else t
    for name, block in (("z", z.raw), ("out", out), ("t", teacher.raw)):
        check_rows(name, block)
    rows, V = z.raw.shape
    block, warps, splits = at.grad_block(V)
    per_row = isinstance(parameter, Tensor)
    inputs, outputs = (None, None) if policy is None else (policy.inputs, policy.outputs)
    strides = (0 if x is None else x.stride(0) for x in (coef, inputs, outputs))
    folded = divergence in FOLDS and not (round_policy or z.holes or teacher.holes)
    folded = folded and CAPPED not in (z.form, teacher.form)
    with torch.cuda.device_of(z.raw):
        _row_grad_kernel[(rows * splits,)](
            z.raw, None if t is None else t.raw, z.bias, None if t is None else t.bias, targets,
            stats,
            parameter if per_row else None, coef, inputs,
            out, outputs,
            V, z.raw.stride(0), teacher.raw.stride(0), out.stride(0), stats.stride(0), *strides,
            *z.scalars, *teacher.scalars, 0.0 if per_row else float(parameter or 0.0),
            *policy_numbers(policy),
            Z_FORM=z.form, T_FORM=teacher.form, HOLES=z.holes, T_HOLES=teacher.holes,
            DIVERGENCE=DIVERGENCES[divergence].code, ROUND_POLICY=round_policy, FOLDED=folded,
            **policy_flags(policy),
            SPLITS=splits, BLOCK=block, num_warps=warps,
        )  # fmt: skip
