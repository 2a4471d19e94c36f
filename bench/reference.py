"""What the gradients should be: the closed form in fp64, for some tokens and vocabulary columns.

Shares no code with the library. The formulas of docs/mathematics.md, row by row:
    G = a (1[v=y] - p) + b p (log p - log q - KL),   dHidden = G W,   dW = G^T hidden
with b (p - q) for the forward KL.
A full fp64 `[N, V]` never exists: tokens are taken a block at a time, and dW only for some columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.cases import Case
from dgrpo.testing import relative_error

POLICY, KL, BOTH, CROSS_ENTROPY = "policy", "kl", "policy+kl", "cross-entropy"
FORWARD_KL = "forward-kl"
WITH_TEACHER = (KL, BOTH, FORWARD_KL)


class Reference(NamedTuple):
    """Exact results, fp64, for the tokens `rows` and the columns `columns`."""

    rows: Tensor  # (n,) int64
    columns: Tensor  # (m,) int64
    loss: Tensor | None  # scalar; None where only some tokens were computed
    d_hidden: Tensor  # (n, Hs)
    d_weight: Tensor | None  # (m, Hs); None where only some tokens were computed


class _Softmax(NamedTuple):
    """Of a block of R tokens: probabilities, log p - log q, and what follows from them; fp64."""

    rows: Tensor  # (R,)
    p: Tensor  # (R, V)
    gap: Tensor  # (R, V)
    divergence: Tensor  # (R,)
    logprobs: Tensor  # (R,)


def coefficients(case: Case, rows: Tensor, logp: Tensor, terms: str) -> tuple[Tensor, ...]:
    """Losses but for the divergence, dL/dlogp and dL/dKL of the terms asked for, each (R,) fp64."""
    share = 1.0 / case.shape.tokens
    zero = torch.zeros_like(logp)
    beta = zero + (share * case.teacher_coef if terms in WITH_TEACHER else 0.0)
    if terms == CROSS_ENTROPY:
        return -share * logp, zero - share, beta
    if terms in (KL, FORWARD_KL):
        return zero, zero, beta
    advantages = case.advantages[rows].double()
    ratio = (logp - case.old_logprobs[rows].double()).exp()
    plain, bounded = ratio * advantages, ratio.clamp(1 - case.clip, 1 + case.clip) * advantages
    slope = torch.where(plain <= bounded, plain, zero)
    return -share * torch.minimum(plain, bounded), -share * slope, beta


def _softmax(case: Case, rows: Tensor, weight: Tensor, teacher_weight: Tensor) -> _Softmax:
    log_p = (case.hidden.detach()[rows].double() @ weight.T).log_softmax(1)
    gap = (case.teacher_hidden[rows].double() @ teacher_weight.T).log_softmax(1)
    gap = log_p - gap
    logp = log_p.gather(1, case.targets[rows, None])[:, 0]
    p = log_p.exp_()
    return _Softmax(rows, p, gap, (p * gap).sum(1), logp)


def _gradient(case: Case, at: _Softmax, terms: str) -> tuple[Tensor, Tensor]:
    """The weighted loss of these tokens, and G (R, V)."""
    losses, a, b = coefficients(case, at.rows, at.logprobs, terms)
    if terms == FORWARD_KL:
        q = at.p * (-at.gap).exp()
        return (-b * (q * at.gap).sum(1)).sum(), b[:, None] * (at.p - q)
    grad = at.p * (b[:, None] * (at.gap - at.divergence[:, None]) - a[:, None])
    grad.scatter_add_(1, case.targets[at.rows, None], a[:, None])
    return (losses + b * at.divergence).sum(), grad


@torch.no_grad()
def reference(
    case: Case,
    terms: Iterable[str],
    *,
    tokens: int = 64,
    columns: int = 2048,
    whole: bool = True,
    block: int = 256,
) -> dict[str, Reference]:
    """Exact gradients for `tokens` tokens and `columns` columns, half of them targets, per terms.

    `whole=False` reads only those tokens, and leaves loss and dW out: at 131072 tokens the rest
    would take longer than everything that is measured.
    """
    draw = torch.Generator().manual_seed(1)
    n, vocab, device = case.shape.tokens, case.shape.vocab, case.targets.device
    picked = torch.randperm(n, generator=draw)[:tokens].sort().values.to(device)
    anywhere = torch.randint(vocab, (columns // 2,), generator=draw).to(device)
    frequent = case.targets[torch.randperm(n, generator=draw)[: columns // 2].to(device)]
    chosen = torch.cat([anywhere, frequent]).unique()

    heads = case.weight.detach().double(), case.teacher_weight.double()
    width = case.shape.hidden
    d_hidden: dict[str, list[Tensor]] = {name: [] for name in terms}
    for rows in picked.split(block):
        at = _softmax(case, rows, *heads)
        for name, found in d_hidden.items():
            found.append(_gradient(case, at, name)[1] @ heads[0])
    loss = dict.fromkeys(d_hidden)
    d_weight = dict.fromkeys(d_hidden)
    if whole:
        loss = {name: heads[0].new_zeros(()) for name in d_hidden}
        d_weight = {name: heads[0].new_zeros(len(chosen), width) for name in d_hidden}
        for rows in torch.arange(n, device=device).split(block):
            at = _softmax(case, rows, *heads)
            hidden = case.hidden.detach()[rows].double()
            for name in d_hidden:
                value, grad = _gradient(case, at, name)
                loss[name] += value
                d_weight[name].addmm_(grad[:, chosen].T, hidden)
    return {
        name: Reference(picked, chosen, loss[name], torch.cat(found), d_weight[name])
        for name, found in d_hidden.items()
    }


def errors(case: Case, exact: Reference, loss: Tensor) -> dict[str, float]:
    """Relative errors of the gradients that lie in `case` after a step, and of its loss."""
    found = {"error_hidden": relative_error(case.hidden.grad[exact.rows], exact.d_hidden)}
    if exact.d_weight is not None:
        found["error_weight"] = relative_error(case.weight.grad[exact.columns], exact.d_weight)
        found["error_loss"] = relative_error(loss.detach(), exact.loss)
    return found
