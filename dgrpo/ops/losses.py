"""The public functions: the fused losses, differentiable statistics, and scores.

Each puts its arguments into one `Options` (and one `Context`), which travel whole from here on.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dgrpo.objectives.context import Context
from dgrpo.objectives.dgrpo_loss import dgrpo
from dgrpo.ops.autograd import LossOutput, run_loss, run_stats
from dgrpo.ops.options import TEACHER_OPTIONS, Options
from dgrpo.ops.steps import Objective, TokenStats
from dgrpo.ops.teachers import TeacherHead, TopKTeacher

P = ParamSpec("P")
T = TypeVar("T")


def opaque(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.compiler.disable`, applied only once a compiler is there.

    Applied at once it would import the whole compiler: a second and 100 MB for everyone.
    """
    disabled: Callable[P, T] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return call


class DgrpoOutput(NamedTuple):
    """`loss`: a differentiable scalar. The rest: detached, shaped like targets, 0 where masked."""

    loss: Tensor
    logprobs: Tensor
    teacher_logprobs: Tensor
    divergence: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor  # bool
    clamped: Tensor  # bool: the log-ratio lies beyond ±20


class LogprobsOutput(NamedTuple):
    """Shaped like targets, detached, fp32 nats, 0 where masked."""

    logprobs: Tensor
    entropy: Tensor


@opaque
def linear_dgrpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    teacher: TeacherHead | TopKTeacher | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    policy_weights: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    is_cap: float | None = None,
    token_weights: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_dual: float | None = None,
    teacher_coef: float | Tensor = 0.5,
    divergence: str = "reverse_kl",
    divergence_clip: float | None = None,
    jsd_beta: float = 0.5,
    jeffreys_weight: float | Tensor = 0.5,
    ref_coef: float = 0.0,
    entropy_coef: float = 0.0,
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
) -> DgrpoOutput:
    """LM head, softmax, full-vocabulary divergence to a teacher and clipped GRPO in one pass.

    `sum_n w_n (-u min(rho A, clip(rho) A) + beta D + beta_ref k3 - c_E Ent)` (dGRPO, 2605.12227),
    with `rho = exp(logp - old_logprobs)`. Logits of shape (N, V) never exist, forward or backward;
    gradients of hidden, weight and bias are finished in the forward pass.

    Args:
        hidden: (N, H) or (B, T, H), bf16, fp16 or fp32 (fp64 on the CPU). `hidden[n]` predicts
            `targets[n]`: nothing is shifted inside.
        weight: (V, H), the LM head. Frozen (`requires_grad=False`): its product does not run.
        targets: (N,) or (B, T) int64, -100 = no loss on this token.
        advantages: shaped like targets.
        teacher: `TeacherHead` (full distribution), `TopKTeacher`, or None.
        old_logprobs: shaped like targets, nats; None = on-policy: ratio 1, with gradient.
        token_weights: shaped like targets; every normaliser is in here. None = 1 / number of
            unmasked tokens (of this call).
        teacher_coef: beta, a number or shaped like targets; 0 skips a token's divergence.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        temperature, teacher_temperature: divide the logits.
        rows: (n,) int64, flat indices of the unmasked tokens, on the device or the host. Saves the
            host sync that finding them costs on a GPU.
        memory_budget: bytes of transient workspace (beside the gradients themselves).

    Rare args:
        ref_logprobs, ref_coef: a k3 penalty to a reference policy.
        policy_weights: detached importance weights u of the policy term; or `sampler_logprobs` with
            `is_cap`: u = min(exp(logp - sampler_logprobs), is_cap), from this very pass.
        clip_dual: the c > 1 of dual clip. entropy_coef: an entropy bonus.
        divergence: "reverse_kl" KL(p‖q), "forward_kl" KL(q‖p), "clipped_forward_kl" (each column's
            term at most `divergence_clip`), "jsd" (TRL's generalised JSD, `jsd_beta`), "jeffreys"
            (both KLs; `jeffreys_weight` is the share of KL(q‖p), a number or shaped like targets).
        bias (V,), logit_scale, logit_softcap: logits are cap(scale (h W + bias)) / temperature; a
            bias of -inf forbids its token, capped or not.
        vocab_size: compare the first vocab_size columns of both heads.
        policy_logits: "bfloat16" rounds the linear layer's output (with its bias) for the policy
            term, as an engine with bf16 logits does; divergence and entropy stay fp32.
        check: validate values too (targets' range, NaN), at the cost of host syncs. Without it a
            target outside the vocabulary makes its loss NaN and reads nothing out of bounds.
        backend: "auto", "triton" or "torch".
        group, vocab_start: weight (and the teacher's) are this rank's rows of a vocabulary split
            over `group`, from row vocab_start on; a `Shard(0)` DTensor works too. Tokens are
            replicated. Costs one small all-gather and one sync to agree on the arguments.

    Returns:
        The loss and per-token values; without any unmasked token a loss of 0, still connected.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it should be.
    """
    options = Options(
        teacher=teacher, divergence=divergence, divergence_clip=divergence_clip, jsd_beta=jsd_beta,
        jeffreys_weight=jeffreys_weight,
        temperature=temperature, teacher_temperature=teacher_temperature, bias=bias,
        logit_scale=logit_scale, logit_softcap=logit_softcap, vocab_size=vocab_size,
        policy_logits=policy_logits, rows=rows, memory_budget=memory_budget, check=check,
        backend=backend, group=group, vocab_start=vocab_start,
    )  # fmt: skip
    context = Context(
        advantages, token_weights, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs,
        policy_weights=policy_weights, sampler_logprobs=sampler_logprobs, is_cap=is_cap,
        clip_low=clip_low, clip_high=clip_high, clip_dual=clip_dual, teacher_coef=teacher_coef,
        ref_coef=ref_coef, entropy_coef=entropy_coef,
    )  # fmt: skip
    *common, metrics = run_loss(hidden, weight, targets, options, dgrpo, context)
    return DgrpoOutput(*common, metrics["ratio"], metrics["clipped"], metrics["clamped"])


@opaque
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: Objective,
    teacher: TeacherHead | TopKTeacher | None = None,
    **options: Any,
) -> LossOutput:
    """Any token-separable objective written in PyTorch, at the cost of 4 matrix products.

    Args:
        hidden: (N, H) or (B, T, H); weight: (V, H); targets: (N,) or (B, T) int64, -100 = masked.
        objective: `f(stats, rows) -> losses` or `(losses, {name: (R,)})`. `stats` holds `logprobs`,
            `divergence`, `entropy` (differentiable) and `teacher_logprobs`, each (R,) fp32; `rows`
            (R,) int64 indexes the caller's own flattened (N,) tensors; `losses` (R,), already
            weighted: the loss is their sum. It is called on some tokens at a time and must treat
            each alone; no gradient reaches what it closes over.
        teacher, options: the fields of `Options`, as in `linear_dgrpo_loss`.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it should be.
    """
    return run_loss(
        hidden, weight, targets, Options.of(teacher=teacher, **options), objective=objective
    )


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

    Args:
        hidden, weight, targets, teacher, options: as in `linear_loss`.

    Returns:
        Each field shaped like targets, fp32 nats, 0 where masked; all but `teacher_logprobs` are
        differentiable in hidden, weight and bias.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it should be.
    """
    return run_stats(hidden, weight, targets, Options.of(teacher=teacher, **options))


@opaque
def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> LogprobsOutput:
    """Log-probabilities and entropy of given tokens, without gradient: one matrix product.

    For old, reference and teacher log-probabilities.

    Args:
        hidden, weight, targets, options: as in `linear_loss`, but those of a teacher.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it should be.
    """
    given = sorted(set(TEACHER_OPTIONS) & options.keys())
    if given:
        raise TypeError(
            f"{given[0]}: got an argument of a teacher, expected none; linear_token_stats has it"
        )
    with torch.no_grad():
        stats = run_stats(hidden, weight, targets, Options.of(**options))
    return LogprobsOutput(stats.logprobs, stats.entropy)
