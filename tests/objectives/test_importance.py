"""Importance weights against explicit loops, at token and at sequence level."""

import math

import pytest
import torch

from dgrpo.objectives import (
    Context,
    grpo,
    masked_importance_weights,
    truncated_importance_weights,
)

IDS = torch.tensor([1] * 5 + [0] * 4 + [-1] * 2 + [2] * 6)


def logprobs_pair(seed=0, scale=0.8):
    generator = torch.Generator().manual_seed(seed)
    new = -torch.rand(len(IDS), dtype=torch.float64, generator=generator)
    noise = torch.randn(len(IDS), dtype=torch.float64, generator=generator)
    return new, new - scale * noise


def ratios(new, old, level):
    """The ratio of each token, by hand."""
    delta = (new - old).tolist()
    if level == "token":
        return [math.exp(x) for x in delta]
    out = []
    for i in IDS.tolist():
        own = [x for x, j in zip(delta, IDS.tolist(), strict=True) if j == i and i >= 0]
        mean = sum(own) / max(len(own), 1)
        out.append(math.exp(mean if level == "mean" else sum(own)))
    return out


LEVELS = {
    "token": {},
    "sequence": {"sequence_ids": IDS},
    "mean": {"sequence_ids": IDS, "length_normalised": True},
}


@pytest.mark.parametrize("level", LEVELS)
def test_truncation(level):
    new, old = logprobs_pair()
    want = ratios(new, old, level)
    cap = sorted(want)[len(want) // 2] * 1.0001
    got = truncated_importance_weights(new, old, cap, **LEVELS[level])
    torch.testing.assert_close(got, torch.tensor([min(r, cap) for r in want]).double())
    assert (got < cap * 0.999).any() and (got > cap * 0.9999).any()


@pytest.mark.parametrize("level", LEVELS)
def test_masking(level):
    new, old = logprobs_pair(1)
    want = ratios(new, old, level)
    low, cap = min(want) * 1.0001, max(want) * 0.9999
    got = masked_importance_weights(new, old, cap, low, **LEVELS[level])
    torch.testing.assert_close(
        got, torch.tensor([r if low <= r <= cap else 0.0 for r in want]).double()
    )
    assert 2 <= (got == 0).sum() < len(IDS) - 2


def test_tokens_of_no_sequence_weigh_one_and_count_nowhere():
    new, old = logprobs_pair(2)
    want = truncated_importance_weights(new, old, sequence_ids=IDS)
    old[IDS < 0] = torch.nan
    got = truncated_importance_weights(new, old, sequence_ids=IDS)
    assert torch.equal(got, want) and (got[IDS < 0] == 1).all()


@pytest.mark.parametrize("function", [truncated_importance_weights, masked_importance_weights])
def test_long_sequences_stay_finite(function):
    """A log-ratio of 1e5 nats over the sequence overflows exp in any float."""
    new, old = torch.zeros(len(IDS)), torch.zeros(len(IDS))
    old[IDS == 0], old[IDS == 1] = -1e5, 1e5
    got = function(new, old, 2.0, sequence_ids=IDS)
    assert got.isfinite().all()
    high = 2.0 if function is truncated_importance_weights else 0.0
    torch.testing.assert_close(got[IDS == 0], torch.full((4,), high))
    torch.testing.assert_close(got[IDS == 1], torch.full((5,), math.exp(-20)), rtol=1e-5, atol=0)
    assert (got[IDS == 2] == 1).all()


def test_no_gradient_flows_into_the_weights():
    new, old = logprobs_pair(3)
    new.requires_grad_()
    for function in (truncated_importance_weights, masked_importance_weights):
        assert not function(new, old, sequence_ids=IDS).requires_grad


def test_on_one_pass_they_equal_the_weights_inside_the_loss():
    """`sampler_logprobs` and `is_cap` are token-level truncation with this pass's probabilities."""
    new, old = logprobs_pair(4)
    stats = type("Stats", (), {"logprobs": new, "entropy": None, "divergence": None})
    ones = torch.ones_like(new)
    weights = truncated_importance_weights(new, old, 1.3)
    inside, _ = grpo(stats, Context(ones, ones, sampler_logprobs=old, is_cap=1.3))
    outside, _ = grpo(stats, Context(ones, ones, policy_weights=weights))
    torch.testing.assert_close(inside, outside)
    assert (weights == 1.3).sum() == (weights > 1.2999).sum() > 2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: truncated_importance_weights(x, x, 0.0), "cap: got 0.0, expected a positive"),
        (lambda x: masked_importance_weights(x, x, 1.0, 2.0), "cap, low: got 1.0 and 2.0"),
        (
            lambda x: truncated_importance_weights(x, x[:1]),
            r"sampler_logprobs: got shape \(1,\), expected that of logprobs, \(4,\)",
        ),
        (
            lambda x: masked_importance_weights(x, x, sequence_ids=torch.arange(4)[None]),
            r"sequence_ids: got shape \(1, 4\)",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(4))
