"""`linear_token_stats` (recompute mode) and `linear_logprobs` against the oracle."""

import pytest
import torch

import dgrpo
from dgrpo.testing import oracle_stats
from tests.ops.cases import DIVERGENCES, TEACHERS, assert_near, case_of, fp64, gradients, teacher_of

SMALL = 101 * 4 * 12


def coupled(stats):
    """A loss that couples tokens, with a gradient through every statistic."""
    return (stats.logprobs.mean().exp() * stats.divergence.sum()) + stats.entropy.square().sum()


def check(got_case, most, backend="auto", kind="full", **options):
    wide = fp64(got_case)
    got = dgrpo.linear_token_stats(
        got_case.hidden, got_case.weight, got_case.targets, teacher_of(kind, got_case),
        backend=backend, memory_budget=SMALL, **options,
    )  # fmt: skip
    want = oracle_stats(wide.hidden, wide.weight, wide.targets, teacher_of(kind, wide), **options)
    for name in want._fields:
        assert_near(getattr(got, name), getattr(want, name), most, name)
    pairs = zip(
        gradients(coupled(got), got_case.hidden, got_case.weight),
        gradients(coupled(want), wide.hidden, wide.weight),
        strict=True,
    )
    for value, wanted in pairs:
        assert wanted.norm() > 0
        assert_near(value, wanted, most, "gradient")


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences(divergence, kind):
    check(fp64(case_of()), 1e-9, kind=kind, **DIVERGENCES[divergence])


@pytest.mark.parametrize("kind", ["full", "padded_topk"])
def test_the_kernels(kind):
    check(case_of(10), 1e-4, "triton", kind, logit_softcap=20.0, policy_logits="bfloat16")


def test_head_options():
    options = {"temperature": 0.7, "logit_scale": 0.5, "logit_softcap": 12.0, "vocab_size": 90}
    case = fp64(case_of())
    case.targets[case.targets >= 90] = 0
    check(case, 1e-9, teacher_temperature=1.4, **options)


@pytest.mark.parametrize("used", ["logprobs", "divergence", "entropy"])
def test_one_statistic_alone(used):
    case = fp64(case_of())
    teacher = teacher_of("topk", case)
    got = dgrpo.linear_token_stats(case.hidden, case.weight, case.targets, teacher)
    want = oracle_stats(case.hidden, case.weight, case.targets, teacher)
    leaves = (case.hidden, case.weight)
    pairs = zip(
        gradients(getattr(got, used).square().sum(), *leaves),
        gradients(getattr(want, used).square().sum(), *leaves),
        strict=True,
    )
    for value, wanted in pairs:
        assert_near(value, wanted, 1e-9, used)


@pytest.mark.parametrize("masked", [0.0, 0.25])
def test_what_is_differentiable(masked):
    case = case_of(masked=masked)
    stats = dgrpo.linear_token_stats(
        case.hidden, case.weight, case.targets, teacher_of("full", case)
    )
    assert all(value.requires_grad for value in stats[:3])
    assert not stats.teacher_logprobs.requires_grad
    assert all(value.shape == case.targets.shape for value in stats)
    scored = dgrpo.linear_logprobs(case.hidden, case.weight, case.targets)
    assert not scored.logprobs.requires_grad and not scored.entropy.requires_grad
    assert torch.equal(scored.logprobs, stats.logprobs)
    assert torch.equal(scored.entropy, stats.entropy)


@pytest.mark.parametrize("kind", ["full", "topk"])
@pytest.mark.parametrize("masked", [0.0, 0.25])
def test_changing_an_output_changes_neither_others_nor_the_backward(kind, masked):
    case = case_of(masked=masked)
    teacher = teacher_of(kind, case)

    def run(spoil):
        stats = dgrpo.linear_token_stats(case.hidden, case.weight, case.targets, teacher)
        loss = coupled(stats)
        if spoil:
            others = [value.detach().clone() for value in stats[1:]]
            stats.logprobs.detach().fill_(7)
            assert all(map(torch.equal, others, stats[1:]))
        return gradients(loss if not spoil else stats.entropy.sum(), case.weight)[0]

    clean = dgrpo.linear_token_stats(case.hidden, case.weight, case.targets, teacher)
    assert torch.equal(run(True), gradients(clean.entropy.sum(), case.weight)[0])


def test_a_changed_input_is_noticed():
    case = case_of()
    hidden = case.hidden * 1
    stats = dgrpo.linear_token_stats(hidden, case.weight, case.targets)
    hidden.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.logprobs.sum().backward()


def test_logprobs_in_a_rounding_engine():
    case = case_of()
    got = dgrpo.linear_logprobs(
        case.hidden, case.weight, case.targets, policy_logits="bfloat16", temperature=0.9
    )
    logits = (case.hidden @ case.weight.T).bfloat16().float() / 0.9
    rows = case.targets != -100
    want = logits.log_softmax(-1).gather(1, case.targets.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(got.logprobs[rows], want[rows], rtol=1e-4, atol=1e-4)
    plain = dgrpo.linear_logprobs(case.hidden, case.weight, case.targets, temperature=0.9)
    assert (got.logprobs - plain.logprobs).abs().max() > 1e-2
    assert torch.equal(got.entropy, plain.entropy)
