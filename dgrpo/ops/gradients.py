"""The gradients that a sweep adds up, in range where their dtype, fp16, is not.

fp16 ends at 65504 above and at 6e-8 below, but a token may weigh 1e-9 or 1e9, and a million tokens
may add up. Powers of two, computed on the device, keep its numbers in the middle. R rows of G:

    G_r  =  unit_r G'_r                       unit_r near the size of row r's coefficients
    dHidden_r  =  unit_r (G'_r W)             in fp32
    dW  =  U sum_r G'_r^T (h_r unit_r / U)    U = the largest unit so far; a larger one shrinks dW

and what waits for backward in fp16 has a unit of its own, by which its largest entry is 2^14. dW is
read and written once more per block to shrink it: the price of fp16. Nothing here touches bf16,
fp32 and fp64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from dgrpo.ops.call import Call, Need
from dgrpo.ops.gemm import accumulate, accumulate_bias, accumulator, grad_hidden
from dgrpo_kernels.rows import FLOOR

COPY_ROWS = 2**20  # elements of a copy that the CPU converts at a time
LEAST = 2.0**-100  # the least power of two taken of a number that is not 0
ROW_UNITS = 2.0**10  # a row's largest coefficient in its unit, at least
KEPT_UNITS = 2.0**14  # the largest entry of a kept gradient in its unit, at least


def power_of_two(size: Tensor, otherwise: float) -> Tensor:
    """The power of two at or just below each `size`; `otherwise` where that is 0, inf or NaN."""
    usable = (size > 0) & size.isfinite()
    return torch.exp2(torch.log2(size.where(usable, otherwise)).floor()).clamp(min=LEAST)


def row_units(coef: Tensor, steep: Tensor | None, factor: float) -> Tensor:
    """(R,) units of G's rows, from a, b, c, (3, R), and a divergence D with steep slopes, or None.

    No entry of a row exceeds `factor (|a| + (2 D + 1) |b| + log V |c|)`, factor = d logit / d raw:
    at most 16 times the largest of its terms, thus 2^15 units. D counts where slopes grow with it,
    as the reverse KL's do (to 1e6 nats, where the teacher forbids what the student says); others
    are at most 1.
    """
    a, b, c = coef.abs().unbind(0)
    if steep is not None:
        b = b * steep.clamp(1, -FLOOR).where(b != 0, 1)
    size = torch.maximum(torch.maximum(a, b), c) * factor
    return power_of_two(size, LEAST) / ROW_UNITS


def scaled_copy(values: Tensor, factor: Tensor) -> Tensor:
    """`values * factor` in fp32, in the dtype of `values`; out of place, so that it can repeat.

    factor: one number or one per row of `values`.
    """
    out = torch.empty_like(values)
    # As many dimensions as `values`, so that it lifts the product to fp32.
    factor = factor.reshape(-1, *[1] * (values.dim() - 1))
    if values.dtype in (torch.float32, torch.float64):
        return torch.mul(values, factor.to(values.dtype), out=out)
    factor = factor.float()
    if values.is_cuda:
        return torch.mul(values, factor, out=out)
    factor = factor.expand(len(values), *factor.shape[1:])
    rows = max(1, COPY_ROWS // max(values[:1].numel(), 1))
    for start in range(0, len(values), rows):
        part = slice(start, start + rows)
        out[part] = values[part] * factor[part]
    return out


class Kept(NamedTuple):
    """A gradient until backward hands it over: `values * unit`."""

    values: Tensor  # in the dtype of what it is the gradient of
    unit: Tensor | None  # fp32, one number or one per row; None = 1

    def times(self, upstream: Tensor | None = None) -> Tensor:
        """The gradient itself, times a one-element upstream gradient."""
        factor = self.unit
        if upstream is not None:
            factor = upstream.reshape(1) if factor is None else upstream.reshape(1) * factor
        return self.values if factor is None else scaled_copy(self.values, factor)


def keep(
    values: Tensor, dtype: torch.dtype, unit: Tensor | None = None, by_row: bool = False
) -> Kept:
    """`values * unit` to be kept in `dtype`; changes `values`. by_row: a unit per row, in fp16."""
    if dtype == torch.float16:
        size = torch.linalg.vector_norm(values, torch.inf, dim=1 if by_row else None)
        own = power_of_two(size, 1.0).reshape(-1) / KEPT_UNITS
        values /= own[:, None] if by_row else own
        unit = own if unit is None else unit * own
    return Kept(values.to(dtype), unit)


class Grads(NamedTuple):
    """Gradients of hidden (N, H), weight (V, H) and bias (V,); None where not needed."""

    hidden: Kept | None
    weight: Kept | None
    bias: Kept | None

    def times(self, upstream: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """The gradients themselves, times a one-element upstream gradient."""
        return tuple(None if kept is None else kept.times(upstream) for kept in self)


class Sums:
    """dHidden, written once per token, and dW and dbias, summed in fp32 over the blocks."""

    def __init__(self, call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None, need: Need):
        self.call = call
        wide, device = accumulator(call.dtype), weight.device
        self.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        self.hidden = self.hidden_unit = self.weight = self.bias = None
        if need.hidden:
            tokens = call.shape.numel()
            self.hidden = torch.zeros(tokens, hidden.shape[-1], dtype=hidden.dtype, device=device)
            if hidden.dtype == torch.float16:
                self.hidden_unit = torch.ones(tokens, dtype=wide, device=device)
        if need.weight:
            self.weight = torch.zeros(weight.shape, dtype=wide, device=device)
        if need.bias:
            self.bias = torch.zeros(bias.shape, dtype=wide, device=device)
        self.unit: Tensor | None = None  # (1,), of dW and dbias

    def add(
        self, g: Tensor, h: Tensor, weight: Tensor, block: slice, units: Tensor | None, scratch: int
    ) -> None:
        """dHidden = G W for the block's tokens, dW += G^T h, dbias += sum of G.

        units: (M,) of G's rows, or None = 1.
        """
        if self.hidden is not None:
            with record_function("dgrpo::d_hidden"):
                self._add_hidden(g, weight, block, units, scratch)
        if self.weight is None and self.bias is None:
            return
        columns = self.call.shard.columns
        share = None if units is None else self._share(units)
        if self.weight is not None:
            with record_function("dgrpo::d_weight"):
                h = h if share is None else scaled_copy(h, share)
                accumulate(self.weight[:columns], g, h, scratch)
        if self.bias is None:
            return
        if share is None:
            accumulate_bias(self.bias[:columns], g, scratch)
        else:  # the weight of a hidden state that is 1 everywhere
            accumulate(self.bias[:columns, None], g, share.to(g.dtype)[:, None], scratch)

    def _add_hidden(
        self, g: Tensor, weight: Tensor, block: slice, units: Tensor | None, scratch: int
    ) -> None:
        d = grad_hidden(g, weight, scratch)
        d = self.call.shard.summed(d)
        if units is not None:
            d *= units[:, None]
        kept = keep(d, self.hidden.dtype, by_row=True)
        for total, values in ((self.hidden, kept.values), (self.hidden_unit, kept.unit)):
            if values is None:
                continue
            if self.call.dense:
                total[block] = values
            else:
                total.index_copy_(0, self.call.rows[block], values)

    def _share(self, units: Tensor) -> Tensor:
        """(M,) rows' units in the sums' unit, at most 1; that of the sums grows where it must."""
        largest = units.amax().reshape(1)
        if self.unit is not None:
            largest = torch.maximum(largest, self.unit)
            for total in (self.weight, self.bias):
                if total is not None:
                    total *= self.unit / largest
        self.unit = largest
        return units / largest

    def finish(self) -> Grads:
        """What is to be kept until backward, rounded once to the dtype of the inputs."""
        _, weight, bias = self.dtypes
        return Grads(
            None if self.hidden is None else Kept(self.hidden, self.hidden_unit),
            None if self.weight is None else keep(self.weight, weight, self.unit),
            None if self.bias is None else keep(self.bias, bias, self.unit),
        )
