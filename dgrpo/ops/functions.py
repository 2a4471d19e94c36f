"""The two autograd functions: gradients finished in forward, and gradients by recomputation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dgrpo.ops.call import Call, Need
from dgrpo.ops.steps import Descend, FusedPolicy, Replay, Score, token_stats
from dgrpo.ops.sweep import sweep

COPY_ROWS = 2**20  # elements of a backward copy that the CPU converts at a time


def first_order(backward: Callable) -> Callable:
    """`once_differentiable`, but a call with `create_graph=True` raises.

    Otherwise it would return gradients without a graph: nothing that backward saves needs a
    gradient.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph: got True, expected False; the fused losses have first derivatives "
                "only"
            )
        return once(ctx, *upstream)

    return checked


def no_autocast(device: torch.device) -> torch.autocast:
    """Autocast would turn the sweep's fp32 products into bf16."""
    return torch.autocast(device.type, enabled=False)


class GradientInForward(Function):
    """Losses whose gradients are finished in the forward pass; backward scales and hands over."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        need: Need,
        call: Call,
        step: Descend | FusedPolicy,
    ) -> Tensor:
        with no_autocast(call.device):
            grads = sweep(call, hidden, weight, bias, need, step)
        ctx.save_for_backward(*grads, step.grad_scale)
        ctx.shape = hidden.shape
        return step.losses.sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *grads, scale = ctx.saved_tensors
        factor = upstream.reshape(1) if scale is None else upstream.reshape(1) / scale
        hidden, weight, bias = (None if g is None else _scaled_copy(g, factor) for g in grads)
        return None if hidden is None else hidden.view(ctx.shape), weight, bias, None, None, None


def _scaled_copy(values: Tensor, factor: Tensor) -> Tensor:
    """`values * factor` in fp32, in the dtype of `values`; out of place, so that it can repeat."""
    out = torch.empty_like(values)
    if values.dtype in (torch.float32, torch.float64):
        return torch.mul(values, factor.to(values.dtype), out=out)
    factor = factor.float()  # one-dimensional, so that it lifts the product to fp32
    if values.is_cuda:
        return torch.mul(values, factor, out=out)
    rows = max(1, COPY_ROWS // max(values[:1].numel(), 1))
    for start in range(0, len(values), rows):
        out[start : start + rows] = values[start : start + rows] * factor
    return out


class Recompute(Function):
    """Differentiable statistics; backward computes the logits again, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        need: Need,
        call: Call,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        step = Score(call)
        with no_autocast(call.device):
            sweep(call, hidden, weight, bias, Need(), step)
        ctx.save_for_backward(hidden, weight, bias, step.stats)
        ctx.need, ctx.call = need, call
        ctx.set_materialize_grads(False)
        outputs = tuple(values.clone() for values in token_stats(step.stats))
        ctx.mark_non_differentiable(outputs[3])
        return outputs

    @staticmethod
    @first_order
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, stats = ctx.saved_tensors
        coef = torch.stack([torch.zeros_like(stats[0]) if g is None else g for g in upstream[:3]])
        step = Replay(ctx.call, stats, coef)
        with no_autocast(ctx.call.device):
            grads = sweep(ctx.call, hidden, weight, bias, ctx.need, step)
        if step.grad_scale is not None:
            grads = [None if g is None else _scaled_copy(g, 1 / step.grad_scale) for g in grads]
        d_hidden, d_weight, d_bias = grads
        if d_hidden is not None:
            d_hidden = d_hidden.view(hidden.shape)
        return d_hidden, d_weight, d_bias, None, None
