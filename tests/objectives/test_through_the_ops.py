"""Every objective through the fused ops equals autograd over materialised logits, in fp64."""

import functools

import pytest
import torch

import dgrpo
from dgrpo import objectives
from dgrpo.objectives import Context, padded_sequence_ids, token_weights
from dgrpo.testing import oracle_stats

B, T, WIDTH, TEACHER_WIDTH, V = 4, 11, 7, 5, 23
SEPARABLE = {
    "dgrpo": objectives.dgrpo,
    "grpo": objectives.grpo,
    "cispo": objectives.cispo,
    "sft": objectives.sft,
    "kd": objectives.kd,
    "kdrl": objectives.kdrl,
    "vopd": objectives.vopd,
    "k1": objectives.reverse_kl_k1,
    "k2": objectives.reverse_kl_k2,
    "k3": objectives.reverse_kl_k3,
    "weighted k3": objectives.reverse_kl_weighted_k3,
    "forward k3": objectives.forward_kl_k3,
    "k2 to the reference": functools.partial(objectives.reverse_kl_k2, against="reference"),
}


@pytest.fixture
def case():
    """hidden and weight (leaves), targets with masked tokens, a teacher and a full context."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    hidden, weight = draw(B * T, WIDTH).requires_grad_(), draw(V, WIDTH).requires_grad_()
    targets = torch.randint(V, (B * T,), generator=generator)
    mask = torch.rand(B, T, generator=generator) < 0.7
    targets[~mask.reshape(-1)] = -100
    teacher = dgrpo.TeacherHead(draw(B * T, TEACHER_WIDTH), draw(V, TEACHER_WIDTH))
    with torch.no_grad():
        logprobs = oracle_stats(hidden, weight, targets).logprobs
    gate = torch.rand(B * T, dtype=torch.float64, generator=generator) - 0.3
    context = Context(
        advantages=draw(B * T),
        token_weights=token_weights(mask, "grpo", dtype=torch.float64).reshape(-1),
        old_logprobs=logprobs + 0.3 * draw(B * T),
        ref_logprobs=logprobs + 0.3 * draw(B * T),
        sampler_logprobs=logprobs + 0.3 * draw(B * T),
        is_cap=1.3,
        clip_dual=1.5,
        teacher_coef=gate.clamp(min=0),
        ref_coef=0.1,
        entropy_coef=0.05,
    )
    return hidden, weight, targets, teacher, context, padded_sequence_ids(mask)


def materialised(case, objective, **head):
    """Loss, gradients of hidden and weight, and metrics of the unmasked tokens."""
    hidden, weight, targets, teacher, context, _ = case
    rows = (targets != -100).nonzero()[:, 0]
    stats = oracle_stats(hidden, weight, targets, teacher, **head)
    losses = objective(type(stats)(*(field[rows] for field in stats)), context.at(rows))
    losses, metrics = losses if isinstance(losses, tuple) else (losses, {})
    return losses.sum(), torch.autograd.grad(losses.sum(), (hidden, weight)), metrics, rows


def check(loss, case, want):
    torch.testing.assert_close(loss, want[0])
    for got, wanted in zip(torch.autograd.grad(loss, case[:2]), want[1], strict=True):
        assert wanted.norm() > 1e-3
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", SEPARABLE)
def test_separable_objectives(case, name):
    objective, (hidden, weight, targets, teacher, context, _) = SEPARABLE[name], case
    want = materialised(case, objective)
    out = dgrpo.linear_loss(
        hidden,
        weight,
        targets,
        lambda stats, rows: objective(stats, context.at(rows)),
        teacher=teacher,
        memory_budget=8 * V * 8 * 4,  # a few tokens a block
    )
    check(out.loss, case, want)
    assert set(out.metrics) == set(want[2])
    for metric, values in want[2].items():
        torch.testing.assert_close(out.metrics[metric][want[3]].double(), values.double())


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_distillation_with_another_divergence(case, divergence):
    hidden, weight, targets, teacher, context, _ = case
    want = materialised(case, objectives.kd, divergence=divergence)
    out = dgrpo.linear_loss(
        hidden,
        weight,
        targets,
        lambda stats, rows: objectives.kd(stats, context.at(rows)),
        teacher=teacher,
        divergence=divergence,
    )
    check(out.loss, case, want)


def test_gspo_through_token_stats(case):
    hidden, weight, targets, teacher, context, ids = case
    rows = (targets != -100).nonzero()[:, 0]
    want = materialised(case, lambda s, c: objectives.gspo(s, c, ids[rows]))
    stats = dgrpo.linear_token_stats(hidden, weight, targets, teacher=teacher)
    losses, _ = objectives.gspo(stats, context, ids)
    check(losses.sum(), case, want)


def test_the_fused_loss_is_the_plain_one(case):
    hidden, weight, targets, teacher, context, _ = case
    want = materialised(case, objectives.dgrpo)
    keywords = {name: getattr(context, name) for name in Context.__dataclass_fields__}
    out = dgrpo.linear_dgrpo_loss(
        hidden, weight, targets, keywords.pop("advantages"), teacher=teacher, **keywords
    )
    check(out.loss, case, want)


@pytest.mark.parametrize("name", ["k2", "vopd", "kd"])
def test_tokens_without_a_teacher_take_no_part(case, name):
    hidden, weight, targets, teacher, context, ids = case
    present = torch.arange(B * T)
    present[::3] = -1
    partial = dgrpo.TeacherHead(teacher.hidden, teacher.weight, rows=present)
    coef = torch.where(present < 0, 0, context.teacher_coef)
    gated = Context(context.advantages, context.token_weights, teacher_coef=coef)
    want = materialised((*case[:4], gated, ids), SEPARABLE[name])
    whole = Context(context.advantages, context.token_weights, teacher_coef=context.teacher_coef)
    out = dgrpo.linear_loss(
        hidden,
        weight,
        targets,
        lambda stats, rows: SEPARABLE[name](stats, whole.at(rows)),
        teacher=partial,
    )
    check(out.loss, case, want)


def test_an_objective_whose_coefficient_is_zero_has_no_gradient(case):
    hidden, weight, targets, teacher, context, _ = case
    off = Context(context.advantages, context.token_weights, teacher_coef=0.0)
    out = dgrpo.linear_loss(
        hidden,
        weight,
        targets,
        lambda stats, rows: objectives.reverse_kl_k2(stats, off.at(rows)),
        teacher=teacher,
    )
    assert out.loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(out.loss, (hidden, weight)))
