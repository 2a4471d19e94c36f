"""The losses: `linear_dgrpo_loss` and, for any other objective, `linear_loss`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dgrpo.objectives.context import Context
from dgrpo.objectives.dgrpo_loss import dgrpo
from dgrpo.ops.call import Need, needs
from dgrpo.ops.functions import GradientInForward, no_autocast
from dgrpo.ops.inputs import check_number
from dgrpo.ops.opaque import opaque
from dgrpo.ops.prepare import Options, Prepared, make_options, prepare
from dgrpo.ops.steps import (
    Descend,
    FusedPolicy,
    Objective,
    Score,
    TokenStats,
    token_stats,
    unpack,
)
from dgrpo.ops.sweep import sweep
from dgrpo.ops.teachers import TeacherHead, TopKTeacher
from dgrpo.ops.values import check_finite

PER_TOKEN = (  # fields of `Context` shaped like targets, or None
    "advantages",
    "token_weights",
    "old_logprobs",
    "ref_logprobs",
    "policy_weights",
    "sampler_logprobs",
)


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


class LossOutput(NamedTuple):
    """`loss`: a differentiable scalar. The rest: detached, shaped like targets, 0 where masked."""

    loss: Tensor
    logprobs: Tensor
    teacher_logprobs: Tensor
    divergence: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


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

    Everyday:
        hidden: (N, H) or (B, T, H); weight: (V, H); targets: (N,) or (B, T) int64, -100 = masked.
        objective: `f(stats, rows) -> losses` or `(losses, {name: (R,)})`. `stats` holds `logprobs`,
            `divergence`, `entropy` (differentiable) and `teacher_logprobs`, each (R,) fp32; `rows`
            (R,) int64 indexes the caller's own flattened (N,) tensors; `losses` (R,), already
            weighted: the loss is their sum. It is called on some tokens at a time and must treat
            each alone; no gradient reaches what it closes over.
        teacher, options: as in `linear_dgrpo_loss` (`divergence`, `divergence_clip`, `jsd_beta`,
            `temperature`, `teacher_temperature`, `bias`, `logit_scale`, `logit_softcap`,
            `vocab_size`, `policy_logits`, `rows`, `memory_budget`, `check`, `backend`, `group`,
            `vocab_start`).

    Raises ValueError or TypeError naming the argument.
    """

    def check_objective() -> None:
        if not callable(objective):
            raise TypeError(f"objective: got {type(objective).__name__}, expected a function")

    settings = make_options(teacher=teacher, **options)
    prepared = prepare(hidden, weight, targets, settings, check_more=check_objective)
    return LossOutput(*_run(prepared, objective, lambda: Descend(prepared.call, objective)))


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

    Everyday:
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
    Rare:
        ref_logprobs, ref_coef: a k3 penalty to a reference policy.
        policy_weights: detached importance weights u of the policy term; or `sampler_logprobs` with
            `is_cap`: u = min(exp(logp - sampler_logprobs), is_cap), from this very pass.
        clip_dual: the c > 1 of dual clip. entropy_coef: an entropy bonus.
        divergence: "reverse_kl" KL(p‖q), "forward_kl" KL(q‖p), "clipped_forward_kl" (each column's
            term at most `divergence_clip`), "jsd" (TRL's generalised JSD, `jsd_beta`).
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

    Returns DgrpoOutput. Without any unmasked token the loss is 0, connected to its inputs.
    Raises ValueError or TypeError naming the argument, what it was and what it should be.
    """
    options = Options(
        teacher, divergence, divergence_clip, jsd_beta, temperature, teacher_temperature, bias,
        logit_scale, logit_softcap, vocab_size, policy_logits, rows, memory_budget, check, backend,
        group, vocab_start,
    )  # fmt: skip
    context = Context(
        advantages, token_weights, old_logprobs, ref_logprobs, policy_weights, sampler_logprobs,
        is_cap, clip_low, clip_high, clip_dual, teacher_coef, ref_coef, entropy_coef,
    )  # fmt: skip
    return dgrpo_loss(hidden, weight, targets, context, options)


@opaque
def dgrpo_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, context: Context, options: Options
) -> DgrpoOutput:
    """`linear_dgrpo_loss` with its arguments in two records; `token_weights` may be None."""
    per_token = {name: getattr(context, name) for name in PER_TOKEN}
    if isinstance(context.teacher_coef, Tensor) and context.teacher_coef.dim():
        per_token["teacher_coef"] = context.teacher_coef
    prepared = prepare(
        hidden,
        weight,
        targets,
        options,
        per_token,
        lambda: _check_coefficients(context, options.check),
    )
    call, given = prepared.call, dict(prepared.per_token)
    if "token_weights" not in given:
        given["token_weights"] = (
            given["advantages"].new_full((), 1 / max(call.count, 1)).expand(targets.shape)
        )
    if "teacher_coef" not in given and isinstance(context.teacher_coef, Tensor):
        given["teacher_coef"] = context.teacher_coef.detach()
    context = replace(context, **given)

    def objective(stats: TokenStats, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return dgrpo(stats, context.at(tokens))

    def step() -> Descend | FusedPolicy:
        # In fp16 the units of G's rows follow from the coefficients, before the kernel runs.
        if call.backend.FUSES_DGRPO and call.dtype != torch.float16:
            return FusedPolicy(call, context)
        return Descend(call, objective)

    *common, metrics = _run(prepared, objective, step)
    return DgrpoOutput(*common, metrics["ratio"], metrics["clipped"], metrics["clamped"])


def _check_coefficients(context: Context, check: bool) -> None:
    if context.advantages is None:
        raise TypeError("advantages: got None, expected a tensor shaped like targets")
    if not isinstance(context.teacher_coef, Tensor):
        check_number("teacher_coef", context.teacher_coef)
    elif check and not context.teacher_coef.dim():
        check_finite("teacher_coef", context.teacher_coef)
    check_number("clip_low", context.clip_low, least=0)
    check_number("clip_high", context.clip_high, least=0)
    check_number("ref_coef", context.ref_coef)
    check_number("entropy_coef", context.entropy_coef)
    if context.clip_dual is not None:
        check_number("clip_dual", context.clip_dual, above=1)
    if context.is_cap is not None:
        check_number("is_cap", context.is_cap, above=0)
        if context.sampler_logprobs is None:
            raise ValueError(
                f"is_cap: got {context.is_cap} without sampler_logprobs, expected None"
            )
    if context.sampler_logprobs is not None and context.policy_weights is not None:
        raise ValueError(
            "policy_weights: got a tensor beside sampler_logprobs, expected one of the two; both "
            "define the importance weight u"
        )
    if context.ref_coef and context.ref_logprobs is None:
        raise ValueError(
            f"ref_logprobs: got None with ref_coef={context.ref_coef}, expected a tensor"
        )


def _run(
    prepared: Prepared, objective: Objective, make_step: Callable[[], Descend | FusedPolicy]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Loss, statistics and metrics, with gradients where something needs them."""
    call, hidden, weight, bias, _ = prepared
    need = needs(hidden, weight, bias)
    if need.any():
        step = make_step()
        loss = GradientInForward.apply(hidden, weight, bias, need, call, step)
        metrics = step.metrics
    else:
        step = Score(call)
        with torch.no_grad(), no_autocast(call.device):
            sweep(call, hidden, weight, bias, Need(), step)
            stats = token_stats(step.stats)
            losses, metrics = unpack(objective(stats, call.rows), call.count)
            loss = losses.masked_fill(stats.logprobs.isnan(), torch.nan).sum()
    logprobs, divergence, entropy, teacher_logprobs = map(call.scatter, token_stats(step.stats))
    metrics = {name: call.scatter(value) for name, value in metrics.items()}
    return loss, logprobs, teacher_logprobs, divergence, entropy, metrics
