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
from dgrpo.ops.gradients import Grads, Kept
from dgrpo.ops.steps import Descend, FusedPolicy, Replay, Score, token_stats
from dgrpo.ops.sweep import sweep


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
        ctx.save_for_backward(*(x for kept in grads for x in kept or (None, None)))
        ctx.shape = hidden.shape
        return step.losses.sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        pairs = zip(saved[::2], saved[1::2], strict=True)
        grads = Grads(*(None if values is None else Kept(values, unit) for values, unit in pairs))
        hidden, weight, bias = grads.times(upstream)
        return None if hidden is None else hidden.view(ctx.shape), weight, bias, None, None, None


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
        d_hidden, d_weight, d_bias = grads.times()
        if d_hidden is not None:
            d_hidden = d_hidden.view(hidden.shape)
        return d_hidden, d_weight, d_bias, None, None
