"""The steps of the sweep: score, descend an objective, fuse dGRPO, replay upstream coefficients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dgrpo.objectives.context import Context
from dgrpo.ops.call import Call
from dgrpo.ops.gradients import row_units
from dgrpo.ops.measure import measure, put_columns
from dgrpo.ops.teachers import TopKTeacher
from dgrpo.ops.topk import TopKRows
from dgrpo_kernels.rows import POLICY_INPUTS, POLICY_OUTPUTS, Logits, PolicyRows, RowStats


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
        columns: TopKRows | None,
        coef: Tensor,
        grad: Tensor,
    ) -> None:
        call, stats = self.call, self.stats[:, part]
        if self.units is not None:
            divergence = RowStats(*stats.unbind(0)).divergence
            reverse_kl = divergence if call.divergence == "reverse_kl" else None
            units = row_units(coef, reverse_kl, call.logit_scale / call.temperature)
            self.units[part] = units
            coef = coef / units
        call.backend.row_grad(z, t, call.targets[part], stats, coef, grad, **self.options())
        self.put(part, columns, coef, grad)

    def put(self, part: slice, columns: TopKRows | None, coef: Tensor, grad: Tensor) -> None:
        if columns is not None:
            entropy = RowStats(*self.stats[:, part].unbind(0)).entropy
            put_columns(self.call, columns, part, entropy, coef, grad)

    def options(self) -> dict:
        call = self.call
        bucketed = isinstance(call.teacher, TopKTeacher)
        return {
            "divergence": "bucket" if bucketed else call.divergence,
            "divergence_clip": call.divergence_clip,
            "jsd_beta": call.jsd_beta,
            "round_policy": call.round_policy,
        }


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


def unpack(result: object, rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """An objective's result as losses and metrics, refused unless (R,) each."""
    losses, metrics = result if isinstance(result, tuple) else (result, {})
    for name, value in {"losses": losses, **metrics}.items():
        if not isinstance(value, Tensor) or value.shape != (rows,):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"objective: got {name} {got}, expected a tensor of shape ({rows},)")
    return losses, metrics


class FusedPolicy(_Writer):
    """dGRPO with its objective in the gradient kernel's prologue (Triton). Not for fp16."""

    def __init__(self, call: Call, context: Context):
        super().__init__(call, call.new_stats())
        at = context.at(slice(None) if call.dense else call.rows)
        inputs = self.stats.new_zeros(POLICY_INPUTS, call.count)
        given = (
            at.token_weights,
            at.advantages,
            at.old_logprobs,
            at.ref_logprobs,
            at.policy_weights,
            at.sampler_logprobs,
            at.teacher_coef if call.divergence != "none" else 0.0,
        )
        for row, value in zip(inputs, given, strict=True):
            if value is not None:
                row.copy_(value) if isinstance(value, Tensor) else row.fill_(value)
        if call.has_teacher is not None:
            inputs[-1].masked_fill_(~call.has_teacher, 0)
        self.rows = PolicyRows(
            inputs,
            self.stats.new_zeros(POLICY_OUTPUTS, call.count),
            has_old=context.old_logprobs is not None,
            has_ref=context.ref_logprobs is not None,
            has_weights=context.policy_weights is not None,
            has_sampler=context.sampler_logprobs is not None,
            clip_low=context.clip_low,
            clip_high=context.clip_high,
            clip_dual=float("inf") if context.clip_dual is None else context.clip_dual,
            is_cap=float("inf") if context.is_cap is None else context.is_cap,
            ref_coef=context.ref_coef,
            entropy_coef=context.entropy_coef,
        )

    def __call__(self, z: Logits, t: Logits | None, part: slice, grad: Tensor | None) -> None:
        call, stats = self.call, self.stats[:, part]
        columns = measure(call, z, t, part, stats)
        outputs = self.rows.outputs[:, part]
        rows = self.rows._replace(inputs=self.rows.inputs[:, part], outputs=outputs)
        call.backend.row_grad(
            z,
            t,
            call.targets[part],
            stats,
            None,
            grad,
            policy=rows,
            **self.options(),
        )
        self.put(part, columns, outputs[4:7], grad)

    @property
    def losses(self) -> Tensor:
        return self.rows.outputs[0]

    @property
    def metrics(self) -> dict[str, Tensor]:
        _, ratio, clipped, clamped, *_ = self.rows.outputs.unbind(0)
        return {"ratio": ratio, "clipped": clipped.bool(), "clamped": clamped.bool()}


class Replay(_Writer):
    """The backward of recompute mode: (3, n) upstream coefficients to gradients."""

    def __init__(self, call: Call, stats: Tensor, coef: Tensor):
        super().__init__(call, stats)
        if call.has_teacher is not None:
            coef[1].masked_fill_(~call.has_teacher, 0)
        self.coef = coef

    def __call__(self, z: Logits, t: Logits | None, part: slice, grad: Tensor | None) -> None:
        columns = measure(self.call, z, t, part, self.stats[:, part], again=True)
        self.write(z, t, part, columns, self.coef[:, part], grad)
