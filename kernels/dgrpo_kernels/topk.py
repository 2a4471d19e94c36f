"""The columns of a top-k teacher: taken out of a row of logits, and their gradients put back.

With the K columns taken out (set to -inf), `row_stats` gives the student's tail over the others,
which 1 - sum p would lose in fp32. Traffic: a few bytes per column id. Grid: one program per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgrpo_kernels.rows import check_rows


@triton.jit(do_not_specialize_on_alignment=["ids_ptr", "taken_ptr"])
def _topk_take_kernel(z_ptr, bias_ptr, ids_ptr, taken_ptr, V, K, z_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_row
    lanes = tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + row * K + lanes, mask=lanes < K, other=-1)
    here = (ids >= 0) & (ids < V)
    x = tl.load(z_ptr + ids, mask=here, other=float("-inf"))
    if bias_ptr is not None:
        x += tl.load(bias_ptr + ids, mask=here, other=0.0)
    tl.store(taken_ptr + row * K + lanes, x, mask=lanes < K)
    tl.debug_barrier()  # every lane has read before any column changes
    tl.store(z_ptr + ids, tl.full((BLOCK,), float("-inf"), tl.float32), mask=here)


@triton.jit(do_not_specialize_on_alignment=["ids_ptr", "values_ptr"])
def _topk_put_kernel(grad_ptr, ids_ptr, values_ptr, V, K, grad_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + row * K + lanes, mask=lanes < K, other=-1)
    values = tl.load(values_ptr + row * K + lanes, mask=lanes < K, other=0.0)
    values = values.to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + row * grad_row + ids, values, mask=(ids >= 0) & (ids < V))


def topk_take(raw: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    """Take columns out of rows: returns raw + bias at `ids`, and sets raw to -inf there.

    raw: (R, V) fp32, changed. ids: (R, K) int64 without repeats in a row; one outside [0, V) is
    absent and reads -inf. Returns (R, K) fp32.
    """
    check_rows("raw", raw)
    rows, V = raw.shape
    count = ids.shape[1]
    taken = torch.empty(rows, count, dtype=raw.dtype, device=raw.device)
    if count:
        with torch.cuda.device_of(raw):
            _topk_take_kernel[(rows,)](
                raw, bias, ids, taken, V, count, raw.stride(0), BLOCK=triton.next_power_of_2(count)
            )
    return taken


def topk_put(grad: Tensor, ids: Tensor, values: Tensor) -> None:
    """Overwrite `grad` (R, V) at `ids` (R, K) with `values` (R, K) fp32; absent ids are skipped."""
    rows, V = grad.shape
    count = ids.shape[1]
    if count:
        with torch.cuda.device_of(grad):
            _topk_put_kernel[(rows,)](
                grad, ids, values, V, count, grad.stride(0), BLOCK=triton.next_power_of_2(count)
            )
