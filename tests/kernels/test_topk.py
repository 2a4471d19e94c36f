"""`topk_take` and `topk_put`: columns out of a row of logits, and their gradients back into it."""

import pytest
import torch

from dgrpo.ops import rows_torch
from dgrpo_kernels import triton_rows as kernels
from tests.kernels.blocks import DEVICE, block, new_grad

BACKENDS = {"triton": kernels, "torch": rows_torch}
IDS = torch.tensor([[0, 39, 7], [-1, 5, 40], [-1, -1, 2**40], [16, 15, 1]], device=DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_columns_are_taken_and_put_back(count, bias, backend):
    z, ids = block(4, 40, bias=bias), IDS[:, :count].contiguous()
    before = z.raw.clone()
    taken = BACKENDS[backend].topk_take(z.raw, z.bias, ids)
    grad = new_grad(4, 40, torch.bfloat16).fill_(0.5)
    values = torch.arange(4.0 * count, device=DEVICE).view(4, count)
    BACKENDS[backend].topk_put(grad, ids, values)
    left = torch.ones(4, 40, dtype=torch.bool, device=DEVICE)
    for row in range(4):
        for k in range(count):
            column = ids[row, k].item()
            if 0 <= column < 40:
                own = before[row, column] + (z.bias[column] if bias else 0)
                assert taken[row, k] == own
                assert z.raw[row, column] == -torch.inf
                assert grad[row, column] == values[row, k]
                left[row, column] = False
            else:
                assert taken[row, k] == -torch.inf
    assert torch.equal(z.raw[left], before[left])
    assert (grad[left] == 0.5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_columns_at_all(backend):
    z = block(2, 40)
    before, ids = z.raw.clone(), torch.zeros(2, 0, dtype=torch.int64, device=DEVICE)
    assert BACKENDS[backend].topk_take(z.raw, None, ids).shape == (2, 0)
    BACKENDS[backend].topk_put(z.raw, ids, torch.zeros(2, 0, device=DEVICE))
    assert torch.equal(z.raw, before)


def test_all_columns():
    z = block(2, 40)
    before = z.raw.clone()
    ids = torch.stack([torch.randperm(40), torch.arange(40)]).to(DEVICE)
    taken = kernels.topk_take(z.raw, None, ids)
    assert torch.equal(taken, before.gather(1, ids))
    assert (z.raw == -torch.inf).all()
