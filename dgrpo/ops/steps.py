"""The steps of the sweep: score, descend an objective, fuse dGRPO, replay upstream coefficients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dgrpo.objectives.context import Context
from dgrpo.ops.call import Call
from dgrpo.ops.gradients import row_units
from dgrpo.ops.topk import TopKColumns
from dgrpo_kernels.rows import (
    POLICY_INPUTS,
    POLICY_OUTPUTS,
    Logits,
    PolicyInputs,
    PolicyOutputs,
    PolicyRows,
    RowStats,
)


class TokenStats(NamedTuple):
    """Statistics of R tokens, each (R,) fp32 (fp64 in fp64); all but the last differentiable."""

    logprobs: Tensor  # log p of the target, nats
    divergence: Tensor  # to the teacher, nats; 0 without one
    entropy: Tensor  # nats
    teacher_logprobs: Tensor  # constant; 0 without a teacher


Objective = Callable[[TokenStats, Tensor], "Tensor | tuple[Tensor, dict[str, Tensor]]"]


def token_stats(stats: Tensor) -> TokenStats:
    """The public statistics of an (11, R) buffer."""
    row = RowStats(*stats.unbind(0))
    return TokenStats(row.logprobs, row.divergence, row.entropy, row.teacher_logprobs)


def measure(
    call: Call, z: Logits, t: Logits | None, part: slice, stats: Tensor
) -> TopKColumns | None:
    """Write the finished statistics of the rows `part` into `stats`, an (11, R) view.

    A top-k teacher's columns are taken out of `z` and returned.
    """
    targets, divergence = call.targets[part], call.divergence
    columns = None if call.topk is None else TopKColumns(call, z, part)
    # Over the buckets of a top-k teacher, and of two passes: not yet.
    online = divergence if columns is None and call.formulas.passes == 1 else "none"
    call.backend.row_stats(
        z, t, targets, stats,
        divergence=online, round_policy=call.round_policy, missing=call.shard.missing,
    )  # fmt: skip
    call.shard.merge_stats(stats, online, call.targets_known[part], teacher=t is not None)
    if columns is not None:
        columns.merge(stats)
    elif call.formulas.passes == 2:
        call.backend.row_divergence(
            z, t, stats, divergence=divergence, parameter=call.parameter_at(part)
        )
        call.shard.add_divergence(stats)
    leave_out(call, part, stats)
    return columns


def leave_out(call: Call, part: slice, stats: Tensor) -> None:
    """Zero the statistics of tokens without a teacher."""
    if call.has_teacher is not None:
        out, absent = RowStats(*stats.unbind(0)), ~call.has_teacher[part]
        out.divergence.masked_fill_(absent, 0)
        out.teacher_logprobs.masked_fill_(absent, 0)


class Score:
    """Statistics only."""

    units = None

    def __init__(self, call: Call):
        self.call = call
        self.stats = call.new_stats()

    def __call__(self, z: Logits, t: Logits | None, part: slice, grad: Tensor | None) -> None:
        measure(self.call, z, t, part, self.stats[:, part])


class _Writer:
    """Shared by the steps that write gradients."""

    def __init__(self, call: Call, stats: Tensor):
        self.call = call
        self.stats = stats
        self.units: Tensor | None = None  # (n,) of G's rows, in fp16
        if call.dtype == torch.float16:
            self.units = stats.new_ones(call.count)

    def write(
        self,
        z: Logits,
        t: Logits | None,
        part: slice,
        columns: TopKColumns | None,
        coef: Tensor,
        grad: Tensor,
        policy: PolicyRows | None = None,
    ) -> None:
        """G of the rows `part` from a, b, c; with `policy`, the kernel computes these first."""
        call, stats = self.call, self.stats[:, part]
        if self.units is not None:
            steep = RowStats(*stats.unbind(0)).divergence if call.formulas.steep else None
            units = row_units(coef, steep, call.options.logit_scale / call.options.temperature)
            self.units[part] = units
            coef = coef / units
        call.backend.row_grad(
            z, t, call.targets[part], stats, None if policy else coef, grad,
            divergence=call.divergence if columns is None else "bucket",
            parameter=call.parameter_at(part), round_policy=call.round_policy,
            policy=policy,
        )  # fmt: skip
        if columns is not None:
            columns.put(stats, coef, grad)


class Descend(_Writer):
    """A token-separable objective in PyTorch, differentiated on (R,) vectors."""

    def __init__(self, call: Call, objective: Objective):
        super().__init__(call, call.new_stats())
        self.objective = objective
        self.losses = self.stats.new_zeros(call.count)
        self.metrics: dict[str, Tensor] = {}
        if not call.count:  # no part will come, but the metrics have their names
            self.differentiate(slice(0, 0))

    def __call__(self, z: Logits, t: Logits | None, part: slice, grad: Tensor | None) -> None:
        columns = measure(self.call, z, t, part, self.stats[:, part])
        coef = self.differentiate(part)
        self.write(z, t, part, columns, coef, grad)

    def differentiate(self, part: slice) -> Tensor:
        """Keep the part's losses and metrics; return (3, R) a, b, c."""
        values = token_stats(self.stats[:, part])
        leaves = [value.detach().requires_grad_() for value in values[:3]]
        with torch.enable_grad():
            losses = self.evaluate(TokenStats(*leaves, values.teacher_logprobs), part)
            grads: tuple[Tensor | None, ...] = (None, None, None)
            if losses.requires_grad:
                grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        pairs = zip(grads, leaves, strict=True)
        coef = torch.stack([torch.zeros_like(leaf) if g is None else g for g, leaf in pairs])
        if self.call.has_teacher is not None:
            coef[1].masked_fill_(~self.call.has_teacher[part], 0)
        return coef

    def evaluate(self, stats: TokenStats, part: slice) -> Tensor:
        rows = self.call.rows[part]
        losses, metrics = unpack(self.objective(stats, rows), len(rows))
        with torch.no_grad():
            # A target outside the vocabulary must show, also where its coefficient is zero.
            self.losses[part] = losses.masked_fill(stats.logprobs.isnan(), torch.nan)
            for name, value in metrics.items():
                if name not in self.metrics:
                    self.metrics[name] = value.new_zeros(self.call.count)
                self.metrics[name][part] = value
        return losses


def at_rows(objective: Callable, context: Context | None) -> Objective:
    """An objective of `(stats, context)` as one of `(stats, rows)`; without a context, itself."""
    if context is None:
        return objective
    return lambda stats, rows: objective(stats, context.at(rows))


def unpack(result: object, rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """An objective's result as losses and metrics; raises unless each is (R,)."""
    losses, metrics = result if isinstance(result, tuple) else (result, {})
    for name, value in {"losses": losses, **metrics}.items():
        if not isinstance(value, Tensor) or value.shape != (rows,):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"objective: got {name} {got}, expected a tensor of shape ({rows},)")
    return losses, metrics


class FusedPolicy(_Writer):
    """dGRPO with its objective in the gradient kernel's prologue (Triton). Not for fp16."""

    def __init__(self, call: Call):
        super().__init__(call, call.new_stats())
        context = call.context.at(slice(None) if call.dense else call.rows)
        inputs = self.stats.new_zeros(POLICY_INPUTS, call.count)
        for row, name in zip(inputs, PolicyInputs._fields, strict=True):
            value = getattr(context, name)
            if value is not None:
                row.copy_(value) if isinstance(value, Tensor) else row.fill_(value)
        coef = PolicyInputs(*inputs).teacher_coef
        if call.divergence == "none":
            coef.zero_()
        elif call.has_teacher is not None:
            coef.masked_fill_(~call.has_teacher, 0)
        outputs = self.stats.new_zeros(POLICY_OUTPUTS, call.count)
        self.rows = PolicyRows(inputs, outputs, call.context)
        self.found = PolicyOutputs(*outputs)

    def __call__(self, z: Logits, t: Logits | None, part: slice, grad: Tensor | None) -> None:
        call, stats = self.call, self.stats[:, part]
        inputs, outputs, context = self.rows
        rows = PolicyRows(inputs[:, part], outputs[:, part], context)
        kernels = call.backend
        whole = kernels.ROW_FUSED and call.topk is None and call.shard.group is None
        if whole and kernels.takes(z, t, call.divergence, call.round_policy):
            kernels.row_fused(z, t, call.targets[part], stats, grad, policy=rows)
            leave_out(call, part, stats)
            return
        columns = measure(call, z, t, part, stats)
        coef = outputs[PolicyOutputs._fields.index("a") :, part]
        self.write(z, t, part, columns, coef, grad, rows)

    @property
    def losses(self) -> Tensor:
        return self.found.losses

    @property
    def metrics(self) -> dict[str, Tensor]:
        found = self.found
        clipped, clamped = found.clipped.bool(), found.clamped.bool()
        return {"ratio": found.ratio, "clipped": clipped, "clamped": clamped}


class Replay(_Writer):
    """The backward of recompute mode: (3, n) upstream coefficients to gradients."""

    def __init__(self, call: Call, stats: Tensor, coef: Tensor):
        super().__init__(call, stats)
        if call.has_teacher is not None:
            coef[1].masked_fill_(~call.has_teacher, 0)
        self.coef = coef

    def __call__(self, z: Logits, t: Logits | None, part: slice, grad: Tensor | None) -> None:
        columns = None
        if self.call.topk is not None:  # measured again for its columns; the statistics are final
            columns = measure(self.call, z, t, part, self.stats[:, part].clone())
        self.write(z, t, part, columns, self.coef[:, part], grad)
