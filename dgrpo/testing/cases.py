"""Inputs as trained models make them, and the measure of an error.

N tokens, V vocabulary, H student width, Ht teacher width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgrpo.testing.oracle import IGNORED


class PeakedCase(NamedTuple):
    """Inputs of the op whose softmax is as peaked as a trained model's; from `peaked_case`."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,) int64, sampled from the student
    advantages: Tensor  # (N,) fp32
    old_logprobs: Tensor  # (N,) fp32, 0.2 nats around the student's
    ref_logprobs: Tensor  # (N,) fp32, likewise
    teacher_hidden: Tensor  # (N, Ht)
    teacher_weight: Tensor  # (V, Ht)


def peaked_case(
    tokens: int,
    width: int,
    vocab: int,
    *,
    teacher_width: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    masked: float = 0.0,
    peak: float = 32.0,
    seed: int = 0,
) -> PeakedCase:
    """Student and teacher with top probabilities of 0.5 to 0.99, as trained models have them.

    Near-uniform logits hide rounding (a bf16 logit near 32 is up to 0.125 off). A row's largest
    logit is 0.8 to 1.1 times `peak`; the teacher's logits differ by one or two nats. `masked` is
    the share of tokens whose target is -100.
    """
    generator = torch.Generator(device).manual_seed(seed)
    draw = {"generator": generator, "device": device}
    shared = min(width, teacher_width or width)
    hidden, weight = _peaked_head(tokens, shared, vocab, peak, draw)
    # About 1.5 nats of disagreement on every logit.
    teacher_hidden = hidden + 1.5 * torch.randn(hidden.shape, **draw)
    teacher = _widen(teacher_hidden, weight, teacher_width or width, draw)
    heads = (*_widen(hidden, weight, width, draw), *teacher)
    hidden, weight, *teacher = (x.to(dtype) for x in heads)
    targets, logprobs = [], []
    for block in hidden.split(1024):
        log_p = (block.float() @ weight.float().T).log_softmax(-1)
        targets.append(torch.multinomial(log_p.exp(), 1, generator=generator))
        logprobs.append(log_p.gather(1, targets[-1]))
    logp = torch.cat(logprobs)[:, 0]
    old, ref = (logp + 0.2 * torch.randn(tokens, **draw) for _ in range(2))
    labels = torch.cat(targets)[:, 0]
    labels[torch.rand(tokens, **draw) < masked] = IGNORED
    return PeakedCase(hidden, weight, labels, torch.randn(tokens, **draw), old, ref, *teacher)


def _peaked_head(
    tokens: int, width: int, vocab: int, peak: float, draw: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """hidden (N, width), weight (vocab, width) in fp32 with a top probability of 0.5 to 0.99."""
    weight = torch.randn(vocab, width, **draw)
    weight /= weight.norm(dim=1, keepdim=True)
    blocks = []
    for column in torch.randint(vocab, (tokens,), **draw).split(1024):
        hidden = torch.randn(len(column), width, **draw) * peak / math.sqrt(2 * math.log(vocab))
        odds = (0.5 + 0.49 * torch.rand(len(column), **draw)).logit()
        goal = peak * (0.8 + 0.3 * torch.rand(len(column), **draw))
        for _ in range(20):  # a fixed point: moving one column moves the others a little
            logits = hidden @ weight.T
            rest = logits.scatter(1, column[:, None], -math.inf).logsumexp(-1)
            own = logits.gather(1, column[:, None])[:, 0]
            shrink = ((goal - odds) / rest.clamp(min=1)).clamp(0.7, 1.4)
            step = 0.7 * (rest + odds - own)
            hidden = shrink[:, None] * (hidden + step[:, None] * weight[column])
        blocks.append(hidden)
    return torch.cat(blocks), weight


def _widen(
    hidden: Tensor, weight: Tensor, width: int, draw: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The same logits to about half a nat, from heads of `width`."""
    extra = width - hidden.shape[1]
    if not extra:
        return hidden, weight
    more_hidden = torch.randn(len(hidden), extra, **draw) * hidden.std()
    more_weight = torch.randn(len(weight), extra, **draw) * (0.5 / hidden.std() / math.sqrt(extra))
    return torch.cat([hidden, more_hidden], 1), torch.cat([weight, more_weight], 1)


def near_equal_teacher(
    hidden: Tensor, weight: Tensor, *, kl: float = 0.01, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(hidden, weight) of a teacher whose every row has KL(student‖teacher) of about `kl` nats.

    The student's hidden states (N, H) plus noise, and its own weight (V, H). Here the gradient
    p (log p - log q - KL) is small against the rounding error of bf16 logits.
    """
    generator = torch.Generator(hidden.device).manual_seed(seed)
    head = weight.detach().float().T
    blocks = []
    for block in hidden.detach().split(1024):
        noise = torch.randn(block.shape, generator=generator, device=block.device)
        log_p = (block.float() @ head).log_softmax(-1)
        low = torch.full_like(noise[:, :1], -12.0)  # log of the noise's size
        high = -low / 2
        for _ in range(24):  # the KL grows with the size: bisect
            size = (low + high) / 2
            teacher = (block + size.exp() * noise).to(hidden.dtype)
            log_q = (teacher.float() @ head).log_softmax(-1)
            small = (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True) < kl
            low, high = torch.where(small, size, low), torch.where(small, high, size)
        blocks.append(teacher)
    return torch.cat(blocks), weight


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in fp64; ‖got‖ where want is 0. Raises ValueError on other shapes."""
    if got.shape != want.shape:
        raise ValueError(f"got: got shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    norm = want.norm().item()
    return (got - want).norm().item() / (norm or 1.0)
