"""Run a call: prepare it, sweep it, and hand its gradients to autograd.

Two autograd functions: gradients finished in forward, and gradients by recomputation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dgrpo.objectives.context import Context
from dgrpo.objectives.dgrpo_loss import dgrpo
from dgrpo.ops.call import Call, Need, needs, prepare
from dgrpo.ops.gradients import Grads, Kept
from dgrpo.ops.options import Options
from dgrpo.ops.steps import (
    Descend,
    FusedPolicy,
    Replay,
    Score,
    TokenStats,
    at_rows,
    token_stats,
    unpack,
)
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


class LossOutput(NamedTuple):
    """`loss`: a differentiable scalar. The rest: detached, shaped like targets, 0 where masked."""

    loss: Tensor
    logprobs: Tensor
    teacher_logprobs: Tensor
    divergence: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


def run_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: Options,
    objective: Callable,
    context: Context | None = None,
) -> LossOutput:
    """Sum the losses of `objective(stats, context)`, or of `objective(stats, rows)` without one.

    dGRPO's own objective runs in the gradient kernel where the backend has it.
    """
    call, weight = prepare(hidden, weight, targets, options, context, objective)
    need, of_rows = needs(hidden, weight, options.bias), at_rows(objective, call.context)
    if need.any():
        fused = context is not None and objective is dgrpo and call.backend.FUSES_DGRPO
        # In fp16 the units of G's rows follow from the coefficients, before the kernel runs.
        fused = fused and call.dtype != torch.float16
        step = FusedPolicy(call) if fused else Descend(call, of_rows)
        loss = GradientInForward.apply(hidden, weight, options.bias, need, call, step)
        metrics = step.metrics
    else:
        step = _scored(call, hidden, weight)
        stats = token_stats(step.stats)
        with torch.no_grad(), no_autocast(call.device):
            losses, metrics = unpack(of_rows(stats, call.rows), call.count)
            loss = losses.masked_fill(stats.logprobs.isnan(), torch.nan).sum()
    logprobs, divergence, entropy, teacher_logprobs = map(call.scatter, token_stats(step.stats))
    metrics = {name: call.scatter(value) for name, value in metrics.items()}
    return LossOutput(loss, logprobs, teacher_logprobs, divergence, entropy, metrics)


def run_stats(hidden: Tensor, weight: Tensor, targets: Tensor, options: Options) -> TokenStats:
    """Statistics shaped like targets, differentiable by recomputation."""
    call, weight = prepare(hidden, weight, targets, options)
    need = needs(hidden, weight, options.bias)
    if need.any():
        stats = Recompute.apply(hidden, weight, options.bias, need, call)
    else:
        stats = token_stats(_scored(call, hidden, weight).stats)
    return TokenStats(*map(call.scatter, stats))


def _scored(call: Call, hidden: Tensor, weight: Tensor) -> Score:
    """A pass without gradient."""
    step = Score(call)
    with torch.no_grad(), no_autocast(call.device):
        sweep(call, hidden, weight, call.options.bias, Need(), step)
    return step
