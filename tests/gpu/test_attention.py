"""Attention kernels on a GPU against the portable form, also where sequences share a prefix."""

import pytest
import torch

from dgrpo.testing import relative_error
from dgrpo.trainer.attention import dispatch as attention
from dgrpo.trainer.attention.dispatch import (
    find_kernel,
    packed_arguments,
    packed_attention,
    takes_prefixes,
)
from dgrpo.trainer.attention.packed import Prefixes, sequences_attention
from tests.gpu.device import DEVICE, on_gpu

pytestmark = pytest.mark.gpu
LENGTHS = (700, 130, 1, 257, 64, 300, 40, 33)
BRANCHES = (3, 0, 0, 0, 0, 2, 0, 0)
CASES = {  # heads, kv_heads, head_dim, window, softcap
    "plain": (4, 4, 64, None, None),
    "grouped": (8, 2, 128, None, None),
    "window": (8, 2, 128, 100, None),
    "softcap": (4, 2, 64, None, 5.0),
    "wide": (4, 2, 256, None, None),
}


class Layer(torch.nn.Module):
    """Stands for an attention layer."""


@on_gpu
@pytest.mark.parametrize("shared", [True, False], ids=["prefixes", "alone"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_portable_form(case, dtype, shared):
    heads, kv_heads, dim, window, softcap = CASES[case]
    torch.manual_seed(0)
    inputs = [
        torch.randn(1, n, sum(LENGTHS), dim, device=DEVICE, dtype=dtype, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    ]
    kernel = find_kernel(inputs[0], softcap, 0.0)
    if kernel is None:
        pytest.skip("no kernel for this case on this machine")
    prefixes = Prefixes.of(LENGTHS, BRANCHES).to(DEVICE) if shared else None
    if shared:
        kinds = window is not None, softcap is not None
        taken = takes_prefixes(kernel, inputs[0].device, dtype, heads, kv_heads, dim, *kinds)
        assert taken, "the portable form would run: correct, and slow"
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).to(DEVICE, torch.int32)
    options = {"scaling": dim**-0.5, "sliding_window": window, "softcap": softcap}
    arguments = packed_arguments(cu, LENGTHS, prefixes=prefixes)
    got, _ = packed_attention(Layer(), *inputs, None, **options, **arguments)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    want = sequences_attention(*wide, LENGTHS, dim**-0.5, window, softcap, prefixes=prefixes)
    want = want.transpose(1, 2)
    direction = torch.randn_like(want)
    got_grads = torch.autograd.grad(got, inputs, direction.to(dtype))
    want_grads = torch.autograd.grad(want, wide, direction)
    for a, b in zip((got, *got_grads), (want, *want_grads), strict=True):
        assert relative_error(a.detach(), b.detach()) < 0.02


@on_gpu
def test_branches_cost_no_host_sync():
    inputs = [
        torch.randn(1, 4, sum(LENGTHS), 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).to(DEVICE, torch.int32)
    arguments = packed_arguments(cu, LENGTHS, prefixes=Prefixes.of(LENGTHS, BRANCHES).to(DEVICE))

    def run():
        out, _ = packed_attention(Layer(), *inputs, None, **arguments)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    run()  # the trial of the kernel
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_the_portable_form_costs_no_host_sync(monkeypatch):
    monkeypatch.setattr(attention, "find_kernel", lambda *_: None)
    test_branches_cost_no_host_sync()
