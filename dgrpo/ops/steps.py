"""The steps of the sweep: score, descend an objective, fuse dGRPO, replay upstream coefficients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dgrpo.objectives.context import Context
from dgrpo.ops.call import Call
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
        self.grad_scale: Tensor | None = None

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
        options = self.options()
        call.backend.row_grad(z, t, call.targets[part], stats, coef, grad, **options)
        self.put(part, columns, coef, grad)

    def put(self, part: slice, columns: TopKRows | None, coef: Tensor, grad: Tensor) -> None:
        if columns is not None:
            scaled = coef if self.grad_scale is None else coef * self.grad_scale
            entropy = RowStats(*self.stats[:, part].unbind(0)).entropy
            put_columns(self.call, columns, part, entropy, scaled, grad)

    def options(self) -> dict:
        call = self.call
        bucketed = isinstance(call.teacher, TopKTeacher)
        return {
            "grad_scale": self.grad_scale,
            "divergence": "bucket" if bucketed else call.divergence,
            "divergence_clip": call.divergence_clip,
            "jsd_beta": call.jsd_beta,
            "round_policy": call.round_policy,
        }


class Descend(_Writer):
    """A token-separable objective in PyTorch, differentiated on (R,) vectors."""

    def __init__(self, call: Call, objective: Objective, grad_scale: Tensor | None = None):
        super().__init__(call, call.new_stats())
        self.objective = objective
        self.grad_scale = grad_scale
        self.scale_is_given = grad_scale is not None
        self.losses = self.stats.new_zeros(call.count)
        self.metrics: dict[str, Tensor] = {}
        if not call.count:  # no part will come, but the metrics have their names
            self.differentiate(slice(0, 0))

    def __call__(self, z: Logits, t: Logits | None, part: slice, grad: Tensor | None) -> None:
        columns = measure(self.call, z, t, part, self.stats[:, part])
        coef = self.differentiate(part)
        if self.call.dtype == torch.float16 and not self.scale_is_given:
            self.find_scale(coef)
        self.write(z, t, part, columns, coef, grad)

    def find_scale(self, coef: Tensor) -> None:
        """From the first part with a gradient: what comes before it is zero at any scale."""
        scale, found = power_of_two(coef, self.call.count), (coef != 0).any()
        if self.grad_scale is not None:
            scale = torch.where(self.found, self.grad_scale, scale)
            found = found | self.found
        self.grad_scale, self.found = scale, found

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
    """dGRPO with its objective in the gradient kernel's prologue (Triton)."""

    def __init__(self, call: Call, context: Context, grad_scale: Tensor | None):
        super().__init__(call, call.new_stats())
        self.grad_scale = grad_scale
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
        if call.dtype == torch.float16:
            self.grad_scale = power_of_two(coef, call.count)

    def __call__(self, z: Logits, t: Logits | None, part: slice, grad: Tensor | None) -> None:
        columns = measure(self.call, z, t, part, self.stats[:, part], again=True)
        self.write(z, t, part, columns, self.coef[:, part], grad)


def power_of_two(coefficients: Tensor, count: int) -> Tensor:
    """A (1,) power of two near 1 / max|coefficients|, computed on the device.

    fp16 gradients of tokens that weigh 1/N underflow without it. Where all are zero, 1 / (1 / N).
    """
    if not coefficients.numel():
        return torch.ones(1, device=coefficients.device)
    top = coefficients.detach().abs().amax().float()
    usable = (top > 0) & top.isfinite()
    exponent = torch.floor(torch.log2(top.where(usable, 1.0 / max(count, 1))))
    return torch.exp2(-exponent.clamp(min=-100)).reshape(1)
