"""The loop that every loss runs through: blocks of rows, never all logits at once.

Two levels of blocks (`plan`): R rows of fp32 logits, M rows of gradient before each dHidden and dW
product. A step decides what happens to a part's logits: `Score` keeps statistics, `Descend`
evaluates an objective and writes gradients at once (4 matrix products), `Replay` writes gradients
from upstream coefficients (recompute mode). All losses share this loop.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.profiler import record_function

from dgrpo.ops.blocks import Head, open_heads, plan_of
from dgrpo.ops.call import Call, Need
from dgrpo.ops.gradients import Grads, Sums
from dgrpo.ops.plan import Workspace
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
        space = Workspace(plan, columns, student.weight, teacher is not None, need.any())
        for block, parts in plan.blocks():
            h = student.gather(call.select(block))
            for part in parts:
                here = slice(part.start - block.start, part.stop - block.start)
                with record_function("dgrpo::logits"):
                    raw = space.logits(here)
                    z = student.logits(h[here], raw[0], plan.scratch)
                    t = _teacher_logits(call, teacher, part, raw[-1], plan.scratch)
                with record_function("dgrpo::rows"):
                    step(z, t, part, space.grad(here))
            if need.any():
                g = space.grad(slice(0, len(h)))
                units = None if step.units is None else step.units[block]
                sums.add(g, h, student.weight, block, units, plan.scratch)
    return sums.finish()


def _teacher_logits(
    call: Call, teacher: Head | None, part: slice, raw: Tensor, scratch: int
) -> Logits | None:
    if teacher is None:
        return None
    rows = call.select(part) if call.teacher_index is None else call.teacher_index[part]
    return teacher.logits(teacher.gather(rows), raw, scratch)
