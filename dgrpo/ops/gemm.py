"""The four matrix products of the sweep, each with fp32 results from low-precision operands.

On GPUs the vendor's GEMM writes fp32 directly (`out_dtype`, probed once per device). Elsewhere the
operands are lifted to fp32 by slices of the vocabulary, which is exact, and no fp32 copy of the
head ever exists.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 operands, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def _writes_fp32(product: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `mm` or `addmm` on this device takes `out_dtype` and gives the right numbers."""
    if device.type == "cpu":
        return False
    a, b = (torch.eye(32, 48, dtype=dtype, device=device) for _ in range(2))
    want = torch.eye(32, device=device)
    try:  # in the layouts of the sweep: a row stride of its own, transposed operands, in place
        if product == "mm":
            out = torch.ones(32, 64, device=device)[:, :32]
            torch.mm(a, b.T, out_dtype=torch.float32, out=out)
        else:
            out = torch.ones(32, 32, device=device)
            a = a.T.contiguous()
            torch.addmm(out, a.T, b.T, out_dtype=torch.float32, out=out)
            want += 1
        right = bool((out == want).all())
    except (RuntimeError, TypeError, NotImplementedError):
        right = False
    if not right:
        warnings.warn(
            f"{product}(out_dtype=torch.float32) does not work with {dtype} on {device} in torch "
            f"{torch.__version__}: products run in fp32, several times slower, in smaller blocks",
            stacklevel=2,
        )
    return right


def writes_fp32(product: str, like: Tensor) -> bool:
    """Whether the vendor's `product` ("mm" or "addmm") gives fp32 from operands like this one."""
    if like.dtype in (torch.float32, torch.float64):
        return True
    return _writes_fp32(product, like.device, like.dtype)


def _slices(columns: int, other: int, scratch: int) -> Iterator[slice]:
    """Slices of the vocabulary whose lifted operands, `other` per column, fit `scratch` bytes."""
    step = max(64, scratch // (4 * max(other, 1)))
    return (slice(start, min(start + step, columns)) for start in range(0, columns, step))


def project(hidden: Tensor, weight: Tensor, out: Tensor, scratch: int) -> None:
    """`out = hidden @ weight.T`: (R, H), (V, H) -> (R, V) fp32. `scratch`: bytes for lifting."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif writes_fp32("mm", hidden):
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
    else:
        lifted = hidden.float()
        for part in _slices(weight.shape[0], weight.shape[1], scratch):
            torch.mm(lifted, weight[part].float().T, out=out[:, part])


def grad_hidden(grad: Tensor, weight: Tensor, scratch: int) -> Tensor:
    """`grad @ weight`: (M, V), (V, H) -> (M, H) fp32 (fp64 in fp64)."""
    if grad.dtype == accumulator(grad.dtype):
        return torch.mm(grad, weight)
    if writes_fp32("mm", grad):
        return torch.mm(grad, weight, out_dtype=torch.float32)
    total = torch.zeros(len(grad), weight.shape[1], device=grad.device)
    for part in _slices(len(weight), len(grad) + weight.shape[1], scratch):
        torch.addmm(total, grad[:, part].float(), weight[part].float(), out=total)
    return total


def accumulate(total: Tensor, grad: Tensor, hidden: Tensor, scratch: int) -> None:
    """`total += grad.T @ hidden`: (M, V), (M, H) into (V, H) fp32 (fp64 in fp64)."""
    if grad.dtype == total.dtype:
        torch.addmm(total, grad.T, hidden, out=total)
    elif writes_fp32("addmm", grad):
        torch.addmm(total, grad.T, hidden, out_dtype=torch.float32, out=total)
    elif writes_fp32("mm", grad):
        for part in _slices(len(total), hidden.shape[1], scratch):
            total[part] += torch.mm(grad[:, part].T, hidden, out_dtype=torch.float32)
    else:
        lifted = hidden.float()
        for part in _slices(len(total), len(grad), scratch):
            torch.addmm(total[part], grad[:, part].float().T, lifted, out=total[part])


def accumulate_bias(total: Tensor, grad: Tensor, scratch: int) -> None:
    """`total += grad.sum(0)`: (M, V) into (V,) fp32 (fp64 in fp64)."""
    if grad.is_cuda or grad.dtype == total.dtype:
        total += grad.sum(0, dtype=total.dtype)
    else:  # the CPU would lift all of grad at once
        for part in _slices(len(total), len(grad), scratch):
            total[part] += grad[:, part].float().sum(0)
