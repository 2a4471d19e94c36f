"""Divergences that need both normalisers first: a second pass over the rows.

The formulas are in `divergences`. Sums are over the columns at hand, so the shards of a
vocabulary-parallel head add up. Traffic: 8 V bytes per row. Grid: one program per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgrpo_kernels import layout as at
from dgrpo_kernels.divergences import DIVERGENCES, column_terms
from dgrpo_kernels.logits import FLOOR, exp, load_raw, logits_of, within
from dgrpo_kernels.rows import Logits, check_rows


@triton.jit
def _terms(
    cols, z_ptr, t_ptr, z_bias_ptr, t_bias_ptr, V, z_row, t_row,
    z_scale, z_softcap, z_inv_temperature, t_scale, t_softcap, t_inv_temperature,
    max_z, log_sum_z, max_t, log_sum_t, parameter,
    Z_FORM: tl.constexpr, T_FORM: tl.constexpr, HOLES: tl.constexpr, T_HOLES: tl.constexpr,
    DIVERGENCE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Each column's part of the value and of `aux`."""
    x = load_raw(z_ptr, z_bias_ptr, cols, z_row, MASKED)
    y = load_raw(t_ptr, t_bias_ptr, cols, t_row, MASKED)
    z = logits_of(x, z_scale, z_softcap, z_inv_temperature, Z_FORM, HOLES)
    t = logits_of(y, t_scale, t_softcap, t_inv_temperature, T_FORM, T_HOLES)
    lp = within(z, cols, V, HOLES, MASKED) - max_z - log_sum_z
    v = within(t, cols, V, T_HOLES, MASKED) - max_t
    lq = (tl.maximum(v, FLOOR) if T_HOLES else v) - log_sum_t
    return column_terms(exp(lp), exp(lq), lp, lq, parameter, DIVERGENCE)


@triton.jit(
    do_not_specialize=["stats_row"],
    do_not_specialize_on_alignment=["stats_ptr", "parameters_ptr"],
)
def _row_divergence_kernel(
    z_ptr, t_ptr, z_bias_ptr, t_bias_ptr, stats_ptr, parameters_ptr,
    V, z_row, t_row, stats_row,
    z_scale, z_softcap, z_inv_temperature, t_scale, t_softcap, t_inv_temperature, parameter,
    Z_FORM: tl.constexpr, T_FORM: tl.constexpr, HOLES: tl.constexpr, T_HOLES: tl.constexpr,
    DIVERGENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_row
    t_ptr += row * t_row
    stats_ptr += row
    max_z = tl.load(stats_ptr + stats_row * at.MAX_Z)
    log_sum_z = tl.load(stats_ptr + stats_row * at.LOG_SUM_Z)
    max_t = tl.load(stats_ptr + stats_row * at.MAX_T)
    log_sum_t = tl.load(stats_ptr + stats_row * at.LOG_SUM_T)
    if parameters_ptr is not None:
        parameter = tl.load(parameters_ptr + row)
    lanes = tl.arange(0, BLOCK)
    divergence = tl.zeros((BLOCK,), tl.float32)
    aux = divergence
    full = V // BLOCK * BLOCK
    for REST in tl.static_range(2):  # whole blocks, then what is left, masked
        for start in range(full if REST else 0, V if REST else full, BLOCK):
            value_terms, aux_terms = _terms(
                start + lanes, z_ptr, t_ptr, z_bias_ptr, t_bias_ptr, V, z_row, t_row,
                z_scale, z_softcap, z_inv_temperature, t_scale, t_softcap, t_inv_temperature,
                max_z, log_sum_z, max_t, log_sum_t, parameter,
                Z_FORM, T_FORM, HOLES, T_HOLES, DIVERGENCE, REST == 1,
            )  # fmt: skip
            divergence += value_terms
            aux += aux_terms
    tl.store(stats_ptr + stats_row * at.DIVERGENCE_ROW, tl.sum(divergence, 0))
    tl.store(stats_ptr + stats_row * at.AUX, tl.sum(aux, 0))


def row_divergence(
    z: Logits,
    t: Logits,
    stats: Tensor,
    *,
    divergence: str,
    parameter: float | Tensor | None = None,
) -> None:
    """Add a divergence of two passes and its `aux` to finished statistics.

    z, t: (R, V) fp32 logits. stats: the (11, R) view that `row_stats` wrote (merged over the shards
    of a vocabulary-parallel head). parameter: the divergence's own, a number or (R,) fp32.
    """
    check_rows("z", z.raw)
    check_rows("t", t.raw)
    rows, V = z.raw.shape
    block, warps = at.divergence_block(V, z.bias is not None or t.bias is not None)
    per_row = isinstance(parameter, Tensor)
    with torch.cuda.device_of(z.raw):
        _row_divergence_kernel[(rows,)](
            z.raw, t.raw, z.bias, t.bias, stats, parameter if per_row else None,
            V, z.raw.stride(0), t.raw.stride(0), stats.stride(0),
            *z.scalars, *t.scalars, 0.0 if per_row else float(parameter or 0.0),
            Z_FORM=z.form, T_FORM=t.form, HOLES=z.holes, T_HOLES=t.holes,
            DIVERGENCE=DIVERGENCES[divergence].code, BLOCK=block, num_warps=warps,
        )  # fmt: skip
