"""Group-relative advantages against loops over groups."""

import statistics

import pytest
import torch

from dgrpo.objectives import group_advantages

EPS = 1e-4


def batch(seed=0, samples=23):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(5, (samples,), generator=generator)
    rewards = torch.randn(samples, dtype=torch.float64, generator=generator)
    valid = torch.rand(samples, generator=generator) < 0.8
    return rewards, groups, valid


def by_hand(rewards, groups, valid, scale, leave_one_out):
    out = []
    for i, (reward, group) in enumerate(zip(rewards.tolist(), groups.tolist(), strict=True)):
        members = [j for j in range(len(groups)) if groups[j] == group and valid[j]]
        if i not in members or len(members) < 2:
            out.append(0.0)
            continue
        kept = [j for j in members if j != i] if leave_one_out else members
        advantage = reward - statistics.fmean(rewards[j].item() for j in kept)
        if scale == "std":
            advantage /= statistics.stdev(rewards[j].item() for j in members) + EPS
        out.append(advantage)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("failures", [False, True])
def test_equals_a_loop_over_groups(scale, leave_one_out, failures):
    rewards, groups, valid = batch()
    kept = valid if failures else torch.ones_like(valid)
    assert failures == (not kept.all())
    got = group_advantages(
        rewards, groups, scale=scale, leave_one_out=leave_one_out, valid=kept if failures else None
    )
    want = by_hand(rewards, groups, kept, scale, leave_one_out)
    torch.testing.assert_close(got, want)


def test_failed_samples_are_left_out_whatever_their_reward():
    rewards, groups, valid = batch(1)
    want = group_advantages(rewards, groups, valid=valid)
    rewards[~valid] = torch.nan
    got = group_advantages(rewards, groups, valid=valid)
    assert torch.equal(got, want) and (got[~valid] == 0).all()


def test_groups_without_a_comparison_give_zero():
    rewards = torch.tensor([3.0, 1.0, 1.0, 1.0, 5.0])
    groups = torch.tensor([0, 1, 1, 1, -1])
    for scale in ("std", "none"):
        for leave_one_out in (False, True):
            got = group_advantages(rewards, groups, scale=scale, leave_one_out=leave_one_out)
            assert (got == 0).all()


def test_equal_rewards_do_not_blow_up_their_rounding():
    """0.1 is no binary number: the mean of a group of them is off by rounding alone."""
    rewards = torch.full((7,), 0.1)
    assert group_advantages(rewards, torch.zeros(7, dtype=torch.int64)).abs().max() < 1e-3


def test_the_order_of_samples_does_not_matter():
    rewards, groups, valid = batch(2)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(3))
    want = group_advantages(rewards, groups, valid=valid)
    got = group_advantages(rewards[order], groups[order], valid=valid[order])
    torch.testing.assert_close(got, want[order])


def test_counted_rewards_give_floats():
    got = group_advantages(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1]), scale="none")
    assert got.dtype == torch.float32 and got.tolist() == [-0.5, 0.5, 0.5, -0.5]


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"scale": "max"}, ValueError, 'scale: got \'max\', expected "std" or "none"'),
        ({"groups": torch.zeros(3, dtype=torch.int64)}, ValueError, r"groups: got shape \(3,\)"),
        ({"valid": torch.ones(1, dtype=torch.bool)}, ValueError, r"valid: got shape \(1,\)"),
        ({"groups": torch.zeros(2)}, TypeError, "groups: got dtype torch.float32"),
        ({"groups": torch.tensor([0, 2])}, ValueError, "groups: got values from 0 to 2"),
    ],
)
def test_errors(kwargs, error, message):
    arguments = {"rewards": torch.zeros(2), "groups": torch.zeros(2, dtype=torch.int64)} | kwargs
    with pytest.raises(error, match=message):
        group_advantages(**arguments)
