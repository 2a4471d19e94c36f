"""Blocks of logits and fp64 formulas that the kernel tests share. R rows, V columns."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dgrpo_kernels import ROW_MULTIPLE, STATS, Logits, RowStats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter runs on the CPU
DIVERGENCES = {
    "reverse_kl": {},
    "forward_kl": {},
    "clipped_forward_kl": {"parameter": 0.05},
    "jsd": {"parameter": 0.3},
    "jeffreys": {"parameter": 0.3},
}
TRANSFORMS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "cap": {"softcap": 9.0},
    "temperature": {"temperature": 1.7},
    "everything": {"scale": 0.7, "softcap": 9.0, "temperature": 0.6, "bias": True},
}
SIZES = (1, 16, 33, 2048, 2049, 5003)  # around one block of columns, dividing nothing


def padded(columns: int) -> int:
    return -(-columns // ROW_MULTIPLE) * ROW_MULTIPLE


def block(rows: int, columns: int, seed: int = 0, bias: bool = False, **transform) -> Logits:
    """Peaked raw logits with NaN between V and the row stride: nothing may read it."""
    generator = torch.Generator().manual_seed(seed)
    width = padded(columns)
    raw = torch.full((rows, width), torch.nan)
    raw[:, :columns] = 3 * torch.randn(rows, columns, generator=generator)
    raw[torch.arange(rows), torch.randint(columns, (rows,), generator=generator)] += 12
    full = torch.zeros(width)
    full[:columns] = torch.randn(columns, generator=generator)
    transform.setdefault("holes", bias)
    return Logits(raw.to(DEVICE)[:, :columns], full.to(DEVICE) if bias else None, **transform)


def near(z: Logits, size: float, seed: int = 9) -> Logits:
    """A teacher that nearly equals the student."""
    noise = torch.randn(z.raw.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    wide = torch.full((len(noise), z.raw.stride(0)), torch.nan, device=DEVICE)
    wide[:, : z.raw.shape[1]] = z.raw + size * noise
    return z._replace(raw=wide[:, : z.raw.shape[1]])


def targets_of(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(columns, (rows,), generator=generator).to(DEVICE)


def new_stats(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A view of statistics of more rows, as the sweep passes it."""
    return torch.zeros(STATS, rows + 5, dtype=dtype, device=DEVICE)[:, 3 : 3 + rows]


def new_grad(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.full((rows, padded(columns)), torch.nan, dtype=dtype, device=DEVICE)[:, :columns]


def raw_of(logits: Logits, rounded: bool = False) -> Tensor:
    """Raw logits with their bias, fp64."""
    raw = logits.raw if logits.bias is None else logits.raw + logits.bias[: logits.raw.shape[1]]
    return (raw.bfloat16() if rounded else raw).double()


def transform(raw: Tensor, logits: Logits) -> Tensor:
    z = raw * logits.scale
    if logits.softcap is not None:
        z = logits.softcap * torch.tanh(z / logits.softcap)
    return z / logits.temperature


class Want(NamedTuple):
    """fp64 statistics (R,) and dL/draw (R, V)."""

    logprobs: Tensor
    teacher_logprobs: Tensor
    divergence: Tensor
    entropy: Tensor
    grad: Tensor | None


def want(
    z: Logits,
    t: Logits | None,
    targets: Tensor,
    coef: Tensor | None = None,
    *,
    divergence: str = "reverse_kl",
    parameter: float = 0.5,
    round_policy: bool = False,
) -> Want:
    """Plain formulas, differentiated by autograd. coef: (3, R) dL/dlogp, dL/dD, dL/dentropy."""
    raw = raw_of(z).requires_grad_()
    coarse = raw_of(z, rounded=True).requires_grad_() if round_policy else raw
    lp = transform(raw, z).log_softmax(-1)
    policy = transform(coarse, z).log_softmax(-1)
    p = lp.exp()
    logp = policy.gather(1, targets[:, None])[:, 0]
    entropy = -(p * lp).sum(-1)
    value = own = torch.zeros_like(logp)
    if t is not None:
        lq = transform(raw_of(t), t).log_softmax(-1)
        q = lq.exp()
        own = lq.gather(1, targets[:, None])[:, 0]
        beta = clip = parameter
        mix = torch.logaddexp(lp + math.log1p(-beta), lq + math.log(beta))
        value = {
            "reverse_kl": lambda: (p * (lp - lq)).sum(-1),
            "forward_kl": lambda: (q * (lq - lp)).sum(-1),
            "clipped_forward_kl": lambda: (q * (lq - lp)).clamp(max=clip).sum(-1),
            "jsd": lambda: (beta * q * (lq - mix) + (1 - beta) * p * (lp - mix)).sum(-1),
            "jeffreys": lambda: ((beta * q - (1 - beta) * p) * (lq - lp)).sum(-1),
        }[divergence]()
    grad = None
    if coef is not None:
        a, b, c = coef.double()
        leaves = [raw] if coarse is raw else [raw, coarse]
        loss = (a * logp + b * value + c * entropy).sum()
        grad = sum(torch.autograd.grad(loss, leaves))
    return Want(logp.detach(), own, value.detach(), entropy.detach(), grad)


def fields(stats: Tensor) -> RowStats:
    return RowStats(*stats.unbind(0))


def measured(rows_module, z, t, targets, divergence, round_policy=False, **options) -> Tensor:
    """Finished statistics by a backend, second pass included."""
    wide = z.raw.dtype
    stats = new_stats(len(targets), wide)
    second = divergence in ("clipped_forward_kl", "jsd", "jeffreys")
    first = "none" if t is None or second else divergence
    rows_module.row_stats(z, t, targets, stats, divergence=first, round_policy=round_policy)
    if t is not None and second:
        rows_module.row_divergence(z, t, stats, divergence=divergence, **options)
    return stats
