"""Policy objectives against explicit loops in fp64, and their edges."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dgrpo.objectives import (
    Context,
    cispo,
    dgrpo,
    grpo,
    gspo,
    kd,
    kdrl,
    opd,
    reverse_kl_k2,
    sft,
)

N = 24


def make(seed=0, spread=0.4):
    """Differentiable statistics and a context with every field in use, fp64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale=1.0):
        return scale * torch.randn(N, dtype=torch.float64, generator=generator)

    logprobs = -draw().abs()
    stats = SimpleNamespace(
        logprobs=logprobs.clone().requires_grad_(),
        divergence=draw().abs().requires_grad_(),
        entropy=draw().abs().requires_grad_(),
        teacher_logprobs=logprobs + draw(0.5),
    )
    context = Context(
        advantages=draw(),
        token_weights=draw().abs(),
        old_logprobs=logprobs + draw(spread),
        ref_logprobs=logprobs + draw(spread),
        policy_weights=draw().abs(),
        clip_low=0.1,
        clip_high=0.3,
        teacher_coef=draw().abs(),
        ref_coef=0.2,
        entropy_coef=0.01,
    )
    return stats, context


def gradients(losses, stats):
    losses = losses[0] if isinstance(losses, tuple) else losses
    leaves = (stats.logprobs, stats.divergence, stats.entropy)
    found = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    return [torch.zeros(N, dtype=torch.float64) if g is None else g for g in found]


def surrogate(ratio, advantage, context):
    """min(rho A, clip(rho) A), by comparison of numbers, with the dual clip."""
    clipped = min(max(ratio, 1 - context.clip_low), 1 + context.clip_high)
    value = min(ratio * advantage, clipped * advantage)
    if context.clip_dual is not None and advantage < 0:
        value = max(value, context.clip_dual * advantage)
    return value


def penalties(stats, context, n, beta):
    x = context.ref_logprobs[n].item() - stats.logprobs[n].item()
    return (
        beta * stats.divergence[n].item()
        + context.ref_coef * (math.exp(x) - x - 1)
        - context.entropy_coef * stats.entropy[n].item()
    )


@pytest.mark.parametrize("dual", [None, 1.4])
@pytest.mark.parametrize("teacher", [True, False])
def test_clipped_losses_follow_their_formula(dual, teacher):
    stats, context = make()
    context = replace(context, clip_dual=dual)
    losses, metrics = (dgrpo if teacher else grpo)(stats, context)
    for n in range(N):
        ratio = math.exp(stats.logprobs[n].item() - context.old_logprobs[n].item())
        policy = -context.policy_weights[n].item() * surrogate(
            ratio, context.advantages[n].item(), context
        )
        beta = context.teacher_coef[n].item() if teacher else 0.0
        want = context.token_weights[n].item() * (policy + penalties(stats, context, n, beta))
        assert losses[n].item() == pytest.approx(want, rel=1e-12)
        assert metrics["ratio"][n].item() == pytest.approx(ratio, rel=1e-12)
    assert 2 < metrics["clipped"].sum() < N - 2


def test_dual_clip_bounds_negative_advantages_alone():
    stats, context = make(1, spread=1.5)
    context = replace(context, policy_weights=None, ref_coef=0.0, entropy_coef=0.0)
    plain, _ = grpo(stats, context)
    dual, _ = grpo(stats, replace(context, clip_dual=1.4))
    negative = context.advantages < 0
    bound = -1.4 * context.advantages * context.token_weights
    assert (plain > bound)[negative].any()
    assert (dual <= bound + 1e-12)[negative].all()
    assert torch.equal(dual[~negative], plain[~negative])


def test_dapo_clips_higher_above():
    stats, context = make(2)
    context = replace(context, old_logprobs=stats.logprobs.detach() - math.log(1.25))
    _, narrow = grpo(stats, replace(context, clip_low=0.2, clip_high=0.2))
    _, wide = grpo(stats, replace(context, clip_low=0.2, clip_high=0.28))
    assert torch.equal(narrow["clipped"], context.advantages > 0)
    assert not wide["clipped"].any()


def test_on_policy_the_gradient_is_reinforce():
    """Without old log-probabilities: ratio 1, gradient -w u A, for every ratio-based loss."""
    stats, context = make(3)
    context = replace(context, old_logprobs=None, ref_coef=0.0, entropy_coef=0.0, teacher_coef=0.0)
    want = -context.token_weights * context.policy_weights * context.advantages
    one_each = torch.arange(N)
    for objective in (grpo, cispo, lambda s, c: gspo(s, c, one_each)):
        torch.testing.assert_close(gradients(objective(stats, context), stats)[0], want)


def test_cispo_clips_the_weight_and_keeps_every_gradient():
    stats, context = make(4, spread=0.8)
    bare = replace(context, ref_coef=0.0, entropy_coef=0.0, teacher_coef=0.0)
    losses, metrics = cispo(stats, bare)
    slope = gradients(losses, stats)[0]
    for n in range(N):
        ratio = math.exp(stats.logprobs[n].item() - context.old_logprobs[n].item())
        weight = min(max(ratio, 0.9), 1.3) * context.policy_weights[n].item()
        want = -context.token_weights[n].item() * weight * context.advantages[n].item()
        assert slope[n].item() == pytest.approx(want, rel=1e-12)
        assert losses[n].item() == pytest.approx(want * stats.logprobs[n].item(), rel=1e-12)
        assert metrics["clipped"][n].item() == (not 0.9 <= ratio <= 1.3)
    assert 2 < metrics["clipped"].sum() < N - 2
    full = gradients(cispo(stats, context), stats)
    penalty = gradients(dgrpo(stats, replace(context, advantages=0 * context.advantages)), stats)
    torch.testing.assert_close(full[0], slope + penalty[0])
    torch.testing.assert_close(full[1:], penalty[1:])


def test_gspo_follows_its_formula():
    stats, context = make(5)
    ids = torch.tensor([2] * 7 + [0] * 4 + [-1] * 3 + [1] * 10)
    losses, metrics = gspo(stats, context, ids)
    logprobs = stats.logprobs.detach().clone().requires_grad_()
    want = 0.0
    for sequence in range(3):
        members = (ids == sequence).nonzero()[:, 0].tolist()
        mean = sum(logprobs[n] - context.old_logprobs[n] for n in members) / len(members)
        ratio = mean.exp()
        clipped = ratio.clamp(1 - context.clip_low, 1 + context.clip_high)
        for n in members:
            a = context.advantages[n]
            term = -context.policy_weights[n] * torch.minimum(ratio * a, clipped * a)
            x = context.ref_logprobs[n] - logprobs[n]
            term = term + 0.2 * (x.exp() - x - 1)
            want = want + context.token_weights[n] * (
                term
                + context.teacher_coef[n] * stats.divergence[n].detach()
                - 0.01 * stats.entropy[n].detach()
            )
            assert metrics["ratio"][n].item() == pytest.approx(ratio.item(), rel=1e-12)
    inside = ids >= 0
    torch.testing.assert_close(losses[inside].sum(), want.detach())
    got = torch.autograd.grad(losses[inside].sum(), stats.logprobs)[0]
    torch.testing.assert_close(got, torch.autograd.grad(want, logprobs)[0])


def test_gspo_sees_neither_order_nor_masked_tokens():
    stats, context = make(6)
    ids = torch.tensor([1] * 9 + [0] * 8 + [-1] * 7)
    context = replace(context, token_weights=torch.where(ids < 0, 0.0, context.token_weights))
    want, _ = gspo(stats, context, ids)
    broken = replace(context, old_logprobs=torch.where(ids < 0, torch.nan, context.old_logprobs))
    losses, _ = gspo(stats, broken, ids)
    assert torch.equal(losses, want)
    slope = gradients(losses, stats)[0]
    assert slope.isfinite().all() and (slope[ids < 0] == 0).all() and (slope[ids >= 0] != 0).any()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    shuffled = SimpleNamespace(**{k: v[order] for k, v in vars(stats).items()})
    torch.testing.assert_close(gspo(shuffled, context.at(order), ids[order])[0], want[order])


def test_gspo_survives_an_exploding_sequence():
    """A million nats on one token: the mean is held at 20 before exp, the clip stops the rest."""
    stats, context = make(7)
    old = context.old_logprobs.clone()
    old[0], old[12] = -1e6, 1e6
    ids = torch.arange(N) // 12
    context = replace(context, old_logprobs=old)
    losses, metrics = gspo(stats, context, ids)
    assert losses.isfinite().all() and gradients(losses, stats)[0].isfinite().all()
    torch.testing.assert_close(metrics["ratio"][:12].log(), torch.full((12,), 20.0).double())
    assert metrics["clamped"].all()


def test_gspo_takes_the_sampler_weight_of_each_token():
    stats, context = make(8)
    ids = torch.arange(N) // 6
    sampler = stats.logprobs.detach() - 0.3 * context.advantages
    inside = replace(context, policy_weights=None, sampler_logprobs=sampler, is_cap=1.2)
    weights = (stats.logprobs.detach() - sampler).exp().clamp(max=1.2)
    outside = replace(context, policy_weights=weights)
    torch.testing.assert_close(gspo(stats, inside, ids)[0], gspo(stats, outside, ids)[0])
    assert (weights == 1.2).any() and (weights < 1).any()


@pytest.mark.parametrize("objective", [grpo, dgrpo, cispo], ids=["grpo", "dgrpo", "cispo"])
def test_no_advantage_and_an_infinite_ratio_is_nothing(objective):
    stats, context = make(9)
    bare = replace(context, ref_coef=0.0, entropy_coef=0.0, teacher_coef=0.0)
    advantages, old = context.advantages.clone(), context.old_logprobs.clone()
    advantages[:3] = 0
    old[0], old[1], old[2] = -torch.inf, torch.inf, torch.nan
    losses, _ = objective(stats, replace(bare, advantages=advantages, old_logprobs=old))
    slope = gradients(losses, stats)[0]
    assert (losses[:3] == 0).all() and (slope[:3] == 0).all()
    want, _ = objective(stats, bare)
    assert torch.equal(losses[3:], want[3:])


@pytest.mark.parametrize("objective", [grpo, dgrpo, cispo, sft, kd, kdrl])
def test_a_token_without_weight_is_nothing(objective):
    stats, context = make(10)
    weights = context.token_weights.clone()
    weights[0] = 0
    stats.divergence.data[0] = stats.entropy.data[0] = torch.nan
    stats.teacher_logprobs[0] = torch.nan
    losses = objective(stats, replace(context, token_weights=weights))
    values = losses[0] if isinstance(losses, tuple) else losses
    assert values[0] == 0 and (values[1:] != 0).all() and values.isfinite().all()
    for slope in gradients(losses, stats):
        assert slope[0] == 0 and slope.isfinite().all()


def test_zero_coefficients_skip_their_terms():
    stats, context = make(11)
    bare = replace(context, teacher_coef=0.0, ref_coef=0.0, entropy_coef=0.0)
    want, _ = dgrpo(stats, bare)
    stats.divergence = stats.entropy = torch.full((N,), torch.nan)
    bare = replace(bare, ref_logprobs=torch.full((N,), torch.nan))
    for objective in (dgrpo, grpo):
        assert torch.equal(objective(stats, bare)[0], want)


def test_sft_and_kd_and_their_sum():
    stats, context = make(12)
    w, beta = context.token_weights, context.teacher_coef
    torch.testing.assert_close(sft(stats, context), -w * stats.logprobs)
    torch.testing.assert_close(kd(stats, context), w * beta * stats.divergence)
    assert opd is kd
    torch.testing.assert_close(
        grpo(stats, context)[0] + kd(stats, context), dgrpo(stats, context)[0]
    )
    torch.testing.assert_close(
        kdrl(stats, context)[0], grpo(stats, context)[0] + reverse_kl_k2(stats, context)
    )


def test_a_context_at_some_rows_gives_the_losses_of_those_rows():
    """What `linear_loss` relies on: an objective that does not couple tokens."""
    stats, context = make(13)
    rows = torch.tensor([17, 3, 4])
    some = SimpleNamespace(**{k: v[rows] for k, v in vars(stats).items()})
    for objective in (grpo, dgrpo, cispo, sft, kd, kdrl, reverse_kl_k2):
        whole, part = objective(stats, context), objective(some, context.at(rows))
        whole, part = (x[0] if isinstance(x, tuple) else x for x in (whole, part))
        assert torch.equal(part, whole[rows])
