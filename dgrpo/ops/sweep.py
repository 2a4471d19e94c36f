"""The loop that every loss runs through: blocks of rows, never all logits at once.

Two levels of blocks (`blocks`): R rows of fp32 logits, M rows of gradient before each dHidden and
dW product. A step decides what happens to a part's logits: `Score` keeps statistics, `Descend`
evaluates an objective and writes gradients at once (4 matrix products), `Replay` writes gradients
from upstream coefficients (recompute mode). All losses share this loop.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from dgrpo.ops.blocks import Head, logits_buffer, open_heads, padded, plan_of
from dgrpo.ops.call import Call, Need
from dgrpo.ops.gradients import Grads, Sums
from dgrpo_kernels.rows import Logits


class Step(Protocol):
    """What is done with the logits of the rows `part`; `grad` is (R, V) or None."""

    units: Tensor | None  # (n,) of the rows of `grad`; None = 1

    def __call__(self, z: Logits, t: Logits | None, part: slice, grad: Tensor | None) -> None: ...


def sweep(
    call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None, need: Need, step: Step
) -> Grads:
    """Run `step` over all unmasked rows and multiply its gradients out.

    hidden: (N, H) or (B, T, H); weight: (V, H); bias: (V,). Gradients are accumulated in fp32 and
    rounded once at the end.
    """
    columns = call.shard.columns
    with open_heads(call, hidden, weight, bias) as (student, teacher):
        plan = plan_of(call, student, teacher, need.any())
        sums = Sums(call, hidden, weight, bias, need)
        z_rows = logits_buffer(plan.logit_rows, columns, student.weight)
        t_rows = None if teacher is None else torch.empty_like(z_rows)
        g_rows = None
        if need.any():
            g_rows = student.weight.new_empty(plan.grad_rows, padded(columns))
        for block, parts in plan.blocks():
            h = student.gather(call.select(block))
            for part in parts:
                here = slice(part.start - block.start, part.stop - block.start)
                with record_function("dgrpo::logits"):
                    z = student.logits(h[here], z_rows, plan.scratch)
                    t = _teacher_logits(call, teacher, part, t_rows, plan.scratch)
                with record_function("dgrpo::rows"):
                    step(z, t, part, None if g_rows is None else g_rows[here, :columns])
            if need.any():
                g = g_rows[: len(h), :columns]
                units = None if step.units is None else step.units[block]
                sums.add(g, h, student.weight, block, units, plan.scratch)
    return sums.finish()


def _teacher_logits(
    call: Call, teacher: Head | None, part: slice, buffer: Tensor | None, scratch: int
) -> Logits | None:
    if teacher is None:
        return None
    rows = call.select(part) if call.teacher_index is None else call.teacher_index[part]
    return teacher.logits(teacher.gather(rows), buffer, scratch)
