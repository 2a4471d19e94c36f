"""Small launches of each kernel for compute-sanitizer; sizes divide nothing.

compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.gpu.sanitize
compute-sanitizer --tool racecheck --error-exitcode 1 python -m tests.gpu.sanitize

Blocks are exactly as large as they must be, so that a read beyond one leaves its allocation.
Without a GPU it runs in Triton's interpreter (TRITON_INTERPRET=1), to see that it runs at all.
"""

from __future__ import annotations

import os

# Every tensor an allocation of its own: torch's cache would hide a read beyond one.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

from itertools import product

import torch

from dgrpo.objectives import Context
from dgrpo_kernels import ROW_MULTIPLE, STATS, Logits, PolicyRows
from dgrpo_kernels import triton_rows as kernels
from dgrpo_kernels.rows import POLICY_INPUTS, POLICY_OUTPUTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, TOPK = 5, 7
COLUMNS = (1, 33, 3001)
DIVERGENCES = (
    "none",
    "reverse_kl",
    "forward_kl",
    "clipped_forward_kl",
    "jsd",
    "jeffreys",
    "bucket",
)


def block(columns: int, everything: bool, dtype: torch.dtype = torch.float32) -> Logits:
    width = -(-columns // ROW_MULTIPLE) * ROW_MULTIPLE
    raw = torch.randn(ROWS, width, device=DEVICE, dtype=dtype)[:, :columns]
    if not everything:
        return Logits(raw)
    return Logits(raw, torch.randn(width, device=DEVICE), 0.7, 20.0, 1.3)


def policy_rows() -> PolicyRows:
    inputs, outputs = (
        torch.rand(count, ROWS, device=DEVICE) for count in (POLICY_INPUTS, POLICY_OUTPUTS)
    )
    context = Context(*inputs[[1, 0, 2, 3, 4, 5]], 2.0, 0.2, 0.2, 3.0, 0.5, 0.1, 0.1)
    return PolicyRows(inputs, outputs, context)


def launch(columns: int, divergence: str, everything: bool, dtype: torch.dtype) -> None:
    """Statistics, the second pass where there is one, and both gradients."""
    full = divergence not in ("none", "bucket")
    z, t = block(columns, everything), block(columns, everything) if full else None
    targets = torch.randint(columns, (ROWS,), device=DEVICE)
    targets[1], targets[2] = -100, 2**40  # never to be followed
    stats = torch.zeros(STATS, ROWS, device=DEVICE)
    second = divergence in ("clipped_forward_kl", "jsd", "jeffreys")
    first = divergence if full and not second else "none"
    kernels.row_stats(z, t, targets, stats, divergence=first, round_policy=everything)
    options = {"divergence": divergence, "parameter": 0.3}
    if second:
        kernels.row_divergence(z, t, stats, **options)
    out = block(columns, False, dtype).raw
    options["round_policy"] = everything
    kernels.row_grad(z, t, targets, stats, torch.rand(3, ROWS, device=DEVICE), out, **options)
    kernels.row_grad(z, t, targets, stats, None, out, policy=policy_rows(), **options)


def launch_topk(columns: int) -> None:
    z = block(columns, True)
    ids = torch.stack([torch.randperm(columns + TOPK)[:TOPK] for _ in range(ROWS)]).to(DEVICE)
    ids[0] = -1
    taken = kernels.topk_take(z.raw, z.bias, ids)
    kernels.topk_put(z.raw.bfloat16().contiguous(), ids, taken)


def main() -> None:
    """Every kernel, divergence and switch; waits for the device at the end."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    cases = list(product(COLUMNS, DIVERGENCES, (False, True)))
    for index, case in enumerate(cases):
        launch(*case, dtypes[index % 3])
    for columns in COLUMNS:
        launch_topk(columns)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{len(cases) + len(COLUMNS)} launches done on {DEVICE}")


if __name__ == "__main__":
    main()
