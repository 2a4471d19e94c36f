"""Divergences that need both normalisers first: a second pass over the rows.

    clipped forward KL   D = sum_v min(q log(q/p), C),         aux = S = sum of the unclipped q
    JSD                  D = beta KL(q‖M) + (1-beta) KL(p‖M),  aux = KL(p‖M)
                         with M = (1-beta) p + beta q

(the JSD's convention is TRL's, GKD 2306.13649). Sums are over the columns at hand, so the shards of
a vocabulary-parallel head add up. Traffic: 8 V bytes a row. Grid: one program a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgrpo_kernels.logits import FLOOR, load_row, logits_of
from dgrpo_kernels.rows import DIVERGENCES, Logits, check_rows


@triton.jit(
    do_not_specialize=["stats_row"],
    do_not_specialize_on_alignment=["stats_ptr"],
)
def _row_divergence_kernel(
    z_ptr,
    t_ptr,
    z_bias_ptr,
    t_bias_ptr,
    stats_ptr,
    V,
    z_row,
    t_row,
    stats_row,
    z_scale,
    z_softcap,
    z_inv_temperature,
    t_scale,
    t_softcap,
    t_inv_temperature,
    divergence_clip,
    jsd_beta,
    Z_SOFTCAP: tl.constexpr,
    T_SOFTCAP: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_row
    t_ptr += row * t_row
    stats_ptr += row
    max_z = tl.load(stats_ptr)
    log_sum_z = tl.load(stats_ptr + stats_row)
    max_t = tl.load(stats_ptr + 2 * stats_row)
    log_sum_t = tl.load(stats_ptr + 3 * stats_row)
    lanes = tl.arange(0, BLOCK)
    divergence = tl.zeros((BLOCK,), tl.float32)
    aux = divergence
    for start in range(0, V, BLOCK):
        cols = start + lanes
        x = load_row(z_ptr, z_bias_ptr, cols, z_row, V)
        y = load_row(t_ptr, t_bias_ptr, cols, t_row, V)
        z = logits_of(x, z_scale, z_softcap, z_inv_temperature, Z_SOFTCAP)
        t = logits_of(y, t_scale, t_softcap, t_inv_temperature, T_SOFTCAP)
        lp = z - max_z - log_sum_z
        lq = tl.maximum(t - max_t, FLOOR) - log_sum_t
        p = tl.exp(lp)
        q = tl.exp(lq)
        if DIVERGENCE == 3:
            term = tl.where(q > 0, q * (lq - lp), 0.0)
            divergence += tl.minimum(term, divergence_clip)
            aux += tl.where(term < divergence_clip, q, 0.0)
        else:
            lp = tl.where(p > 0, lp, FLOOR)
            top = tl.maximum(lp, lq)
            odds_p = (1.0 - jsd_beta) * tl.exp(lp - top)
            log_mix = top + tl.log(odds_p + jsd_beta * tl.exp(lq - top))
            student = tl.where(p > 0, p * (lp - log_mix), 0.0)
            teacher = tl.where(q > 0, q * (lq - log_mix), 0.0)
            divergence += jsd_beta * teacher + (1.0 - jsd_beta) * student
            aux += student
    tl.store(stats_ptr + 6 * stats_row, tl.sum(divergence, 0))
    tl.store(stats_ptr + 8 * stats_row, tl.sum(aux, 0))


def row_divergence(
    z: Logits,
    t: Logits,
    stats: Tensor,
    *,
    divergence: str,
    divergence_clip: float | None = None,
    jsd_beta: float = 0.5,
) -> None:
    """Add the divergence and its `aux` to finished statistics.

    z, t: (R, V) fp32 logits. stats: the (11, R) view that `row_stats` wrote (merged over the shards
    of a vocabulary-parallel head). divergence: "clipped_forward_kl" or "jsd".
    """
    check_rows("z", z.raw)
    check_rows("t", t.raw)
    rows, V = z.raw.shape
    block = min(2048, triton.next_power_of_2(V))
    with torch.cuda.device_of(z.raw):
        _row_divergence_kernel[(rows,)](
            z.raw,
            t.raw,
            z.bias,
            t.bias,
            stats,
            V,
            z.raw.stride(0),
            t.raw.stride(0),
            stats.stride(0),
            float(z.scale),
            float(z.softcap or 1.0),
            1.0 / z.temperature,
            float(t.scale),
            float(t.softcap or 1.0),
            1.0 / t.temperature,
            float(divergence_clip or 0.0),
            float(jsd_beta),
            Z_SOFTCAP=z.softcap is not None,
            T_SOFTCAP=t.softcap is not None,
            DIVERGENCE=DIVERGENCES[divergence],
            BLOCK=block,
            num_warps=8 if V > 1024 else 4,
        )
