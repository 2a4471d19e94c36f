"""Gradient of rows of logits, from statistics and three numbers a row.

    G_v = a (1[v=y] - p_v) + b dD/dz_v - c p_v (log p_v + entropy),   times d logit / d raw

    dD/dz_v   reverse KL          p_v (log p_v - log q_v - D)
              forward KL          p_v - q_v
              clipped forward KL  p_v S - q_v 1[q_v log(q_v/p_v) < C],  S = sum of the unclipped q
              JSD                 (1 - beta) p_v (log p_v - log M_v - KL(p‖M))
              bucket              p_v aux - q_v, for the columns that a top-k teacher lacks

(`RowStats` says what aux and q are for "bucket").

a = dL/dlogp, b = dL/dD, c = dL/dentropy: given, or computed in the prologue from the clipped dGRPO
objective (`dgrpo_row`).

Traffic: one read of each logits block (8 V bytes with a teacher), one write of G (2 V in bf16).
Grid: SPLITS programs a row, each taking every SPLITS-th block of columns. G is a buffer of its own:
over z, a program would overwrite columns that another has not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgrpo_kernels.dgrpo_row import dgrpo_row
from dgrpo_kernels.logits import FLOOR, LOWEST, chain, load_row, logits_of, rounded
from dgrpo_kernels.rows import DIVERGENCES, NO_POLICY, Logits, PolicyRows, check_rows


@triton.jit
def _divergence_grad(lp, lq, p, divergence, aux, clip, jsd_beta, DIVERGENCE: tl.constexpr):
    """dD/dz of a block of columns. `lp` is finite, and `lq` too but for "bucket"."""
    if DIVERGENCE == 1:
        g = p * (lp - lq - divergence)
    elif DIVERGENCE == 2:
        g = p - tl.exp(lq)
    elif DIVERGENCE == 3:
        q = tl.exp(lq)
        unclipped = q * (lq - lp) < clip
        g = p * aux - tl.where(unclipped, q, 0.0)
    elif DIVERGENCE == 4:
        x = lp + tl.log(1.0 - jsd_beta)
        y = lq + tl.log(jsd_beta)
        top = tl.maximum(x, y)
        log_mix = top + tl.log(tl.exp(x - top) + tl.exp(y - top))
        g = (1.0 - jsd_beta) * p * (lp - log_mix - aux)
    else:
        g = p * aux - tl.exp(lq)
    return g


@triton.jit(
    do_not_specialize=["stats_row", "coef_row", "in_row", "out_row"],
    do_not_specialize_on_alignment=["targets_ptr", "stats_ptr", "coef_ptr", "in_ptr", "out_ptr"],
)
def _row_grad_kernel(
    z_ptr,
    t_ptr,
    z_bias_ptr,
    t_bias_ptr,
    targets_ptr,
    stats_ptr,
    coef_ptr,
    in_ptr,
    # outputs
    grad_ptr,
    out_ptr,
    # sizes and row strides
    V,
    z_row,
    t_row,
    grad_row,
    stats_row,
    coef_row,
    in_row,
    out_row,
    # scalars
    z_scale,
    z_softcap,
    z_inv_temperature,
    t_scale,
    t_softcap,
    t_inv_temperature,
    divergence_clip,
    jsd_beta,
    clip_low,
    clip_high,
    clip_dual,
    is_cap,
    ref_coef,
    entropy_coef,
    # compile-time
    Z_SOFTCAP: tl.constexpr,
    T_SOFTCAP: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    ROUND_POLICY: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SAMPLER: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    stats_ptr += row
    max_z = tl.load(stats_ptr)
    log_sum_z = tl.load(stats_ptr + stats_row)
    logp = tl.load(stats_ptr + 4 * stats_row)
    entropy = tl.load(stats_ptr + 7 * stats_row)
    target = tl.load(targets_ptr + row)
    divergence = 0.0 * entropy
    aux = divergence
    max_t = divergence
    log_sum_t = divergence
    if DIVERGENCE > 0:
        divergence = tl.load(stats_ptr + 6 * stats_row)
    if DIVERGENCE > 2:
        aux = tl.load(stats_ptr + 8 * stats_row)
    if DIVERGENCE == 5 or t_ptr is not None:
        max_t = tl.load(stats_ptr + 2 * stats_row)
        log_sum_t = tl.load(stats_ptr + 3 * stats_row)
    if t_ptr is not None:
        t_ptr += row * t_row
    if ROUND_POLICY:
        max_b = tl.load(stats_ptr + 9 * stats_row)
        log_sum_b = tl.load(stats_ptr + 10 * stats_row)

    if in_ptr is not None:
        loss, ratio, clipped, clamped, a, b, c = dgrpo_row(
            in_ptr + row,
            in_row,
            logp,
            divergence,
            entropy,
            clip_low,
            clip_high,
            clip_dual,
            is_cap,
            ref_coef,
            entropy_coef,
            HAS_OLD,
            HAS_REF,
            HAS_WEIGHTS,
            HAS_SAMPLER,
        )
        if split == 0:
            out_ptr += row
            tl.store(out_ptr, loss)
            tl.store(out_ptr + out_row, ratio)
            tl.store(out_ptr + 2 * out_row, clipped.to(tl.float32))
            tl.store(out_ptr + 3 * out_row, clamped.to(tl.float32))
            tl.store(out_ptr + 4 * out_row, a)
            tl.store(out_ptr + 5 * out_row, b)
            tl.store(out_ptr + 6 * out_row, c)
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
        if DIVERGENCE > 0:
            lq = z - max_t - log_sum_t
            if t_ptr is not None:
                y = load_row(t_ptr, t_bias_ptr, cols, t_row, V)
                v = logits_of(y, t_scale, t_softcap, t_inv_temperature, T_SOFTCAP) - max_t
                lq = tl.maximum(v, FLOOR) - log_sum_t
            d = _divergence_grad(lp, lq, p, divergence, aux, divergence_clip, jsd_beta, DIVERGENCE)
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


def grad_block(V: int) -> tuple[int, int, int]:
    """Columns a step, warps, and programs a row: 256 rows are to fill a chip.

    8 columns a thread give 16-byte loads and stores. Twice the columns and warps spill with the
    JSD, a soft cap and a rounded policy at once (ahead-of-time check, triton 3.9).
    """
    block = min(1024, triton.next_power_of_2(V))
    return block, 4, min(8, triton.cdiv(V, block))


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
    divergence_clip: float | None = None,
    jsd_beta: float = 0.5,
    round_policy: bool = False,
) -> None:
    """Write dL/draw of rows of logits into `out`, (R, V) in the dtype of the matrix products.

    coef: (3, R) fp32 rows a, b, c, or None with `policy`, whose objective then gives them in the
    prologue and fills `policy.outputs`. stats: the finished (11, R) statistics. A zero coefficient
    skips its term; the loss of a row whose log-probability is NaN is NaN.
    """
    for name, block in (("z", z.raw), ("out", out), ("t", z.raw if t is None else t.raw)):
        check_rows(name, block)
    rows, V = z.raw.shape
    block, warps, splits = grad_block(V)
    teacher = Logits(z.raw) if t is None else t
    at = NO_POLICY if policy is None else policy
    with torch.cuda.device_of(z.raw):
        _row_grad_kernel[(rows * splits,)](
            z.raw,
            None if t is None else t.raw,
            z.bias,
            teacher.bias,
            targets,
            stats,
            coef,
            at.inputs,
            out,
            at.outputs,
            V,
            z.raw.stride(0),
            teacher.raw.stride(0),
            out.stride(0),
            stats.stride(0),
            0 if coef is None else coef.stride(0),
            0 if policy is None else policy.inputs.stride(0),
            0 if policy is None else policy.outputs.stride(0),
            float(z.scale),
            float(z.softcap or 1.0),
            1.0 / z.temperature,
            float(teacher.scale),
            float(teacher.softcap or 1.0),
            1.0 / teacher.temperature,
            float(divergence_clip or 0.0),
            float(jsd_beta),
            float(at.clip_low),
            float(at.clip_high),
            float(at.clip_dual),
            float(at.is_cap),
            float(at.ref_coef),
            float(at.entropy_coef),
            Z_SOFTCAP=z.softcap is not None,
            T_SOFTCAP=teacher.softcap is not None,
            DIVERGENCE=DIVERGENCES[divergence],
            ROUND_POLICY=round_policy,
            HAS_OLD=at.has_old,
            HAS_REF=at.has_ref,
            HAS_WEIGHTS=at.has_weights,
            HAS_SAMPLER=at.has_sampler,
            SPLITS=splits,
            BLOCK=block,
            num_warps=warps,
        )
