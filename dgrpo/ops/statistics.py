"""Per-token statistics without logits: differentiable by recomputation, or scored."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgrpo.ops.call import Need, needs
from dgrpo.ops.functions import Recompute, no_autocast
from dgrpo.ops.opaque import opaque
from dgrpo.ops.prepare import TEACHER_OPTIONS, make_options, prepare
from dgrpo.ops.steps import Score, TokenStats, token_stats
from dgrpo.ops.sweep import sweep
from dgrpo.ops.teachers import TeacherHead, TopKTeacher


class LogprobsOutput(NamedTuple):
    """Shaped like targets, detached, fp32 nats, 0 where masked."""

    logprobs: Tensor
    entropy: Tensor


class _Scatter(torch.autograd.Function):
    """(n,) values to the shape of targets, and their gradients back."""

    @staticmethod
    def forward(ctx, values, call):
        ctx.call = call
        return call.scatter(values).clone() if call.dense else call.scatter(values)

    @staticmethod
    def backward(ctx, upstream):
        return upstream.reshape(-1)[ctx.call.rows], None


@opaque
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: TeacherHead | TopKTeacher | None = None,
    **options: Any,
) -> TokenStats:
    """Differentiable log-probability, divergence and entropy of each token.

    For objectives that couple tokens (GSPO's sequence ratio): write the loss on the result. The
    backward pass computes the logits again, 6 matrix products in all against 4 of `linear_loss`.

    hidden: (N, H) or (B, T, H); weight: (V, H); targets: shaped like hidden without H, int64, -100
    = masked. teacher, options: as in `linear_loss`.

    Returns TokenStats(logprobs, divergence, entropy, teacher_logprobs), each shaped like targets,
    fp32 nats, 0 where masked; the first three are differentiable in hidden, weight and bias.
    Raises ValueError or TypeError naming the argument.
    """
    call, hidden, weight, bias, _ = prepare(
        hidden, weight, targets, make_options(teacher=teacher, **options)
    )
    need = needs(hidden, weight, bias)
    if need.any():
        stats = Recompute.apply(hidden, weight, bias, need, call)
        return TokenStats(*(_Scatter.apply(value, call) for value in stats))
    step = Score(call)
    with torch.no_grad(), no_autocast(call.device):
        sweep(call, hidden, weight, bias, Need(), step)
    return TokenStats(*map(call.scatter, token_stats(step.stats)))


@opaque
def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> LogprobsOutput:
    """Log-probabilities and entropy of given tokens, without gradient: one matrix product.

    For old, reference and teacher log-probabilities. hidden, weight, targets and options (all but
    those of a teacher): as in `linear_dgrpo_loss`. Returns LogprobsOutput, shaped like targets.
    Raises ValueError or TypeError naming the argument.
    """
    given = sorted(TEACHER_OPTIONS & options.keys())
    if given:
        raise TypeError(
            f"{given[0]}: got an argument of a teacher, expected none; linear_token_stats has it"
        )
    with torch.no_grad():
        stats = linear_token_stats(hidden, weight, targets, **options)
    return LogprobsOutput(stats.logprobs, stats.entropy)
