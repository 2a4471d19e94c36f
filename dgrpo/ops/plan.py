"""How many rows at a time: blocks that keep a budget in bytes, and the buffer that they share.

Early parts of a block are large: their logits lie in the rows of G that are not filled yet.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dgrpo.ops.gemm import accumulator
from dgrpo_kernels.rows import ROW_MULTIPLE

ALIGNED = 64  # bytes, where logits begin in the workspace
MOST_LOGIT_ROWS = 4096
MOST_GRAD_ROWS = 32768
TILE = (128, 256)  # of the vendor's GEMM, to count its waves
ADDED_SHARE = 0.4  # of reading and writing dW: what its product does not hide (an estimate)
# FLOP of a low-precision product per byte of memory: below it, a product waits for its operands.
RIDGES = {"A100": 156, "H100": 263, "H200": 184, "B200": 280, "MI300": 247}
OTHER_RIDGE, CPU_RIDGE = 200, 8
# What starting a part costs on a GPU (True) and on a CPU, in bytes that memory moves; estimates.
PART = {True: 4e7, False: 1e6}


def ridge_of(device: torch.device) -> float:
    """The ridge of a GPU, known by its name."""
    name = torch.cuda.get_device_name(device)
    return next((ridge for card, ridge in RIDGES.items() if card in name), OTHER_RIDGE)


def padded(columns: int) -> int:
    """The row stride of a block of `columns`, in elements."""
    return -(-columns // ROW_MULTIPLE) * ROW_MULTIPLE


@dataclass(frozen=True)
class Plan:
    """Blocks of G's rows, each in parts of fp32 logits, which lie where G is not filled yet."""

    count: int  # rows in all
    parts: tuple[int, ...]  # rows of each part of a whole block: R
    scratch: int  # bytes for lifting operands where the GEMM cannot

    @property
    def grad_rows(self) -> int:
        """Rows of a block: M."""
        return sum(self.parts)

    @property
    def mean_rows(self) -> int:
        """Rows of a part, on average."""
        return -(-self.grad_rows // len(self.parts))

    def blocks(self) -> Iterator[tuple[slice, list[slice]]]:
        """Each block's rows and, within it, those of its parts; both count from the first row."""
        ends = list(itertools.accumulate(self.parts))
        for start in range(0, self.count, self.grad_rows):
            stop = min(start + self.grad_rows, self.count)
            edges = [start, *(start + end for end in ends if start + end < stop), stop]
            yield slice(start, stop), [slice(a, b) for a, b in itertools.pairwise(edges)]


class Sizes(NamedTuple):
    """What a plan follows from but for the number of rows."""

    columns: int
    width: int  # of the student's hidden states
    teacher_width: int | None  # None = no teacher logits
    itemsize: int  # bytes of the products' dtype
    gradients: bool
    lifts: bool  # operands are lifted to fp32
    budget: int  # bytes, without scratch
    processors: int  # streaming multiprocessors; 0 = a CPU
    ridge: float
    temporaries: int  # of a logits row's size, that row functions in plain torch make

    @property
    def logit_row(self) -> int:
        """Bytes of one row of logits."""
        models = 1 if self.teacher_width is None else 2
        return models * max(self.itemsize, 4) * padded(self.columns)

    @property
    def side_row(self) -> int:
        """Bytes beside the workspace per row of logits: teacher's states and temporaries."""
        states = (self.teacher_width or 0) * (self.itemsize + 4 * self.lifts)
        return states + self.temporaries * max(self.itemsize, 4) * padded(self.columns)

    @property
    def grad_row(self) -> int:
        """Bytes of one row of G."""
        return self.itemsize * padded(self.columns) if self.gradients else 0

    @property
    def state_row(self) -> int:
        """Bytes of one row's hidden state, and of its dHidden."""
        found = max(self.itemsize, 4) + 4 * self.lifts if self.gradients else 0
        return self.width * (self.itemsize + found)

    def parts(self, grad_rows: int) -> tuple[int, ...] | None:
        """The largest parts of a block of G that keep the budget; None if there are none."""
        free, parts, filled = self.budget - grad_rows * self.state_row - ALIGNED, [], 0
        while filled < grad_rows:
            row = self.grad_row + self.logit_row + (0 if parts else self.side_row)
            rows = (free - filled * self.grad_row) // row
            rows -= rows % 32 if rows > 32 else 0
            rows = min(rows, MOST_LOGIT_ROWS, grad_rows - filled)
            if rows < 1:
                return None
            free -= 0 if parts else rows * self.side_row  # later parts have fewer
            parts.append(rows)
            filled += rows
        return tuple(parts)

    def cost(self, parts: tuple[int, ...]) -> float:
        """Time of a block's products, in bytes that memory moves meanwhile."""
        rows, found = sum(parts), PART[self.processors > 0] * len(parts)
        product = 2 * self.columns / self.ridge  # per row and unit of width
        for width in (self.width, self.teacher_width or 0):
            read = self.columns * width * (self.itemsize + 8 * self.lifts)
            found += sum(max(product * r * width, read + 4 * r * self.columns) for r in parts)
        if not self.gradients:
            return found
        tiles = -(-rows // TILE[0]) * -(-self.width // TILE[1])
        waves = -(-tiles // self.processors) * self.processors if self.processors else 0
        hidden = max(rows * self.width, waves * TILE[0] * TILE[1])
        added = ADDED_SHARE * 8 * self.columns * self.width
        return found + product * (hidden + rows * self.width) + added


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
    ridge: float = CPU_RIDGE,
    temporaries: int = 0,
    lifts: bool = False,
) -> Plan:
    """Split `count` rows of `columns` logits so that all transient memory fits `budget` bytes.

    The blocks are those of least estimated time: the last block and the waves of the dHidden
    product full, few reads and writes of dW, parts that a product is not starved by. Arguments as
    in `Sizes`. A budget below one row's need is exceeded by it.
    """
    scratch = max(budget // 8, 1) if lifts else 0
    sizes = Sizes(
        columns, width, teacher_width, dtype.itemsize, gradients, lifts, budget - scratch,
        processors, ridge, temporaries,
    )  # fmt: skip
    step, costs = _costs(sizes)

    def total(rows: int) -> float:
        whole, rest = divmod(count, rows)
        return whole * costs[rows] + (costs[-(-rest // step) * step] if rest else 0.0)

    best = min(costs, key=lambda rows: (total(rows), -rows))
    return Plan(count, sizes.parts(min(best, max(count, 1))) or (1,), scratch)


@cache
def _costs(sizes: Sizes) -> tuple[int, dict[int, float]]:
    """The cost of a block of each size, in steps of so many rows."""
    for step in (TILE[0], 32, 1):
        costs = {}
        for rows in range(step, MOST_GRAD_ROWS + 1, step):
            parts = sizes.parts(rows)
            if parts is None or (not sizes.gradients and len(parts) > 1):
                break
            costs[rows] = sizes.cost(parts)
        if len(costs) > 3:
            break
    return step, costs or {1: 0.0}


class Workspace:
    """One buffer for a plan: G's rows from its front, a part's logits behind those it fills."""

    def __init__(self, plan: Plan, columns: int, weight: Tensor, teacher: bool, gradients: bool):
        self.columns, self.dtype, self.models = columns, weight.dtype, 1 + teacher
        self.wide = accumulator(weight.dtype)
        self.logit_row = padded(columns) * self.wide.itemsize
        self.grad_row = padded(columns) * weight.itemsize if gradients else 0
        ends = itertools.accumulate(plan.parts)
        size = max(
            self._logits_at(end) + self.models * rows * self.logit_row
            for end, rows in zip(ends, plan.parts, strict=True)
        )
        self.buffer = torch.empty(size, dtype=torch.uint8, device=weight.device)

    def _logits_at(self, end: int) -> int:
        return -(-end * self.grad_row // ALIGNED) * ALIGNED

    def _rows(self, first: int, rows: int, dtype: torch.dtype) -> Tensor:
        taken = self.buffer[first : first + rows * padded(self.columns) * dtype.itemsize]
        return taken.view(dtype).view(rows, padded(self.columns))[:, : self.columns]

    def logits(self, part: slice) -> list[Tensor]:
        """Student's and teacher's (R, V), for rows of the block."""
        rows, first = part.stop - part.start, self._logits_at(part.stop)
        return [
            self._rows(first + i * rows * self.logit_row, rows, self.wide)
            for i in range(self.models)
        ]

    def grad(self, part: slice) -> Tensor | None:
        """(R, V) of G, for rows of the block."""
        if not self.grad_row:
            return None
        return self._rows(part.start * self.grad_row, part.stop - part.start, self.dtype)
