"""Where the kernels find their numbers, and how many columns they take at a time.

Row offsets, in units of the row stride, of the buffers that `RowStats`, `PolicyInputs` and
`PolicyOutputs` describe.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgrpo_kernels.rows import PolicyInputs, PolicyOutputs, RowStats

_STATS, _INPUTS, _OUTPUTS = (
    {name: tl.constexpr(row) for row, name in enumerate(kind._fields)}
    for kind in (RowStats, PolicyInputs, PolicyOutputs)
)
MAX_Z, LOG_SUM_Z = _STATS["max_z"], _STATS["log_sum_z"]
MAX_T, LOG_SUM_T = _STATS["max_t"], _STATS["log_sum_t"]
LOGPROBS, TEACHER_LOGPROBS = _STATS["logprobs"], _STATS["teacher_logprobs"]
DIVERGENCE_ROW, ENTROPY, AUX = _STATS["divergence"], _STATS["entropy"], _STATS["aux"]
POLICY_MAX, POLICY_LOG_SUM = _STATS["policy_max"], _STATS["policy_log_sum"]

TOKEN_WEIGHTS, ADVANTAGES = _INPUTS["token_weights"], _INPUTS["advantages"]
OLD_LOGPROBS, REF_LOGPROBS = _INPUTS["old_logprobs"], _INPUTS["ref_logprobs"]
POLICY_WEIGHTS, SAMPLER_LOGPROBS = _INPUTS["policy_weights"], _INPUTS["sampler_logprobs"]
TEACHER_COEF = _INPUTS["teacher_coef"]

LOSSES, RATIO = _OUTPUTS["losses"], _OUTPUTS["ratio"]
CLIPPED, CLAMPED = _OUTPUTS["clipped"], _OUTPUTS["clamped"]
COEF_A, COEF_B, COEF_C = _OUTPUTS["a"], _OUTPUTS["b"], _OUTPUTS["c"]


def stats_block(V: int, heavy: bool) -> tuple[int, int, int]:
    """Lanes, tiles per step and warps of `row_stats`: a lane takes 4 columns of each tile.

    512 threads per program fill half of a multiprocessor from 256 rows. Four tiles spread the decay
    of the sums over 16 columns per lane, and put 8 loads of 16 bytes in flight with a teacher.
    heavy: a bias, a soft cap or a rounded policy, which take the registers of one tile (four spill
    on sm_90 and gfx942).
    """
    lanes = min(512, triton.next_power_of_2(triton.cdiv(V, 4)))
    return lanes, 1 if heavy or V < 16 * lanes else 4, max(lanes // _warp(), 1)


def fused_grid(like: Tensor, V: int) -> tuple[int, int]:
    """Programs of `row_fused`, one per multiprocessor, and how many of them share a row.

    So many that the logits of all rows under way, 8 V bytes each, fill at most half of L2.
    """
    if not like.is_cuda:
        return 1, 1
    device = torch.cuda.get_device_properties(like.device)
    group = 1
    while group < 16 and device.multi_processor_count // group * 16 * V > device.L2_cache_size:
        group *= 2
    return device.multi_processor_count, group


def _warp() -> int:
    """Threads per warp: 64 on AMD's CDNA."""
    if triton.knobs.runtime.interpret:
        return 32
    return triton.runtime.driver.active.get_current_target().warp_size


def divergence_block(V: int, bias: bool) -> tuple[int, int]:
    """Columns per step and warps of `row_divergence`: 4 columns per thread.

    With a bias 1024 and 4 warps, as ptxas spills for the clipped forward KL with more.
    """
    block = min(1024 if bias else 2048, triton.next_power_of_2(V))
    return block, 4 if bias else max(block // 4 // _warp(), 1)


def grad_block(V: int) -> tuple[int, int, int]:
    """Columns per step, warps, and programs per row: 256 rows are to fill a chip.

    8 columns per thread give 16-byte loads and stores. Twice the columns and warps spill with the
    JSD, a soft cap and a rounded policy at once (ahead-of-time check, triton 3.9).
    """
    block = min(1024, triton.next_power_of_2(V))
    return block, 4, min(8, triton.cdiv(V, block))
