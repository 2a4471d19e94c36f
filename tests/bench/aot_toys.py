"""Toy kernels with one fault each, compiled for `tests/bench/test_aot.py` in a process of its own.

python -m tests.bench.aot_toys    # prints {toy: {target: faults}} as JSON
"""

import json

import torch

from bench.aot import TARGETS, compiling
from bench.disassembly import inspect

# isort: split
# After bench.aot, which turns the interpreter off.
import triton
import triton.language as tl


@triton.jit
def _sum_kernel(x_ptr, out_ptr, size, row, STEP: tl.constexpr, BLOCK: tl.constexpr):
    x_ptr += tl.program_id(0) * row
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        total += tl.exp(tl.load(x_ptr + cols * STEP, mask=cols < row, other=0.0))
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _matmul_kernel(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    tile = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, size, BLOCK):
        x = tl.load(x_ptr + tile + start)
        y = tl.load(y_ptr + tile + start)
        total = tl.dot(x, y, total)
    tl.store(out_ptr + tile, total)


def toys() -> dict:
    """Name and launch of each toy."""
    x, out = torch.empty(4, 4096), torch.empty(4096)
    half = torch.empty(128, 128, dtype=torch.float16)
    return {
        "sound": lambda: _sum_kernel[(4,)](x, out, 4096, 4096, STEP=1, BLOCK=2048, num_warps=8),
        "spilling": lambda: _sum_kernel[(4,)](x, out, 4096, 4096, STEP=1, BLOCK=16384, num_warps=1),
        "narrow": lambda: _sum_kernel[(4,)](x, out, 4096, 4096, STEP=3, BLOCK=2048, num_warps=8),
        # A row of 4095 elements starts anywhere: nothing wider than an element is safe.
        "unaligned": lambda: _sum_kernel[(4,)](x, out, 4095, 4095, STEP=1, BLOCK=2048, num_warps=8),
        "hungry": lambda: _matmul_kernel[(1,)](
            half, half, out, 4096, BLOCK=128, num_warps=8, num_stages=8
        ),
    }


def main() -> None:
    """Compile every toy for two targets and print what is wrong with it."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, launch in toys().items():
        for target in ("sm_90",) if name == "hungry" else ("sm_90", "gfx942"):
            with compiling(TARGETS[target]) as compiled:
                launch()
            found.setdefault(name, {})[target] = inspect(compiled[0]).faults()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
