"""Row offsets are 64-bit: N·V beyond 2^31 elements, without touching more than a few rows.

The blocks are views with huge strides into memory that is never committed: a row is a page or two.
"""

import mmap
from pathlib import Path

import pytest
import torch

from dgrpo.testing import relative_error
from dgrpo_kernels import STATS, Logits
from dgrpo_kernels import triton_rows as kernels
from tests.kernels.blocks import block, fields, targets_of, want

ROWS, V = 3, 20
STRIDE = 2**30  # fits 32 bits; the third row's offset, 2^31, does not
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does it for real")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """Allocates (3, V) blocks whose rows are 2^30 elements apart, in sparse files."""
    folder: Path = tmp_path_factory.mktemp("sparse")
    opened = []

    def allocate(dtype: torch.dtype, name: str) -> torch.Tensor:
        # As much again before the block: an offset that wraps is to read zeros, not to crash.
        size = (4 * STRIDE + 4096) * dtype.itemsize
        file = open(folder / name, "wb+")
        file.truncate(size)
        opened.append(file)
        memory = mmap.mmap(file.fileno(), size)
        whole = torch.frombuffer(memory, dtype=dtype)
        return whole.as_strided((ROWS, V), (STRIDE, 1), 2 * STRIDE)

    yield allocate
    for file in opened:
        file.close()


@pytest.mark.parametrize("kernel", ["stats", "divergence", "grad", "topk"])
def test_offsets_beyond_32_bits(kernel, sparse):
    assert 2 * STRIDE == 2**31
    near = [block(ROWS, V), block(ROWS, V, seed=1)]
    far = [Logits(sparse(torch.float32, f"{kernel}{i}")) for i in range(2)]
    for a, b in zip(far, near, strict=True):
        a.raw.copy_(b.raw)
    targets, stats = targets_of(ROWS, V), torch.zeros(STATS, ROWS)
    if kernel == "topk":
        ids = targets[:, None].contiguous()
        taken = kernels.topk_take(far[0].raw, None, ids)
        assert torch.equal(taken, near[0].raw.gather(1, ids))
        assert (far[0].raw.gather(1, ids) == -torch.inf).all()
        kernels.topk_put(far[0].raw, ids, taken)
        assert torch.equal(far[0].raw, near[0].raw)
        return
    kernels.row_stats(*far, targets, stats)
    if kernel == "divergence":
        kernels.row_divergence(*far, stats, divergence="jsd", parameter=0.3)
        goal = want(*near, targets, divergence="jsd", parameter=0.3)
    else:
        goal = want(*near, targets, torch.ones(3, ROWS))
    assert relative_error(fields(stats).divergence, goal.divergence) < 1e-5
    if kernel == "grad":
        out = sparse(torch.bfloat16, "out")
        kernels.row_grad(*far, targets, stats, torch.ones(3, ROWS), out)
        assert relative_error(out.float(), goal.grad) < 5e-3
