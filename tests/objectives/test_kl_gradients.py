"""Which gradient each sampled KL has: expectations by enumeration of a small vocabulary, in fp64.

A batch holds every token y once, at the same logits, weighted by its probability: the sum of its
losses is the exact expectation over y.
"""

from types import SimpleNamespace

import pytest
import torch

from dgrpo.objectives import (
    Context,
    forward_kl_k3,
    grpo,
    k1_loss,
    kd,
    kl_advantages,
    reverse_kl_k1,
    reverse_kl_k2,
    reverse_kl_k3,
    reverse_kl_weighted_k3,
    vopd,
)

VOCABULARY = 11
SEEDS = (0, 1, 2)
WIDE = {"clip_low": 1.0, "clip_high": 1e9}  # the clip never acts
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def draw(seed):
    """Student logits z (a leaf) and log-probabilities of the teacher and of an older policy."""
    generator = torch.Generator().manual_seed(seed)
    z, t, o = 1.5 * torch.randn(3, VOCABULARY, dtype=torch.float64, generator=generator)
    return z.requires_grad_(), t.log_softmax(0), o.log_softmax(0)


def stats_of(z, log_q):
    """The statistics of every token at once: (V,) each."""
    log_p = z.log_softmax(0)
    divergence = (log_p.exp() * (log_p - log_q)).sum().expand(VOCABULARY)
    return SimpleNamespace(
        logprobs=log_p, teacher_logprobs=log_q, divergence=divergence, entropy=None
    )


def context_of(sampling, **kwargs):
    return Context(
        advantages=torch.zeros_like(sampling),
        token_weights=sampling.detach().exp(),
        teacher_coef=1.0,
        **kwargs,
    )


def gradient(losses, z):
    losses = losses[0] if isinstance(losses, tuple) else losses
    return torch.autograd.grad(losses.sum(), z)[0]


def reverse_kl_gradient(z, log_q):
    """The exact one: p (log p - log q - KL)."""
    log_p = z.detach().log_softmax(0)
    gap = log_p - log_q
    return log_p.exp() * (gap - (log_p.exp() * gap).sum())


def topk_kl(z, log_q, k=3):
    """KL over the teacher's top k and one tail bucket."""
    log_p = z.detach().log_softmax(0)
    top = log_q.topk(k).indices
    p, q = log_p.exp()[top], log_q.exp()[top]
    p, q = torch.cat([p, 1 - p.sum()[None]]), torch.cat([q, 1 - q.sum()[None]])
    return (p * (p / q).log()).sum().expand(VOCABULARY)


REVERSE = {
    "k1": reverse_kl_k1,
    "k2": reverse_kl_k2,
    "k3 with the gradient of k2": reverse_kl_k3,
    "weighted k3": reverse_kl_weighted_k3,
    "vopd": vopd,
    "exact": kd,
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", REVERSE)
def test_on_policy_the_gradient_is_that_of_the_reverse_kl(name, seed):
    z, log_q, _ = draw(seed)
    got = gradient(REVERSE[name](stats_of(z, log_q), context_of(z.log_softmax(0))), z)
    torch.testing.assert_close(got, reverse_kl_gradient(z, log_q), **CLOSE)


@pytest.mark.parametrize("seed", SEEDS)
def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl(seed):
    z, log_q, _ = draw(seed)
    got = gradient(forward_kl_k3(stats_of(z, log_q), context_of(z.log_softmax(0))), z)
    p_minus_q = z.detach().softmax(0) - log_q.exp()
    torch.testing.assert_close(got, p_minus_q, **CLOSE)
    forward_kl = (log_q.exp() * (log_q - z.log_softmax(0))).sum()
    torch.testing.assert_close(got, torch.autograd.grad(forward_kl, z)[0], **CLOSE)
    assert (got - reverse_kl_gradient(z, log_q)).norm() > 0.1 * got.norm()


def test_k1_as_a_loss_teaches_nothing_and_is_refused():
    z, log_q, _ = draw(0)
    stats, context = stats_of(z, log_q), context_of(z.log_softmax(0))
    losses = context.token_weights * (stats.logprobs - stats.teacher_logprobs)
    torch.testing.assert_close(gradient(losses, z), torch.zeros_like(z), **CLOSE)
    assert losses.sum() > 0.1  # although its value is the KL
    with pytest.raises(ValueError, match="expected gradient is 0.*use reverse_kl_k1"):
        k1_loss(stats, context)


@pytest.mark.parametrize("estimate", [reverse_kl_k3, forward_kl_k3, reverse_kl_weighted_k3])
def test_the_value_of_k3_is_the_reverse_kl(estimate):
    z, log_q, _ = draw(1)
    stats = stats_of(z, log_q)
    losses = estimate(stats, context_of(z.log_softmax(0)))
    torch.testing.assert_close(losses.sum(), stats.divergence[0], **CLOSE)
    assert (losses >= 0).all()


def test_token_by_token_the_reverse_kl_estimates_have_one_gradient():
    z, log_q, _ = draw(2)
    estimates = [reverse_kl_k1, reverse_kl_k2, reverse_kl_k3, reverse_kl_weighted_k3]
    gradients = []
    for estimate in estimates:
        losses = estimate(stats_of(z, log_q), context_of(torch.zeros(VOCABULARY)))
        rows = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses]
        gradients.append(torch.stack(rows))
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other, **CLOSE)
    assert gradients[0].abs().max() > 0.1


@pytest.mark.parametrize("estimate", [reverse_kl_k1, reverse_kl_weighted_k3, vopd])
def test_off_policy_the_ratio_keeps_the_gradient_exact(estimate):
    z, log_q, log_o = draw(3)
    context = context_of(log_o, old_logprobs=log_o, **WIDE)
    got = gradient(estimate(stats_of(z, log_q), context), z)
    torch.testing.assert_close(got, reverse_kl_gradient(z, log_q), **CLOSE)


@pytest.mark.parametrize("estimate", [reverse_kl_k2, reverse_kl_k3])
def test_off_policy_the_gradient_of_k2_is_biased(estimate):
    z, log_q, log_o = draw(3)
    got = gradient(estimate(stats_of(z, log_q), context_of(log_o, old_logprobs=log_o)), z)
    want = reverse_kl_gradient(z, log_q)
    assert (got - want).norm() > 0.1 * want.norm()


@pytest.mark.parametrize("baseline", ["full", "top-k"])
@pytest.mark.parametrize("seed", SEEDS)
def test_vopd_is_unbiased_and_varies_less(seed, baseline):
    z, log_q, _ = draw(seed)
    stats, p = stats_of(z, log_q), z.detach().softmax(0)
    if baseline == "top-k":
        stats.divergence = topk_kl(z, log_q)
        assert stats.divergence[0] < 0.95 * stats_of(z, log_q).divergence[0]

    def moments(objective):
        losses = objective(stats, context_of(torch.zeros(VOCABULARY)))
        losses = losses[0] if isinstance(losses, tuple) else losses
        rows = torch.stack([torch.autograd.grad(x, z, retain_graph=True)[0] for x in losses])
        mean = p @ rows
        return mean, (p @ (rows - mean).square()).sum()

    mean, variance = moments(vopd)
    plain_mean, plain_variance = moments(reverse_kl_k1)
    torch.testing.assert_close(mean, reverse_kl_gradient(z, log_q), **CLOSE)
    torch.testing.assert_close(plain_mean, mean, **CLOSE)
    assert variance < 0.95 * plain_variance


def test_a_topk_kl_as_advantage_teaches_nothing():
    """It does not depend on the sampled token, so its policy gradient is E[grad log p] = 0."""
    z, log_q, _ = draw(4)
    stats, context = stats_of(z, log_q), context_of(z.log_softmax(0))
    advantages = -topk_kl(z, log_q)
    assert advantages.abs().min() > 0.1
    losses, _ = grpo(stats, Context(advantages, context.token_weights))
    torch.testing.assert_close(gradient(losses, z), torch.zeros_like(z), **CLOSE)


def test_kl_and_reward_under_one_clip():
    """`kl_advantages` added to the reward's gives the gradient of both."""
    z, log_q, _ = draw(5)
    reward = torch.randn(
        VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(6)
    )
    stats, context = stats_of(z, log_q), context_of(z.log_softmax(0))
    advantages = reward + kl_advantages(stats, context)
    got = gradient(grpo(stats, Context(advantages, context.token_weights))[0], z)
    objective = (z.softmax(0) * -reward).sum()
    want = torch.autograd.grad(objective, z)[0] + reverse_kl_gradient(z, log_q)
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize(
    "estimate",
    [reverse_kl_k1, reverse_kl_k2, reverse_kl_k3, reverse_kl_weighted_k3, forward_kl_k3],
)
def test_the_reference_takes_the_place_of_the_teacher(estimate):
    z, log_q, _ = draw(6)
    context = context_of(z.log_softmax(0), ref_logprobs=log_q, ref_coef=0.3)
    got = gradient(estimate(stats_of(z, torch.zeros_like(log_q)), context, "reference"), z)
    want = gradient(estimate(stats_of(z, log_q), context), z)
    torch.testing.assert_close(got, 0.3 * want, **CLOSE)


@pytest.mark.parametrize("estimate", [*REVERSE.values(), forward_kl_k3])
def test_a_zero_coefficient_skips_its_term(estimate):
    """Per token, also where the teacher's values are infinite or NaN; the others are untouched."""
    z, log_q, _ = draw(7)
    coef = torch.ones(VOCABULARY, dtype=torch.float64)
    coef[:2] = 0
    broken = log_q.clone()
    broken[0], broken[1] = -torch.inf, torch.nan
    stats = stats_of(z, log_q)
    stats.teacher_logprobs = broken
    stats.divergence = stats.divergence + torch.where(coef == 0, torch.nan, 0.0)
    weights = z.detach().softmax(0)
    losses = estimate(stats, Context(torch.zeros(VOCABULARY), weights, teacher_coef=coef))
    losses = losses[0] if isinstance(losses, tuple) else losses
    assert (losses[:2] == 0).all() and (losses[2:] != 0).all()
    masked = Context(torch.zeros(VOCABULARY), weights * coef, teacher_coef=1.0)
    want = gradient(estimate(stats_of(z, log_q), masked), z)
    torch.testing.assert_close(gradient(losses, z), want, **CLOSE)


@pytest.mark.parametrize("estimate", [*REVERSE.values(), forward_kl_k3])
def test_a_coefficient_of_the_number_zero_gives_zeros(estimate):
    z, log_q, _ = draw(8)
    stats = stats_of(z, torch.full_like(log_q, torch.nan))
    losses = estimate(
        stats, Context(torch.zeros(VOCABULARY), torch.ones(VOCABULARY), teacher_coef=0.0)
    )
    losses = losses[0] if isinstance(losses, tuple) else losses
    assert losses.shape == (VOCABULARY,) and (losses == 0).all()


@pytest.mark.parametrize("estimate", [reverse_kl_k1, reverse_kl_k2, reverse_kl_k3, vopd])
def test_a_teacher_without_mass_on_the_token_still_teaches(estimate):
    """The gap is held at 20 nats: a finite loss, and a gradient of that size."""
    z, log_q, _ = draw(9)
    log_q = log_q.clone()
    log_q[0] = -torch.inf
    stats = stats_of(z, log_q)
    stats.divergence = torch.zeros_like(log_q)
    losses = estimate(stats, context_of(torch.zeros(VOCABULARY)))
    losses = losses[0] if isinstance(losses, tuple) else losses
    slope = torch.autograd.grad(losses[0], z)[0]
    score = torch.nn.functional.one_hot(torch.tensor(0), VOCABULARY) - z.detach().softmax(0)
    assert losses.isfinite().all()
    torch.testing.assert_close(slope, 20 * score, **CLOSE)


@pytest.mark.parametrize(
    "against, message",
    [
        ("teacher", "teacher_logprobs: got None.*give the op a teacher"),
        ("reference", "ref_logprobs: got None.*put them into the Context"),
        ("student", 'against: got \'student\', expected "teacher" or "reference"'),
    ],
)
def test_errors_name_what_is_missing(against, message):
    z, _, _ = draw(0)
    stats = SimpleNamespace(logprobs=z.log_softmax(0), teacher_logprobs=None)
    with pytest.raises(ValueError, match=message):
        reverse_kl_k2(stats, context_of(z.log_softmax(0)), against)
