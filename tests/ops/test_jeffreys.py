"""Jeffreys divergence: its share of the forward KL, as a number and per token."""

import pytest
import torch

import dgrpo
from dgrpo.testing import oracle_stats
from tests.ops.cases import TEACHERS, assert_near, case_of, check_dgrpo, fp64, gradients, teacher_of
from tests.ops.contracts import CASE, head_teacher, raises, run, topk

BACKENDS = ("torch", "triton")


def shares_of(case):
    """One share per token, both ends among them; what masked tokens hold is never read."""
    shares = torch.linspace(0, 1, len(case.targets), dtype=case.advantages.dtype)
    return shares.masked_fill(case.targets < 0, torch.nan)


@pytest.mark.parametrize("kind", TEACHERS)
def test_shares_per_token(kind):
    case = fp64(case_of())
    check_dgrpo(
        case, 1e-9, teacher=teacher_of(kind, case), divergence="jeffreys",
        jeffreys_weight=shares_of(case), entropy_coef=0.1, memory_budget=20000, check=True,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", TEACHERS)
def test_shares_per_token_in_fp32(kind, backend):
    case = case_of(11)
    check_dgrpo(
        case, 1e-4, backend, teacher=teacher_of(kind, case), divergence="jeffreys",
        jeffreys_weight=shares_of(case), old_logprobs=case.old_logprobs,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_shares_in_recompute_mode(backend):
    case = case_of(11)
    teacher = teacher_of("full", case)
    options = {"divergence": "jeffreys", "jeffreys_weight": shares_of(case)}
    inputs = (case.hidden, case.weight, case.targets, teacher)
    got = dgrpo.linear_token_stats(*inputs, backend=backend, **options).divergence
    want = oracle_stats(*inputs, **options).divergence
    assert_near(got, want, 1e-4, "divergence")
    goals = gradients(want.sum(), case.hidden, case.weight)
    for found, goal in zip(gradients(got.sum(), case.hidden, case.weight), goals, strict=True):
        assert_near(found, goal, 1e-4, "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["full", "padded_topk"])
@pytest.mark.parametrize("weight, name", [(0, "reverse_kl"), (1.0, "forward_kl")])
def test_its_ends_are_the_two_divergences(weight, name, kind, backend):
    case = case_of(11)
    options = {"teacher": teacher_of(kind, case), "backend": backend}
    inputs = (case.hidden, case.weight, case.targets)
    ours, plain = (
        dgrpo.linear_token_stats(*inputs, **options, **divergence).divergence
        for divergence in (
            {"divergence": "jeffreys", "jeffreys_weight": weight}, {"divergence": name}
        )
    )  # fmt: skip
    assert_near(ours, plain, 1e-5, "divergence")
    goals = gradients(plain.sum(), case.hidden, case.weight)
    for found, goal in zip(gradients(ours.sum(), case.hidden, case.weight), goals, strict=True):
        assert_near(found, goal, 1e-5, "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["full", "topk"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_forbidden_token_is_infinite_only_with_a_share(weight, kind, backend):
    case = case_of(6, masked=0.0)
    bias = torch.zeros(101)
    bias[case.targets.max() + 1 :] = -torch.inf
    stats = dgrpo.linear_token_stats(
        case.hidden, case.weight, case.targets, teacher_of("full", case), bias=bias,
        divergence="jeffreys", jeffreys_weight=weight, backend=backend,
    )  # fmt: skip
    assert bool(stats.divergence.isfinite().all()) == (weight == 0)
    assert all(g.isfinite().all() for g in gradients(stats.divergence.sum(), case.hidden))


@pytest.mark.parametrize(
    "weight, kind, words",
    [
        (1.5, ValueError, "1.5 0 to 1"),
        (-0.1, ValueError, "-0.1 0 to 1"),
        (float("nan"), ValueError, "nan finite"),
        ("half", TypeError, "str number"),
        (True, TypeError, "bool number"),
        (torch.ones(3), ValueError, "(3,) (6,)"),
        (torch.ones(6, dtype=torch.bool), TypeError, "bool"),
    ],
)
@pytest.mark.parametrize("op", ["dgrpo", "loss", "stats"])
def test_a_bad_share_raises(op, weight, kind, words):
    options = {"teacher": head_teacher(), "divergence": "jeffreys", "jeffreys_weight": weight}
    raises(kind, "jeffreys_weight", words, run, op, **options)


@pytest.mark.parametrize("bad", [1.5, -1.0, float("nan")])
@pytest.mark.parametrize("teacher", [head_teacher(), topk()])
def test_bad_shares_per_token_are_found(teacher, bad):
    shares = torch.full(CASE.targets.shape, 0.5)
    shares[1] = bad
    options = {"teacher": teacher, "divergence": "jeffreys", "jeffreys_weight": shares}
    coef = torch.ones(len(shares))
    coef[1] = 0  # a token that skips its divergence may hold anything
    assert run("dgrpo", teacher_coef=coef, check=True, **options).isfinite()
    raises(ValueError, "jeffreys_weight", f"{bad} 0 to 1", run, "dgrpo", check=True, **options)
