"""How many rows the sweep holds at a time: two levels of blocks from a budget in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dgrpo_kernels.rows import ROW_MULTIPLE

LOGITS_SHARE = 0.3  # of the budget; the rest holds G, whose width saves reads and writes of dW
MOST_LOGIT_ROWS = 4096
MOST_GRAD_ROWS = 32768
TILE = (128, 256)  # of the vendor's GEMM, to count its waves


def padded(columns: int) -> int:
    """The row stride of a block of `columns`, in elements."""
    return -(-columns // ROW_MULTIPLE) * ROW_MULTIPLE


@dataclass(frozen=True)
class Plan:
    """Blocks of `grad_rows` rows of G, each in parts of `logit_rows` rows of fp32 logits."""

    count: int  # rows in all
    logit_rows: int  # R
    grad_rows: int  # M, a multiple of R
    scratch: int  # bytes for lifting operands where the GEMM cannot

    def blocks(self) -> Iterator[tuple[slice, list[slice]]]:
        """Each block's rows and, within it, those of its parts; both count from the first row."""
        for start in range(0, self.count, self.grad_rows):
            stop = min(start + self.grad_rows, self.count)
            starts = range(start, stop, self.logit_rows)
            yield slice(start, stop), [slice(s, min(s + self.logit_rows, stop)) for s in starts]


def make_plan(
    count: int,
    columns: int,
    width: int,
    *,
    dtype: torch.dtype,
    teacher_width: int | None = None,
    gradients: bool = True,
    budget: int = 2**30,
    processors: int = 0,
    lifts: bool = False,
) -> Plan:
    """Split `count` rows of `columns` logits so that all transient memory fits `budget` bytes.

    width, teacher_width: of the hidden states (None = no teacher logits). processors: streaming
    multiprocessors, so that G's rows fill whole waves of the dHidden GEMM (0 = unknown). lifts:
    operands are lifted to fp32. A budget below one row's need is exceeded by it. The sizes do not
    depend on `count`, but that no block is larger than it.
    """
    size = dtype.itemsize
    wide = max(size, 4)
    stride = padded(columns)
    logit_row = wide * stride * (1 if teacher_width is None else 2)
    logit_row += (teacher_width or 0) * (size + 4 * lifts)
    grad_row = size * stride + width * (size + wide + 4 * lifts) if gradients else width * size
    scratch = max(budget // 8, 1) if lifts else 0
    budget -= scratch
    share = LOGITS_SHARE if gradients else 0.9
    rows = min(int(budget * share) // logit_row, budget // (logit_row + grad_row))
    rows = max(1, min(rows, MOST_LOGIT_ROWS))
    rows = 1 << (rows.bit_length() - 1)
    limit = max(budget - rows * logit_row, 0) // grad_row
    limit = min(max(limit // rows, 1), MOST_GRAD_ROWS // rows)
    multiples = range(max(limit // 2, 1), limit + 1) if processors else [limit]
    best = max(multiples, key=lambda n: (_fill(n * rows, width, processors), n))
    rows = max(1, min(rows, count))
    return Plan(count, rows, max(rows, min(best * rows, -(-count // rows) * rows)), scratch)


def _fill(rows: int, width: int, processors: int) -> float:
    """The share of the last wave's processors that have work, in the dHidden GEMM."""
    if not processors:
        return 1.0
    tiles = -(-rows // TILE[0]) * -(-width // TILE[1])
    return tiles / (-(-tiles // processors) * processors)
