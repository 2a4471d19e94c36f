"""The interpreter's bf16, after `tests.interpreter` has mended it, equals torch's."""

import pytest
import torch
import triton
import triton.language as tl

from tests.interpreter import from_bf16, to_bf16

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, sum_ptr, size, BLOCK: tl.constexpr):
    total = 0.0
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + columns, mask=columns < size, other=0.0)
        y = tl.load(y_ptr + columns, mask=columns < size, other=0.0)
        tl.store(out_ptr + columns, x * y + x, mask=columns < size)
        total += tl.max(x, 0).to(tl.float32)
    tl.store(sum_ptr, total)


@triton.jit
def _dot_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    tile = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + tile, tl.dot(tl.load(x_ptr + tile), tl.load(y_ptr + tile)))


def test_arithmetic_rounds_like_torch():
    x, y = torch.randn(2, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    out, total = torch.empty_like(x), torch.empty(1)
    _arithmetic_kernel[(1,)](x, y, out, total, 100, BLOCK=32)
    assert torch.equal(out, (x * y) + x)
    padded = torch.cat([x, x.new_zeros(28)]).view(4, 32)
    assert total.item() == padded.float().amax(1).sum().item()


def test_dot_multiplies_values_not_bit_patterns():
    x, y = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](x, y, out, SIZE=16)
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=1e-5, atol=1e-5)


def test_rounding_is_to_nearest_even_and_keeps_nan():
    values = torch.tensor([1.00390625, 1.01171875, -3.3, float("inf"), float("nan"), 3.4e38])
    ours = torch.from_numpy(from_bf16(to_bf16(values.numpy())))
    torch.testing.assert_close(ours, values.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
