"""Statistics, dGRPO's objective and the gradient in one kernel, whose second read is from L2.

A persistent grid: GROUP programs share a row, each taking a stretch of its columns. They leave
their sums in memory, wait for each other, and merge all of them alike, in order; then each writes
the gradient of its own columns. Only so many rows are under way that their logits stay in the
cache: 10 V bytes of HBM traffic per row in bf16 against 18 V of `row_stats` and `row_grad`.

The plain case alone: no holes, soft cap or rounded policy; no divergence but the reverse KL.
Programs that wait need a grid that is resident as a whole: a cooperative launch. Triton's
interpreter runs programs one after the other, so there GROUP is 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgrpo_kernels import layout as at
from dgrpo_kernels.dgrpo_row import dgrpo_row, policy_flags, policy_numbers, store_policy
from dgrpo_kernels.divergences import DIVERGENCES, online_value
from dgrpo_kernels.logits import LOG2E, LOWEST, load_raw, logits_of
from dgrpo_kernels.row_grad import fold, folded, write
from dgrpo_kernels.row_stats import entropy_of, merge, step_of
from dgrpo_kernels.rows import Logits, PolicyRows, check_rows

PARTIALS = 6  # numbers that a program leaves for the others


@triton.jit
def _leave(out, each, max_z, sum_z, sum_u, max_t, sum_t, cross):
    tl.store(out, max_z)
    tl.store(out + each, sum_z)
    tl.store(out + 2 * each, sum_u)
    tl.store(out + 3 * each, max_t)
    tl.store(out + 4 * each, sum_t)
    tl.store(out + 5 * each, cross)


@triton.jit
def _wait(arrived, GROUP: tl.constexpr):
    """Until all programs of the group have left their numbers."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release")
    while tl.atomic_add(arrived, 0, sem="acquire") < GROUP:
        pass
    tl.debug_barrier()


@triton.jit(
    do_not_specialize=["R", "stats_row", "in_row", "out_row"],
    do_not_specialize_on_alignment=[
        "targets_ptr", "stats_ptr", "in_ptr", "out_ptr", "partial_ptr", "arrived_ptr",
    ],
)  # fmt: skip
def _row_fused_kernel(
    z_ptr, t_ptr, targets_ptr, in_ptr,
    grad_ptr, stats_ptr, out_ptr, partial_ptr, arrived_ptr,
    V, R, z_row, t_row, grad_row, stats_row, in_row, out_row,
    z_factor, t_factor, missing,
    clip_low, clip_high, clip_dual, is_cap, ref_coef, entropy_coef,
    Z_FORM: tl.constexpr, T_FORM: tl.constexpr, DIVERGENCE: tl.constexpr,
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_SAMPLER: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    TEACHER: tl.constexpr = t_ptr is not None
    STEP: tl.constexpr = 4 * LANES * TILES
    member = tl.program_id(0) % GROUP
    stretch = tl.cdiv(tl.cdiv(V, STEP), GROUP) * STEP
    first = member * stretch  # beyond V where there are more programs than steps
    last = tl.maximum(tl.minimum(first + stretch, V), first)
    tile = tl.arange(0, LANES)[:, None] * 4 + tl.arange(0, 4)[None, :]
    members = tl.arange(0, GROUP)
    zero = tl.zeros((), tl.int64)
    each = zero + R * GROUP
    for row_index in range(tl.program_id(0) // GROUP, R, tl.num_programs(0) // GROUP):
        row = zero + row_index
        z_at = z_ptr + row * z_row
        t_at = z_at
        if TEACHER:
            t_at = t_ptr + row * t_row
        max_z = tl.full((LANES,), LOWEST, tl.float32)
        sum_z = tl.zeros((LANES,), tl.float32)
        sum_u = sum_z
        max_t = max_z
        sum_t = sum_z
        cross = sum_z
        whole = first + (last - first) // STEP * STEP
        for REST in tl.static_range(2):
            step = 4 * LANES if REST else STEP
            for start in range(whole if REST else first, last if REST else whole, step):
                max_z, sum_z, sum_u, _b, _s, max_t, sum_t, cross = step_of(
                    start + tile, max_z, sum_z, sum_u, max_z, sum_z, max_t, sum_t, cross,
                    z_at, t_at if TEACHER else None, None, None, V, z_row, t_row,
                    z_factor, 1.0, 1.0, t_factor, 1.0, 1.0,
                    Z_FORM, T_FORM, False, False, DIVERGENCE, TEACHER, False,
                    1 if REST else TILES, REST == 1,
                )  # fmt: skip
        top_z, total_z, total_u, top_t, total_t, total = merge(
            max_z, sum_z, sum_u, max_t, sum_t, cross, TEACHER, False, TEACHER, DIVERGENCE
        )  # fmt: skip
        mine = partial_ptr + row * GROUP + member
        _leave(mine, each, top_z, total_z, total_u, top_t, total_t, total)
        _wait(arrived_ptr + row, GROUP)
        left = partial_ptr + row * GROUP + members
        top_z, total_z, total_u, top_t, total_t, total = merge(
            tl.load(left, cache_modifier=".cg"),
            tl.load(left + each, cache_modifier=".cg"),
            tl.load(left + 2 * each, cache_modifier=".cg"),
            tl.load(left + 3 * each, cache_modifier=".cg"),
            tl.load(left + 4 * each, cache_modifier=".cg"),
            tl.load(left + 5 * each, cache_modifier=".cg"),
            TEACHER, False, TEACHER, DIVERGENCE,
        )  # fmt: skip

        log_sum_z = tl.log(total_z)
        log_sum_t = tl.log(total_t)
        entropy = entropy_of(total_z, total_u)
        target = tl.load(targets_ptr + row)
        here = (target >= 0) & (target < V)
        at_target = tl.where(here, target, 0)
        z = logits_of(load_raw(z_at, None, at_target, z_row, False), z_factor, 1.0, 1.0, Z_FORM, 0)
        logp = tl.where(here, z - top_z - log_sum_z, missing)
        divergence = 0.0 * total_z
        if TEACHER:
            divergence = online_value(total, total_z, total_t, log_sum_z, log_sum_t, DIVERGENCE)
        loss, ratio, clipped, clamped, a, b, c = dgrpo_row(
            in_ptr + row, in_row, logp, divergence, entropy,
            clip_low, clip_high, clip_dual, is_cap, ref_coef, entropy_coef,
            HAS_OLD, HAS_REF, HAS_WEIGHTS, HAS_SAMPLER,
        )  # fmt: skip
        if member == 0:
            store_policy(out_ptr + row, out_row, loss, ratio, clipped, clamped, a, b, c)
            out = stats_ptr + row
            tl.store(out + stats_row * at.MAX_Z, top_z)
            tl.store(out + stats_row * at.LOG_SUM_Z, log_sum_z)
            tl.store(out + stats_row * at.LOGPROBS, logp)
            tl.store(out + stats_row * at.ENTROPY, entropy)
            tl.store(out + stats_row * at.POLICY_MAX, top_z)
            tl.store(out + stats_row * at.POLICY_LOG_SUM, log_sum_z)
            if TEACHER:
                y = load_raw(t_at, None, at_target, t_row, False)
                t = logits_of(y, t_factor, 1.0, 1.0, T_FORM, 0)
                own = tl.where(here, t - top_t - log_sum_t, missing)
                tl.store(out + stats_row * at.MAX_T, top_t)
                tl.store(out + stats_row * at.LOG_SUM_T, log_sum_t)
                tl.store(out + stats_row * at.TEACHER_LOGPROBS, own)
                tl.store(out + stats_row * at.DIVERGENCE_ROW, divergence)

        grad_at = grad_ptr + row * grad_row
        of_u, of_v, fixed = fold(
            a, b, c, log_sum_z, log_sum_t, entropy, divergence, z_factor, TEACHER
        )  # fmt: skip
        if TEACHER:
            t_at = tl.where(b == 0, z_at, t_at)  # a skipped teacher may hold NaN
            top_t = tl.where(b == 0, top_z, top_t)
        log2_sum = log_sum_z * LOG2E
        lanes = tl.arange(0, BLOCK)
        whole = first + (last - first) // BLOCK * BLOCK
        for REST in tl.static_range(2):
            for start in range(whole if REST else first, last if REST else whole, BLOCK):
                cols = start + lanes
                g = folded(
                    cols, z_at, t_at if TEACHER else None, z_row, t_row, z_factor, t_factor, top_z,
                    top_t, log2_sum, of_u, of_v, fixed, Z_FORM, T_FORM, REST == 1,
                )  # fmt: skip
                write(grad_at, cols, g, grad_row, REST == 1)
        if here & (target >= first) & (target < last):
            tl.debug_barrier()  # its column was written above, by another thread
            g = a * z_factor + folded(
                target, z_at, t_at if TEACHER else None, z_row, t_row, z_factor, t_factor, top_z,
                top_t, log2_sum, of_u, of_v, fixed, Z_FORM, T_FORM, False,
            )  # fmt: skip
            tl.store(grad_at + target, g.to(grad_ptr.dtype.element_ty))


def takes(z: Logits, t: Logits | None, divergence: str, round_policy: bool) -> bool:
    """Whether `row_fused` has a kernel for these logits."""
    plain = all(x is None or (not x.holes and x.softcap is None) for x in (z, t))
    return plain and not round_policy and divergence in ("none", "reverse_kl")


def row_fused(
    z: Logits,
    t: Logits | None,
    targets: Tensor,
    stats: Tensor,
    out: Tensor,
    *,
    policy: PolicyRows,
    missing: float = float("nan"),
    group: int | None = None,
) -> None:
    """`row_stats`, and `row_grad` with `policy`, on rows of logits that `takes` knows.

    Arguments and results as theirs; t: None or the teacher of a reverse KL. group: programs per row
    (a power of two), by default so many that the rows under way fill half of L2.
    """
    teacher = z if t is None else t
    for name, block in (("z", z.raw), ("out", out), ("t", teacher.raw)):
        check_rows(name, block)
    rows, V = z.raw.shape
    programs, shared = at.fused_grid(z.raw, V)
    group = group or shared
    lanes, tiles, warps = at.stats_block(V, heavy=False)
    partials = torch.empty(PARTIALS, rows, group, device=z.raw.device)
    arrived = torch.zeros(rows, dtype=torch.int32, device=z.raw.device)
    with torch.cuda.device_of(z.raw):
        _row_fused_kernel[(max(programs // group, 1) * group,)](
            z.raw, None if t is None else t.raw, targets, policy.inputs,
            out, stats, policy.outputs, partials, arrived,
            V, rows, z.raw.stride(0), teacher.raw.stride(0), out.stride(0), stats.stride(0),
            policy.inputs.stride(0), policy.outputs.stride(0),
            z.scale / z.temperature, teacher.scale / teacher.temperature, missing,
            *policy_numbers(policy),
            Z_FORM=z.form, T_FORM=teacher.form,
            DIVERGENCE=DIVERGENCES["none" if t is None else "reverse_kl"].code,
            **policy_flags(policy),
            GROUP=group, LANES=lanes, TILES=tiles, BLOCK=min(4096, triton.next_power_of_2(V)),
            num_warps=warps, launch_cooperative_grid=group > 1, maxnreg=128,
        )  # fmt: skip
