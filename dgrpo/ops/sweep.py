"""The loop that every loss runs through: blocks of rows, never all logits at once.

Two levels of blocks (`plan`): R rows of fp32 logits, M rows of gradient before each dHidden and dW
product. A step decides what happens to a part's logits: `Score` keeps statistics, `Descend`
evaluates an objective and writes gradients at once (4 matrix products), `Replay` writes gradients
from upstream coefficients (recompute mode). One loop, whatever the loss.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from dgrpo.ops.call import Call, Need
from dgrpo.ops.gemm import accumulate, accumulate_bias, accumulator, grad_hidden
from dgrpo.ops.heads import Head, logits_buffer
from dgrpo.ops.plan import padded
from dgrpo_kernels.rows import Logits


class Grads(NamedTuple):
    """Gradients of hidden (N, H), weight (V, H) and bias (V,); None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Step(Protocol):
    """What is done with the logits of the rows `part`; `grad` is (R, V) or None."""

    def __call__(self, z: Logits, t: Logits | None, part: slice, grad: Tensor | None) -> None: ...


def sweep(
    call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None, need: Need, step: Step
) -> Grads:
    """Run `step` over all unmasked rows and multiply its gradients out.

    hidden: (N, H) or (B, T, H); weight: (V, H); bias: (V,). Returned gradients are scaled as `step`
    scales them: hidden's and weight's in fp32 accumulation, rounded once at the end.
    """
    with call.heads(hidden, weight, bias) as (student, teacher):
        plan = call.plan(student, teacher, need.any())
        grads = _new_grads(call, student, hidden, weight, bias, need)
        z_rows = logits_buffer(plan.logit_rows, call.columns, student.weight)
        t_rows = None if teacher is None else torch.empty_like(z_rows)
        g_rows = None
        if need.any():
            g_rows = student.weight.new_empty(plan.grad_rows, padded(call.columns))
        for block, parts in plan.blocks():
            h = student.gather(call.select(block))
            for part in parts:
                here = slice(part.start - block.start, part.stop - block.start)
                with record_function("dgrpo::logits"):
                    z = student.logits(h[here], z_rows, plan.scratch)
                    t = _teacher_logits(call, teacher, part, t_rows, plan.scratch)
                with record_function("dgrpo::rows"):
                    step(z, t, part, None if g_rows is None else g_rows[here, : call.columns])
            if need.any():
                g = g_rows[: len(h), : call.columns]
                _multiply_out(call, grads, g, h, student.weight, block, plan.scratch)
    return _finish(grads, weight, bias)


def _teacher_logits(
    call: Call, teacher: Head | None, part: slice, buffer: Tensor | None, scratch: int
) -> Logits | None:
    if teacher is None:
        return None
    rows = call.select(part) if call.teacher_index is None else call.teacher_index[part]
    return teacher.logits(teacher.gather(rows), buffer, scratch)


def _new_grads(
    call: Call, student: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None, need: Need
) -> Grads:
    total = accumulator(call.dtype)
    tokens, width = call.shape.numel(), hidden.shape[-1]
    device = weight.device
    return Grads(
        torch.zeros(tokens, width, dtype=hidden.dtype, device=device) if need.hidden else None,
        torch.zeros(weight.shape, dtype=total, device=device) if need.weight else None,
        torch.zeros(bias.shape, dtype=total, device=device) if need.bias else None,
    )


def _multiply_out(
    call: Call, grads: Grads, g: Tensor, h: Tensor, weight: Tensor, block: slice, scratch: int
) -> None:
    """dHidden = G W for the block's tokens, dW += G^T h, dbias += sum of G."""
    if grads.hidden is not None:
        with record_function("dgrpo::d_hidden"):
            d = grad_hidden(g, weight, scratch)
            if call.shard is not None:
                dist.all_reduce(d, group=call.shard.group)
            d = d.to(grads.hidden.dtype)
            if call.dense:
                grads.hidden[block] = d
            else:
                grads.hidden.index_copy_(0, call.rows[block], d)
    if grads.weight is not None:
        with record_function("dgrpo::d_weight"):
            accumulate(grads.weight[: call.columns], g, h, scratch)
    if grads.bias is not None:
        accumulate_bias(grads.bias[: call.columns], g, scratch)


def _finish(grads: Grads, weight: Tensor, bias: Tensor | None) -> Grads:
    return Grads(
        grads.hidden,
        None if grads.weight is None else grads.weight.to(weight.dtype),
        None if grads.bias is None else grads.bias.to(bias.dtype),
    )
