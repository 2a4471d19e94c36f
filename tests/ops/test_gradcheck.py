"""`torch.autograd.gradcheck` in fp64: every divergence, every teacher kind, every op."""

import functools

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

import dgrpo
from dgrpo.testing import PeakedCase
from tests.ops.cases import DIVERGENCES, TEACHERS, teacher_of

TOKENS, WIDTH, VOCAB = 5, 2, 7
BUDGET = 1500  # bytes: several blocks


@functools.cache
def case() -> PeakedCase:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    targets = torch.tensor([0, 3, -100, 6, 2])
    old = draw(TOKENS) - 2
    return PeakedCase(
        draw(TOKENS, WIDTH), draw(VOCAB, WIDTH), targets, draw(TOKENS), old, old - 0.1,
        draw(TOKENS, 3), draw(VOCAB, 3),
    )  # fmt: skip


def fused(hidden, weight, bias, **options):
    given = case()
    return dgrpo.linear_dgrpo_loss(
        hidden, weight, given.targets, given.advantages, old_logprobs=given.old_logprobs,
        ref_logprobs=given.ref_logprobs, ref_coef=0.2, entropy_coef=0.1, bias=bias, **options,
    ).loss  # fmt: skip


def plain(hidden, weight, bias, **options):
    def objective(stats, rows):
        return stats.logprobs.sin() + stats.divergence**2 - stats.entropy * stats.logprobs

    return dgrpo.linear_loss(hidden, weight, case().targets, objective, bias=bias, **options).loss


def stats(hidden, weight, bias, **options):
    return dgrpo.linear_token_stats(hidden, weight, case().targets, bias=bias, **options)[:3]


def check(op, **options):
    leaves = [case().hidden, case().weight, torch.linspace(-0.3, 0.4, VOCAB).double()]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    run = functools.partial(op, memory_budget=BUDGET, **options)
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("op", [fused, plain, stats], ids=lambda op: op.__name__)
def test_every_divergence_and_teacher(op, divergence, kind):
    check(op, teacher=teacher_of(kind, case()), **DIVERGENCES[divergence])


@pytest.mark.parametrize("op", [fused, plain, stats], ids=lambda op: op.__name__)
def test_without_a_teacher(op):
    check(op)


@pytest.mark.parametrize("kind", ["full", "padded_topk"])
@pytest.mark.parametrize("op", [fused, stats], ids=lambda op: op.__name__)
def test_every_transform_of_the_logits(op, kind):
    check(
        op,
        teacher=teacher_of(kind, case()),
        temperature=0.8,
        teacher_temperature=1.4 if kind == "full" else 1.0,
        logit_scale=1.3,
        logit_softcap=2.5,
    )


def test_it_can_fail():
    hidden = case().hidden.clone().requires_grad_()

    def half(x):  # a value without its gradient's other half
        loss = fused(x, case().weight, None)
        return 0.5 * loss + 0.5 * loss.detach()

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(half, [hidden])
