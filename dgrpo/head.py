"""An `nn.Linear` head whose forward is the loss: what FSDP2 wants.

The loss runs inside the module's own forward, where FSDP has gathered the weight and where its
gradient is reduced. Hidden states are a positional tensor; everything else travels in one frozen
dataclass, whose tensors FSDP leaves where and as they are (`cast_forward_inputs=False`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dgrpo.objectives.context import Context
from dgrpo.ops import (
    TeacherHead,
    TokenStats,
    TopKTeacher,
    linear_logprobs,
    linear_loss,
    linear_token_stats,
)
from dgrpo.ops.heads import transformed
from dgrpo.ops.losses import dgrpo_loss
from dgrpo.ops.prepare import TEACHER_OPTIONS, make_options

MODES = ("loss", "stats", "logprobs")
Result = Tensor | tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class HeadInputs:
    """All that the head needs beside hidden states. Tensors (N,), one entry a hidden state.

    targets: int64, -100 = masked; `targets[n]` is what `hidden[n]` predicts.
    mode: "loss" (gradient in forward), "stats" (statistics, recomputed in backward; with
        `sequence_objective` its loss), "logprobs" (no gradient).
    context: advantages, weights and coefficients; for the losses.
    objective: `f(stats, context)` per token, from `dgrpo.objectives`; None = the fused dGRPO.
    sequence_objective: `f(stats, context)` over all tokens, for losses that couple them; mode
        "stats". Returns a scalar or per-token losses, which are summed; metrics beside, if any.
    options: keyword arguments of the ops (`divergence`, `temperature`, `memory_budget`, ...).
    """

    targets: Tensor
    mode: str = "loss"
    context: Context | None = None
    objective: Callable[[Any, Context], Result] | None = None
    sequence_objective: Callable[[TokenStats, Context], Result] | None = None
    teacher: TeacherHead | TopKTeacher | None = None
    rows: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: got {self.mode!r}, expected one of {', '.join(MODES)}")
        for name, mode in (("objective", "loss"), ("sequence_objective", "stats")):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(f"{name}: got {type(function).__name__}, expected a function")
            if function is not None and self.mode != mode:
                raise ValueError(
                    f"{name}: got a function with mode {self.mode!r}, expected mode {mode!r}, the "
                    "only one that calls it"
                )


class HeadOutput(NamedTuple):
    """`loss`: scalar, None where the mode has none. The rest (N,), 0 where masked.

    Differentiable: `loss`, and in mode "stats" without a `sequence_objective` `logprobs`,
    `divergence` and `entropy`.
    """

    loss: Tensor | None
    logprobs: Tensor
    teacher_logprobs: Tensor | None
    divergence: Tensor | None
    entropy: Tensor
    metrics: dict[str, Tensor]


class FusedHead(nn.Linear):
    """An LM head that computes losses without logits. Parameters named as `nn.Linear`'s.

    logit_scale multiplies and logit_softcap bends the logits (Cohere, Granite, Gemma-2);
    they apply to the losses and to the plain logits alike.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, logit_scale: float = 1.0, logit_softcap: float | None = None
    ) -> FusedHead:
        """A head that shares the parameters of `linear` (tied embeddings stay tied)."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: got {type(linear).__name__}, expected nn.Linear")
        head = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            device="meta",
        )
        head.weight, head.bias = linear.weight, linear.bias
        head.train(linear.training)
        return head

    def merged_weight(self) -> Tensor:
        """The (V, H) weight of the logits. Adapters on the head override this."""
        return self.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Plain logits (..., V), scaled and capped: for generation and for tests."""
        z = nn.functional.linear(hidden, self.merged_weight(), self.bias)
        return transformed(z, self.logit_scale, self.logit_softcap)

    def forward(self, hidden: Tensor, inputs: HeadInputs | None = None) -> HeadOutput | Tensor:
        """hidden: (N, H) or (B, T, H). Without `inputs`, plain logits; else see `HeadInputs`.

        Raises ValueError or TypeError naming the argument.
        """
        if inputs is None:
            return self.logits(hidden)
        shared = {
            "bias": self.bias,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
            "rows": inputs.rows,
            **inputs.options,
        }
        weight, targets = self.merged_weight(), inputs.targets
        if inputs.mode == "logprobs":
            out = linear_logprobs(hidden, weight, targets, **_scoring(shared))
            return HeadOutput(None, out.logprobs, None, None, out.entropy, {})
        if inputs.mode == "stats":
            stats = linear_token_stats(hidden, weight, targets, inputs.teacher, **shared)
            return _sequence_loss(stats, inputs)
        context = _context(inputs)
        if inputs.objective is None:
            return _fused(hidden, weight, targets, inputs.teacher, context, shared)
        objective = inputs.objective
        out = linear_loss(
            hidden,
            weight,
            targets,
            lambda stats, rows: objective(stats, context.at(rows)),
            teacher=inputs.teacher,
            **shared,
        )
        return HeadOutput(*out)


def _context(inputs: HeadInputs) -> Context:
    if not isinstance(inputs.context, Context):
        raise TypeError(
            f"context: got {type(inputs.context).__name__}, expected Context for mode "
            f"{inputs.mode!r}"
        )
    shape = tuple(inputs.targets.shape)
    for name, value in inputs.context.per_token().items():
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)} in context, expected {shape}, that of "
                "targets"
            )
    return inputs.context


def _scoring(options: dict[str, Any]) -> dict[str, Any]:
    """The options without those of a teacher, which scoring does not have."""
    return {name: value for name, value in options.items() if name not in TEACHER_OPTIONS}


def _fused(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: TeacherHead | TopKTeacher | None,
    context: Context,
    options: dict[str, Any],
) -> HeadOutput:
    out = dgrpo_loss(hidden, weight, targets, context, make_options(teacher=teacher, **options))
    metrics = {"ratio": out.ratio, "clipped": out.clipped, "clamped": out.clamped}
    return HeadOutput(*out[:5], metrics)


def _sequence_loss(stats: TokenStats, inputs: HeadInputs) -> HeadOutput:
    loss, metrics = None, {}
    if inputs.sequence_objective is not None:
        result = inputs.sequence_objective(stats, _context(inputs))
        losses, metrics = result if isinstance(result, tuple) else (result, {})
        loss = losses.sum()
        stats = TokenStats(*(value.detach() for value in stats))
    return HeadOutput(
        loss, stats.logprobs, stats.teacher_logprobs, stats.divergence, stats.entropy, metrics
    )
