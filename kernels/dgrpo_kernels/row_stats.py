"""Statistics of rows of logits in one online pass.

    u = z - max z,  v = t - max t,  p = softmax(z),  q = softmax(t)
    log-sums of u and v, log p and log q at the target, entropy = log_sum_z - sum p u
    a divergence of one pass (`divergences`): reverse and forward KL

z student logits, t teacher logits, R rows, V columns. A lane is a thread: it takes 4 columns of
each tile, and keeps maxima and sums of its own, merged once at the end of the row. So the loop has
neither barriers nor shuffles. Sums shift with their maxima, which are subtracted first, so that
a near-equal teacher leaves small numbers and not the difference of large ones.

Traffic: 4 V bytes per row and logits block, read once: 8 V with a teacher. Grid: one program per
row. The online normaliser is Milakov & Gimelshein (1805.02867).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgrpo_kernels import layout as at
from dgrpo_kernels.divergences import DIVERGENCES, move_online, online_terms, online_value
from dgrpo_kernels.logits import FLOOR, LOWEST, exp, load_raw, logits_of, rounded, within
from dgrpo_kernels.rows import CAPPED, Logits, check_rows


@triton.jit
def _load(ptr, bias_ptr, cols, row_stride, TILES: tl.constexpr, MASKED: tl.constexpr):
    """Raw logits of 1 tile, (LANES, 4), or of 4, (LANES, 4, 2, 2): a lane is a thread."""
    x = load_raw(ptr, bias_ptr, cols, row_stride, MASKED)
    if TILES == 4:
        next_tile = 4 * cols.shape[0]
        x1 = load_raw(ptr, bias_ptr, cols + next_tile, row_stride, MASKED)
        x2 = load_raw(ptr, bias_ptr, cols + 2 * next_tile, row_stride, MASKED)
        x3 = load_raw(ptr, bias_ptr, cols + 3 * next_tile, row_stride, MASKED)
        x = tl.join(tl.join(x, x1), tl.join(x2, x3))
    return x


@triton.jit
def _top(x):
    """Each lane's maximum."""
    if len(x.shape) == 4:
        x = tl.max(tl.max(x, 3), 2)
    return tl.max(x, 1)


@triton.jit
def _total(x):
    """Each lane's sum."""
    if len(x.shape) == 4:
        x = tl.sum(tl.sum(x, 3), 2)
    return tl.sum(x, 1)


@triton.jit
def _less(x, lane):
    """All of a lane's logits less a number of that lane."""
    y = lane[:, None]
    if len(x.shape) == 4:
        y = y[:, :, None, None]
    return x - y


@triton.jit
def step_of(
    cols, max_z, sum_z, sum_u, max_b, sum_b, max_t, sum_t, cross,
    z_ptr, t_ptr, z_bias_ptr, t_bias_ptr, V, z_row, t_row,
    z_scale, z_softcap, z_inv_temperature, t_scale, t_softcap, t_inv_temperature,
    Z_FORM: tl.constexpr, T_FORM: tl.constexpr, HOLES: tl.constexpr, T_HOLES: tl.constexpr,
    DIVERGENCE: tl.constexpr, ONLINE: tl.constexpr, ROUND_POLICY: tl.constexpr,
    TILES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """All lanes' maxima and sums after TILES tiles, of which `cols`, (LANES, 4), is the first."""
    x = _load(z_ptr, z_bias_ptr, cols, z_row, TILES, MASKED)
    if t_ptr is not None:
        y = _load(t_ptr, t_bias_ptr, cols, t_row, TILES, MASKED)
    z = logits_of(x, z_scale, z_softcap, z_inv_temperature, Z_FORM, HOLES)
    z = within(z, cols, V, HOLES, MASKED)
    new_z = tl.maximum(max_z, _top(z))
    step_z = max_z - new_z
    decay_z = exp(step_z)
    u = _less(z, new_z)
    e = exp(u)
    if t_ptr is not None:
        t = logits_of(y, t_scale, t_softcap, t_inv_temperature, T_FORM, T_HOLES)
        t = within(t, cols, V, T_HOLES, MASKED)
        new_t = tl.maximum(max_t, _top(t))
        step_t = max_t - new_t
        v = _less(t, new_t)
        f = exp(v)
        if T_HOLES:
            # No step from a lane so far without a peak: what is held at FLOOR stays there.
            step_t = tl.where(max_t == LOWEST, 0.0, step_t)
            v = tl.maximum(v, FLOOR)
        decay_t = exp(step_t)
        if ONLINE:
            cross = move_online(
                cross, sum_z, sum_t, step_z, step_t, decay_z, decay_t, DIVERGENCE
            )  # fmt: skip
            cross += _total(online_terms(u, v, e, f, HOLES or T_HOLES, DIVERGENCE))
        sum_t = decay_t * sum_t + _total(f)
        max_t = new_t
    eu = tl.where(e > 0, e * u, 0.0) if HOLES else e * u
    sum_u = decay_z * (sum_u + step_z * sum_z) + _total(eu)
    sum_z = decay_z * sum_z + _total(e)
    if ROUND_POLICY:
        b = logits_of(rounded(x), z_scale, z_softcap, z_inv_temperature, Z_FORM, HOLES)
        b = within(b, cols, V, HOLES, MASKED)
        new_b = tl.maximum(max_b, _top(b))
        sum_b = exp(max_b - new_b) * sum_b + _total(exp(_less(b, new_b)))
        max_b = new_b
    return new_z, sum_z, sum_u, max_b, sum_b, max_t, sum_t, cross


@triton.jit
def merge(
    max_z, sum_z, sum_u, max_t, sum_t, cross,
    TEACHER: tl.constexpr, T_HOLES: tl.constexpr, ONLINE: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """Lanes' (or programs') maxima and sums into those of the row."""
    top_z = tl.max(max_z, 0)
    step_z = max_z - top_z
    decay_z = exp(step_z)
    total_u = tl.sum(decay_z * (sum_u + step_z * sum_z), 0)
    total_z = tl.sum(decay_z * sum_z, 0)
    top_t = top_z
    total_t = total_z
    total = 0.0 * total_z
    if TEACHER:
        top_t = tl.max(max_t, 0)
        step_t = max_t - top_t
        if T_HOLES:
            step_t = tl.where(max_t == LOWEST, 0.0, step_t)
        decay_t = exp(step_t)
        total_t = tl.sum(decay_t * sum_t, 0)
        if ONLINE:
            cross = move_online(
                cross, sum_z, sum_t, step_z, step_t, decay_z, decay_t, DIVERGENCE
            )  # fmt: skip
            total = tl.sum(cross, 0)
    return top_z, total_z, total_u, top_t, total_t, total


@triton.jit
def entropy_of(total_z, total_u):
    """Entropy from the sums of e^u and e^u u; 0 for a row without columns."""
    return tl.where(total_z > 0, tl.log(total_z) - total_u / total_z, 0.0)


# N never enters: a view of the statistics starts anywhere, and its stride grows with N.
@triton.jit(
    do_not_specialize=["stats_row"],
    do_not_specialize_on_alignment=["stats_ptr", "targets_ptr"],
)
def _row_stats_kernel(
    z_ptr, t_ptr, z_bias_ptr, t_bias_ptr, targets_ptr, stats_ptr,
    V, z_row, t_row, stats_row,
    z_scale, z_softcap, z_inv_temperature, t_scale, t_softcap, t_inv_temperature, missing,
    Z_FORM: tl.constexpr, T_FORM: tl.constexpr, HOLES: tl.constexpr, T_HOLES: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    ONLINE: tl.constexpr,  # the divergence is one of one pass
    ROUND_POLICY: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_row
    if t_ptr is not None:
        t_ptr += row * t_row
    tile = tl.arange(0, LANES)[:, None] * 4 + tl.arange(0, 4)[None, :]
    max_z = tl.full((LANES,), LOWEST, tl.float32)
    sum_z = tl.zeros((LANES,), tl.float32)
    sum_u = sum_z  # sum e^u u
    max_b = max_z  # of the rounded row
    sum_b = sum_z
    max_t = max_z
    sum_t = sum_z
    cross = sum_z  # the sum of the divergence
    full = V // (4 * LANES * TILES) * (4 * LANES * TILES)
    for REST in tl.static_range(2):  # first whole steps, then the rest tile by tile, masked
        step = 4 * LANES if REST else 4 * LANES * TILES
        for start in range(full if REST else 0, V if REST else full, step):
            max_z, sum_z, sum_u, max_b, sum_b, max_t, sum_t, cross = step_of(
                start + tile, max_z, sum_z, sum_u, max_b, sum_b, max_t, sum_t, cross,
                z_ptr, t_ptr, z_bias_ptr, t_bias_ptr, V, z_row, t_row,
                z_scale, z_softcap, z_inv_temperature, t_scale, t_softcap, t_inv_temperature,
                Z_FORM, T_FORM, HOLES, T_HOLES, DIVERGENCE, ONLINE, ROUND_POLICY,
                1 if REST else TILES, REST == 1,
            )  # fmt: skip

    top_z, total_z, total_u, top_t, total_t, cross = merge(
        max_z, sum_z, sum_u, max_t, sum_t, cross, t_ptr is not None, T_HOLES, ONLINE, DIVERGENCE
    )  # fmt: skip
    log_sum_z = tl.log(total_z)
    entropy = entropy_of(total_z, total_u)
    top_b = top_z
    log_sum_b = log_sum_z
    if ROUND_POLICY:
        top_b = tl.max(max_b, 0)
        log_sum_b = tl.log(tl.sum(exp(max_b - top_b) * sum_b, 0))

    target = tl.load(targets_ptr + row)
    here = (target >= 0) & (target < V)
    target = tl.where(here, target, 0)
    x = load_raw(z_ptr, z_bias_ptr, target, z_row, False)
    if ROUND_POLICY:
        x = rounded(x)
    z = logits_of(x, z_scale, z_softcap, z_inv_temperature, Z_FORM, HOLES)
    logprob = tl.where(here, z - top_b - log_sum_b, missing)

    out = stats_ptr + row
    tl.store(out + stats_row * at.MAX_Z, top_z)
    tl.store(out + stats_row * at.LOG_SUM_Z, log_sum_z)
    tl.store(out + stats_row * at.LOGPROBS, logprob)
    tl.store(out + stats_row * at.ENTROPY, entropy)
    tl.store(out + stats_row * at.POLICY_MAX, top_b)
    tl.store(out + stats_row * at.POLICY_LOG_SUM, log_sum_b)
    if t_ptr is not None:
        log_sum_t = tl.log(total_t)
        y = load_raw(t_ptr, t_bias_ptr, target, t_row, False)
        t = logits_of(y, t_scale, t_softcap, t_inv_temperature, T_FORM, T_HOLES)
        own = tl.where(here, t - top_t - log_sum_t, missing)
        tl.store(out + stats_row * at.MAX_T, top_t)
        tl.store(out + stats_row * at.LOG_SUM_T, log_sum_t)
        tl.store(out + stats_row * at.TEACHER_LOGPROBS, own)
        if ONLINE:
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
    heavy = round_policy or CAPPED in (z.form, teacher.form) or z.bias is not None
    heavy = heavy or teacher.bias is not None
    lanes, tiles, warps = at.stats_block(V, heavy)
    with torch.cuda.device_of(z.raw):
        _row_stats_kernel[(rows,)](
            z.raw, None if t is None else t.raw, z.bias, None if t is None else t.bias, targets,
            stats,
            V, z.raw.stride(0), teacher.raw.stride(0), stats.stride(0),
            *z.scalars, *teacher.scalars, missing,
            Z_FORM=z.form, T_FORM=teacher.form, HOLES=z.holes, T_HOLES=teacher.holes,
            DIVERGENCE=DIVERGENCES[divergence].code, ONLINE=DIVERGENCES[divergence].passes == 1,
            ROUND_POLICY=round_policy, LANES=lanes, TILES=tiles, num_warps=warps,
        )  # fmt: skip
