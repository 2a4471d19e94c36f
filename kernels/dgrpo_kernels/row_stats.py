"""Statistics of rows of logits in one online pass.

    u = z - max z,  v = t - max t,  p = softmax(z),  q = softmax(t)
    log-sums of u and v, log p and log q at the target, entropy = log_sum_z - sum p u
    a divergence of one pass (`divergences`): reverse and forward KL

z student logits, t teacher logits, R rows, V columns. Sums run per lane and are reduced once at the
end of the row; only the two maxima are reduced at every step. Accumulators shift with the maxima,
so that a near-equal teacher leaves small numbers and not the difference of large ones.

Traffic: 4 V bytes per row and logits block, read once: 8 V with a teacher. Grid: one program per
row. The online normaliser is Milakov & Gimelshein (1805.02867).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgrpo_kernels import layout as at
from dgrpo_kernels.divergences import DIVERGENCES, add_online, online_value
from dgrpo_kernels.logits import FLOOR, LOWEST, load_row, logits_of, rounded
from dgrpo_kernels.rows import Logits, check_rows


# N never enters: a view of the statistics starts anywhere, and its stride grows with N.
@triton.jit(
    do_not_specialize=["stats_row"],
    do_not_specialize_on_alignment=["stats_ptr", "targets_ptr"],
)
def _row_stats_kernel(
    z_ptr, t_ptr, z_bias_ptr, t_bias_ptr, targets_ptr, stats_ptr,
    V, z_row, t_row, stats_row,
    z_scale, z_softcap, z_inv_temperature, t_scale, t_softcap, t_inv_temperature, missing,
    Z_SOFTCAP: tl.constexpr, T_SOFTCAP: tl.constexpr, DIVERGENCE: tl.constexpr,
    ONLINE: tl.constexpr,  # the divergence is one of one pass
    ROUND_POLICY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_row
    if t_ptr is not None:
        t_ptr += row * t_row
    lanes = tl.arange(0, BLOCK)
    max_z = tl.full((), LOWEST, tl.float32)
    sum_z = tl.zeros((BLOCK,), tl.float32)
    sum_u = tl.zeros((BLOCK,), tl.float32)  # sum e^u u
    max_b = max_z  # of the rounded row
    sum_b = sum_z
    max_t = max_z
    sum_t = sum_z
    cross = sum_z  # the running sum of the divergence
    for start in range(0, V, BLOCK):
        cols = start + lanes
        x = load_row(z_ptr, z_bias_ptr, cols, z_row, V)
        z = logits_of(x, z_scale, z_softcap, z_inv_temperature, Z_SOFTCAP)
        new_z = tl.maximum(max_z, tl.max(z, 0))
        step_z = max_z - new_z
        decay_z = tl.exp(step_z)
        u = z - new_z
        e = tl.exp(u)
        max_z = new_z
        if t_ptr is not None:
            y = load_row(t_ptr, t_bias_ptr, cols, t_row, V)
            t = logits_of(y, t_scale, t_softcap, t_inv_temperature, T_SOFTCAP)
            new_t = tl.maximum(max_t, tl.max(t, 0))
            # No step from a row so far without a peak: what is held at FLOOR stays there.
            step_t = tl.where(max_t == LOWEST, 0.0, max_t - new_t)
            decay_t = tl.exp(step_t)
            v = t - new_t
            f = tl.exp(v)
            max_t = new_t
            v = tl.maximum(v, FLOOR)
            if ONLINE:
                cross = add_online(
                    cross, u, v, e, f, sum_z, sum_t, step_z, step_t, decay_z, decay_t, DIVERGENCE
                )
            sum_t = decay_t * sum_t + f
        sum_u = decay_z * (sum_u + step_z * sum_z) + tl.where(e > 0, e * u, 0.0)
        sum_z = decay_z * sum_z + e
        if ROUND_POLICY:
            b = logits_of(rounded(x), z_scale, z_softcap, z_inv_temperature, Z_SOFTCAP)
            new_b = tl.maximum(max_b, tl.max(b, 0))
            sum_b = tl.exp(max_b - new_b) * sum_b + tl.exp(b - new_b)
            max_b = new_b

    total_z = tl.sum(sum_z, 0)
    log_sum_z = tl.log(total_z)
    entropy = tl.where(total_z > 0, log_sum_z - tl.sum(sum_u, 0) / total_z, 0.0)
    if ROUND_POLICY:
        log_sum_b = tl.log(tl.sum(sum_b, 0))
    else:
        max_b = max_z
        log_sum_b = log_sum_z

    target = tl.load(targets_ptr + row)
    here = (target >= 0) & (target < V)
    target = tl.where(here, target, 0)
    x = tl.load(z_ptr + target)
    if z_bias_ptr is not None:
        x += tl.load(z_bias_ptr + target)
    if ROUND_POLICY:
        x = rounded(x)
    z = logits_of(x, z_scale, z_softcap, z_inv_temperature, Z_SOFTCAP)
    logprob = tl.where(here, z - max_b - log_sum_b, missing)

    out = stats_ptr + row
    tl.store(out + stats_row * at.MAX_Z, max_z)
    tl.store(out + stats_row * at.LOG_SUM_Z, log_sum_z)
    tl.store(out + stats_row * at.LOGPROBS, logprob)
    tl.store(out + stats_row * at.ENTROPY, entropy)
    tl.store(out + stats_row * at.POLICY_MAX, max_b)
    tl.store(out + stats_row * at.POLICY_LOG_SUM, log_sum_b)
    if t_ptr is not None:
        total_t = tl.sum(sum_t, 0)
        log_sum_t = tl.log(total_t)
        y = tl.load(t_ptr + target)
        if t_bias_ptr is not None:
            y += tl.load(t_bias_ptr + target)
        t = logits_of(y, t_scale, t_softcap, t_inv_temperature, T_SOFTCAP)
        tl.store(out + stats_row * at.MAX_T, max_t)
        tl.store(out + stats_row * at.LOG_SUM_T, log_sum_t)
        tl.store(
            out + stats_row * at.TEACHER_LOGPROBS, tl.where(here, t - max_t - log_sum_t, missing)
        )
        if ONLINE:
            cross = tl.sum(cross, 0)
            value = online_value(cross, total_z, total_t, log_sum_z, log_sum_t, DIVERGENCE)
            tl.store(out + stats_row * at.DIVERGENCE_ROW, value)


def row_stats(
    z: Logits,
    t: Logits | None,
    targets: Tensor,
    stats: Tensor,
    *,
    divergence: str = "reverse_kl",
    round_policy: bool = False,
    missing: float = float("nan"),
) -> None:
    """Write the statistics of rows of logits into `stats`, an `(11, R)` fp32 view (see `RowStats`).

    z, t: student and teacher logits, (R, V) fp32. targets: (R,) int64; one outside [0, V) reads
    `missing` as its log-probability and nothing out of bounds. divergence: one of one pass is
    finished here, one of two needs `row_divergence` after it. A teacher's logit
    counts as at least its row's peak - 1e6 in the KLs, so that a masked column keeps them finite.
    """
    teacher = z if t is None else t
    check_rows("z", z.raw)
    check_rows("t", teacher.raw)
    rows, V = z.raw.shape
    block, warps = at.stats_block(V)
    with torch.cuda.device_of(z.raw):
        _row_stats_kernel[(rows,)](
            z.raw, None if t is None else t.raw, z.bias, None if t is None else t.bias, targets,
            stats,
            V, z.raw.stride(0), teacher.raw.stride(0), stats.stride(0),
            *z.scalars, *teacher.scalars, missing,
            Z_SOFTCAP=z.softcap is not None, T_SOFTCAP=t is not None and t.softcap is not None,
            DIVERGENCE=DIVERGENCES[divergence].code, ONLINE=DIVERGENCES[divergence].passes == 1,
            ROUND_POLICY=round_policy, BLOCK=block, num_warps=warps,
        )  # fmt: skip
