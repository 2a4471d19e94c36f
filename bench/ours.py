"""This library's modes as providers, on the same `Case` and with the same terms as the rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import dgrpo
from bench.cases import Case
from bench.provider import NEEDS_GPU, Provider, clipped_loss
from bench.reference import BOTH, CROSS_ENTROPY, FORWARD_KL, KL, POLICY
from dgrpo.objectives import Context
from dgrpo.objectives.dgrpo_loss import dgrpo as dgrpo_objective

MIB = 2**20


def teacher(case: Case) -> dgrpo.TeacherHead:
    """The teacher of a case as the op takes it."""
    return dgrpo.TeacherHead(case.teacher_hidden, case.teacher_weight)


def fused(case: Case, *, budget: int, backend: str = "auto", with_teacher: bool = True) -> Tensor:
    """Gradient in forward, the objective fused into the kernel: 4 GEMM passes, or 3."""
    out = dgrpo.linear_dgrpo_loss(
        case.hidden,
        case.weight,
        case.targets,
        case.advantages,
        teacher=teacher(case) if with_teacher else None,
        old_logprobs=case.old_logprobs,
        clip_low=case.clip,
        clip_high=case.clip,
        teacher_coef=case.teacher_coef,
        rows=all_rows(case),
        memory_budget=budget,
        backend=backend,
    )
    return out.loss


def plain_objective(case: Case, *, budget: int) -> Tensor:
    """Gradient in forward, the objective in PyTorch: 4 GEMM passes."""
    tokens = case.shape.tokens
    context = Context(
        case.advantages,
        torch.full_like(case.advantages, 1 / tokens),
        old_logprobs=case.old_logprobs,
        clip_low=case.clip,
        clip_high=case.clip,
        teacher_coef=case.teacher_coef,
    )
    out = dgrpo.linear_loss(
        case.hidden,
        case.weight,
        case.targets,
        lambda stats, rows: dgrpo_objective(stats, context.at(rows)),
        teacher=teacher(case),
        rows=all_rows(case),
        memory_budget=budget,
    )
    return out.loss


def divergence_alone(case: Case, *, budget: int, divergence: str = "reverse_kl") -> Tensor:
    """A KL term alone, as an objective of one line: 4 GEMM passes."""
    weight = case.teacher_coef / case.shape.tokens
    out = dgrpo.linear_loss(
        case.hidden,
        case.weight,
        case.targets,
        lambda stats, rows: weight * stats.divergence,
        teacher=teacher(case),
        divergence=divergence,
        rows=all_rows(case),
        memory_budget=budget,
    )
    return out.loss


def cross_entropy(case: Case, *, budget: int) -> Tensor:
    """Cross-entropy, as an objective of one line: 3 GEMM passes."""
    weight = -1 / case.shape.tokens
    out = dgrpo.linear_loss(
        case.hidden,
        case.weight,
        case.targets,
        lambda stats, rows: weight * stats.logprobs,
        rows=all_rows(case),
        memory_budget=budget,
    )
    return out.loss


def recompute(case: Case, *, budget: int) -> Tensor:
    """Differentiable statistics, the loss outside, logits recomputed in backward: 6 GEMM passes."""
    stats = dgrpo.linear_token_stats(
        case.hidden,
        case.weight,
        case.targets,
        teacher=teacher(case),
        rows=all_rows(case),
        memory_budget=budget,
    )
    return clipped_loss(case, stats.logprobs) + case.teacher_coef * stats.divergence.mean()


def all_rows(case: Case) -> Tensor:
    """Indices of the unmasked tokens, as a trainer knows them: saves a sync on a GPU. (N,)."""
    return torch.arange(case.shape.tokens, device=case.targets.device)


def ours(budgets: tuple[int, ...]) -> list[Provider]:
    """The library's modes, the fused one at each byte budget. On a CPU the backend is torch."""
    gpu = torch.cuda.is_available()
    first = budgets[0]
    backend = "triton" if gpu else "torch"

    def provider(name: str, terms: str, loss: Callable, absent: str = "", **options) -> Provider:
        return Provider(f"ours, {name}", terms, partial(loss, **options), absent, ours=True)

    fastest = [
        provider(f"fused, {budget // MIB} MiB", BOTH, fused, budget=budget, backend=backend)
        for budget in budgets
    ]
    fastest = [replace(promised, contract=True) for promised in fastest]
    if gpu:
        other = replace(
            provider("fused, torch backend", BOTH, fused, budget=first, backend="torch"),
            most_tokens=4096,
            too_many="a reference in plain torch, launched tile by tile",
        )
    else:
        other = provider(
            "fused, triton backend", BOTH, fused, NEEDS_GPU, budget=first, backend="triton"
        )
    kd = {"budget": first, "divergence": "forward_kl"}
    return [
        *fastest,
        other,
        provider("linear_loss", BOTH, plain_objective, budget=first),
        provider("recompute", BOTH, recompute, budget=first),
        provider("fused, no teacher", POLICY, fused, budget=first, with_teacher=False),
        provider("linear_loss, KL alone", KL, divergence_alone, budget=first),
        provider("linear_loss, SFT", CROSS_ENTROPY, cross_entropy, budget=first),
        provider("linear_loss, KD", FORWARD_KL, divergence_alone, **kd),
    ]
