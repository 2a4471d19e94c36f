"""An `nn.Linear` head whose forward is the loss: what FSDP2 wants.

The loss runs inside the module's own forward, where FSDP has gathered the weight and where its
gradient is reduced. Hidden states are a positional tensor; everything else travels in one frozen
dataclass, whose tensors FSDP leaves where and as they are (`cast_forward_inputs=False`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dgrpo.objectives import Context
from dgrpo.objectives.dgrpo_loss import dgrpo
from dgrpo.ops.autograd import run_loss, run_stats
from dgrpo.ops.gemm import accumulator, project
from dgrpo.ops.losses import opaque
from dgrpo.ops.options import Options
from dgrpo.ops.steps import TokenStats

_loss, _stats = opaque(run_loss), opaque(run_stats)
MODES = ("loss", "stats", "logprobs")
LIFT_BYTES = 2**26  # scratch for lifting a bf16 head on the CPU
Result = Tensor | tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class HeadInputs:
    """All that the head needs beside hidden states. Tensors (N,), one entry per hidden state.

    targets: int64, -100 = masked; `targets[n]` is what `hidden[n]` predicts.
    mode: "loss" (gradient in forward), "stats" (statistics, recomputed in backward; with
        `sequence_objective` its loss), "logprobs" (no gradient).
    context: advantages, weights and coefficients; for the losses.
    objective: `f(stats, context)` per token, from `dgrpo.objectives`; None = the fused dGRPO.
    sequence_objective: `f(stats, context)` over all tokens, for losses that couple them; mode
        "stats". Returns a scalar or per-token losses, which are summed; metrics beside, if any.
    options: those of the ops (teacher, rows, divergence, temperature, ...); the head sets `bias`,
        `logit_scale` and `logit_softcap`, and scoring leaves those of a teacher out.
    """

    targets: Tensor
    mode: str = "loss"
    context: Context | None = None
    objective: Callable[[Any, Context], Result] | None = None
    sequence_objective: Callable[[TokenStats, Context], Result] | None = None
    options: Options = Options()

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
        if self.mode == "loss" or self.sequence_objective is not None:
            self._check_context()
        own = self.options
        if not isinstance(own, Options):
            raise TypeError(f"options: got {type(own).__name__}, expected Options")
        if own.bias is not None or own.logit_scale != 1 or own.logit_softcap is not None:
            raise ValueError(
                "options: got a bias, logit_scale or logit_softcap, expected none; they are the "
                "head's own"
            )

    def _check_context(self) -> None:
        if not isinstance(self.context, Context):
            kind = type(self.context).__name__
            raise TypeError(f"context: got {kind}, expected Context for mode {self.mode!r}")
        shape = tuple(self.targets.shape)
        for name, value in self.context.per_token().items():
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{name}: got shape {tuple(value.shape)} in context, expected {shape}, that of "
                    "targets"
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

    @torch.no_grad()
    def fp32_logits(self, hidden: Tensor) -> Tensor:
        """(R, V) logits of (R, H) hidden states, summed in fp32 as in the loss. No gradient."""
        weight = self.merged_weight()
        dtype = accumulator(weight.dtype)
        z = torch.empty(len(hidden), len(weight), dtype=dtype, device=weight.device)
        project(hidden.to(weight.dtype), weight, z, LIFT_BYTES)
        if self.bias is not None:
            z += self.bias
        return transformed(z, self.logit_scale, self.logit_softcap)

    def forward(self, hidden: Tensor, inputs: HeadInputs | None = None) -> HeadOutput | Tensor:
        """hidden: (N, H) or (B, T, H). Without `inputs`, plain logits; else see `HeadInputs`.

        Raises ValueError or TypeError naming the argument.
        """
        if inputs is None:
            return self.logits(hidden)
        weight, targets = self.merged_weight(), inputs.targets
        options = replace(
            inputs.options,
            bias=self.bias,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
        )
        if inputs.mode == "logprobs":
            with torch.no_grad():
                stats = _stats(hidden, weight, targets, options.without_teacher())
            return HeadOutput(None, stats.logprobs, None, None, stats.entropy, {})
        if inputs.mode == "stats":
            return _sequence_loss(_stats(hidden, weight, targets, options), inputs)
        objective = dgrpo if inputs.objective is None else inputs.objective
        return HeadOutput(*_loss(hidden, weight, targets, options, objective, inputs.context))


def _sequence_loss(stats: TokenStats, inputs: HeadInputs) -> HeadOutput:
    loss, metrics = None, {}
    if inputs.sequence_objective is not None:
        result = inputs.sequence_objective(stats, inputs.context)
        losses, metrics = result if isinstance(result, tuple) else (result, {})
        loss = losses.sum()
        stats = TokenStats(*(value.detach() for value in stats))
    return HeadOutput(
        loss, stats.logprobs, stats.teacher_logprobs, stats.divergence, stats.entropy, metrics
    )


def transformed(linear: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Plain logits of a linear layer's output: scaled and softly capped. -inf (a bias) stays."""
    z = linear * scale
    if softcap is None:
        return z
    return (torch.tanh(z / softcap) * softcap).masked_fill(z == -torch.inf, -torch.inf)
