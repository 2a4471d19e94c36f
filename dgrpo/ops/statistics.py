"""Per-token statistics without logits: differentiable by recomputation, or scored."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dgrpo.ops.call import Need, needs
from dgrpo.ops.functions import Recompute, no_autocast
from dgrpo.ops.opaque import opaque
from dgrpo.ops.prepare import Options, prepare
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
    *,
    divergence: str = "reverse_kl",
    divergence_clip: float | None = None,
    jsd_beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    policy_logits: str = "float32",
    rows: Tensor | None = None,
    memory_budget: int = 2**30,
    check: bool = False,
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> TokenStats:
    """Differentiable log-probability, divergence and entropy of each token.

    For objectives that couple tokens (GSPO's sequence ratio): write the loss on the result. The
    backward pass computes the logits again, 6 matrix products in all against 4 of `linear_loss`.

    hidden: (N, H) or (B, T, H); weight: (V, H); targets: shaped like hidden without H, int64, -100
    = masked. Other arguments: as in `linear_dgrpo_loss`.

    Returns TokenStats(logprobs, divergence, entropy, teacher_logprobs), each shaped like targets,
    fp32 nats, 0 where masked; the first three are differentiable in hidden, weight and bias.
    Raises ValueError or TypeError naming the argument.
    """
    options = Options(
        teacher, divergence, divergence_clip, jsd_beta, temperature, teacher_temperature, bias,
        logit_scale, logit_softcap, vocab_size, policy_logits, rows, memory_budget, check, backend,
        group, vocab_start,
    )  # fmt: skip
    call, hidden, weight, bias, _ = prepare(hidden, weight, targets, options)
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
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    policy_logits: str = "float32",
    rows: Tensor | None = None,
    memory_budget: int = 2**30,
    check: bool = False,
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> LogprobsOutput:
    """Log-probabilities and entropy of given tokens, without gradient: one matrix product.

    For old, reference and teacher log-probabilities. Arguments as in `linear_dgrpo_loss`. Returns
    LogprobsOutput, shaped like targets. Raises ValueError or TypeError naming the argument.
    """
    with torch.no_grad():
        stats = linear_token_stats(
            hidden,
            weight,
            targets,
            temperature=temperature,
            bias=bias,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            vocab_size=vocab_size,
            policy_logits=policy_logits,
            rows=rows,
            memory_budget=memory_budget,
            check=check,
            backend=backend,
            group=group,
            vocab_start=vocab_start,
        )
    return LogprobsOutput(stats.logprobs, stats.entropy)
