"""How long should a step take on a GPU? An estimate from ceilings, block sizes and machine code.

Nothing here is measured. Each product takes the longer of its arithmetic and its traffic; a row
kernel the longest of what HBM, the loads that it keeps in flight, issue slots and MUFU allow. The
constants below are assumptions, to be replaced by what `bench.parts` finds on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

from bench.gpus import Ceilings
from bench.loops import TOKENS, VOCAB, Figures
from bench.sizes import Shape
from dgrpo.ops.plan import TILE, Plan

LOGITS_PRODUCT = 1.04  # z and t over their bound: their blocks are small, waves are not full
ADDED_SHARE = 0.4  # of reading and writing dW that the product does not hide
STREAM = 0.85  # of the copy's rate that a kernel reaches on one block of logits
LAUNCH_MS = 0.01  # to fill and drain the GPU, per row kernel
LATENCY = 0.8e-6  # seconds from a load to its use while HBM is busy
FIXED_MS = 2.0  # gathering rows, scaling the gradients in backward, the host

READ, WRITE = 8, 2  # bytes per element: two fp32 logits; a bf16 gradient


class Estimate(NamedTuple):
    """Milliseconds of one forward and backward, one part after the other."""

    z: float
    t: float
    d_hidden: float
    d_weight: float
    row_stats: float
    row_grad: float
    fixed: float
    floor: float  # of the four products alone

    @property
    def ms(self) -> float:
        """All of it."""
        return sum(self[:-1])

    @property
    def share(self) -> float:
        """The share of the floor."""
        return self.floor / self.ms


def blocks_of(plan: Plan) -> list[list[int]]:
    """Rows of every part, in every block of G."""
    return [[part.stop - part.start for part in parts] for _, parts in plan.blocks()]


def estimate(
    shape: Shape,
    gpu: Ceilings,
    blocks: list[list[int]],
    kernels: dict[str, Figures] | None = None,
    *,
    second_read_in_l2: bool = False,
) -> Estimate:
    """Estimate a step of `shape` in `blocks`, each a list of the rows of its parts.

    kernels: figures of "row_stats" and "row_grad"; None = bound by HBM alone.
    second_read_in_l2: one kernel reads each logit once for statistics and gradient.
    """
    n, v = shape.tokens, shape.vocab
    parts = [rows for block in blocks for rows in block]

    def logits(width: int) -> float:
        moved = [2 * width * (v + rows) + 4 * rows * v for rows in parts]
        compute = [2 * rows * v * width / gpu.flops for rows in parts]
        bounds = zip(compute, moved, strict=True)
        return 1e3 * LOGITS_PRODUCT * sum(max(c, m / gpu.bandwidth) for c, m in bounds)

    def rows(name: str, moved: int) -> float:
        ms = row_kernel_ms(n * v, moved, gpu, (kernels or {}).get(name))
        return ms + LAUNCH_MS * len(parts)

    width = shape.hidden
    wave = 2 * TILE[0] * TILE[1] * v * gpu.processors / gpu.flops
    tiles = [-(-sum(block) // TILE[0]) * -(-width // TILE[1]) for block in blocks]
    product = 1e3 * 2 * n * v * width / gpu.flops
    added = 1e3 * 8 * v * width * len(blocks) / gpu.bandwidth
    return Estimate(
        z=logits(width),
        t=logits(shape.teacher_hidden),
        d_hidden=1e3 * wave * sum(-(-count // gpu.processors) for count in tiles),
        d_weight=product + ADDED_SHARE * added,
        row_stats=rows("row_stats", READ),
        row_grad=rows("row_grad", WRITE if second_read_in_l2 else READ + WRITE),
        fixed=FIXED_MS,
        floor=3 * product + 1e3 * 2 * n * v * shape.teacher_hidden / gpu.flops,
    )


def row_kernel_ms(elements: int, moved: int, gpu: Ceilings, kernel: Figures | None) -> float:
    """Milliseconds of one row kernel over all elements, each of `moved` bytes."""
    bounds = [1e3 * moved * elements / (STREAM * gpu.bandwidth)]
    if kernel:
        scale = elements / (TOKENS * VOCAB)
        arriving = gpu.processors * kernel.bytes_in_flight / LATENCY  # bytes read per second
        bounds += [
            1e3 * READ * elements / arriving,
            scale * kernel.issue_ms,
            scale * kernel.mufu_ms,
        ]
    return max(bounds)
