"""`linear_loss`: any token-separable objective in PyTorch, at the cost of four products."""

import pytest
import torch

import dgrpo
from dgrpo.objectives import Context
from dgrpo.objectives import dgrpo as plain_dgrpo
from dgrpo.testing import oracle, oracle_stats
from tests.ops.cases import (
    DIVERGENCES,
    TEACHERS,
    assert_near,
    case_of,
    fp64,
    gradients,
    teacher_of,
)

SMALL = 101 * 4 * 12


def context_of(case):
    unmasked = int((case.targets != -100).sum())
    weights = torch.full_like(case.advantages, 1 / max(unmasked, 1))
    return Context(case.advantages, weights, old_logprobs=case.old_logprobs, entropy_coef=0.1)


def run(case, objective, **options):
    return dgrpo.linear_loss(case.hidden, case.weight, case.targets, objective, **options)


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_plain_dgrpo_equals_the_oracle(divergence, kind):
    case = fp64(case_of())
    teacher, context = teacher_of(kind, case), context_of(case)
    out = run(
        case,
        lambda stats, rows: plain_dgrpo(stats, context.at(rows)),
        teacher=teacher,
        memory_budget=SMALL,
        **DIVERGENCES[divergence],
    )
    want = oracle(
        case.hidden, case.weight, case.targets, case.advantages, old_logprobs=case.old_logprobs,
        teacher=teacher, entropy_coef=0.1, **DIVERGENCES[divergence],
    )  # fmt: skip
    assert_near(out.loss.reshape(1), want.loss.reshape(1), 1e-9, "loss")
    for got, name in zip(
        gradients(out.loss, case.hidden, case.weight), ("hidden", "weight"), strict=True
    ):
        assert_near(got, getattr(want, f"d_{name}"), 1e-9, name)
    assert torch.equal(out.metrics["clipped"], want.clipped.bool())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_objective_of_ones_own(backend):
    case = case_of(10)
    teacher = teacher_of("full", case)

    def objective(stats, rows):
        gap = stats.logprobs - stats.teacher_logprobs
        losses = 0.1 * stats.divergence**2 - stats.entropy + gap * case.advantages[rows]
        return losses, {"gap": gap, "row": rows.float()}

    out = run(case, objective, teacher=teacher, backend=backend)
    wide = fp64(case)
    stats = oracle_stats(wide.hidden, wide.weight, case.targets, teacher_of("full", wide))
    rows = (case.targets != -100).nonzero()[:, 0]
    gap = stats.logprobs - stats.teacher_logprobs
    loss = (0.1 * stats.divergence**2 - stats.entropy + gap * case.advantages)[rows].sum()
    assert_near(out.loss.reshape(1), loss.reshape(1), 1e-5, "loss")
    got = gradients(out.loss, case.hidden, case.weight)
    for value, want in zip(got, gradients(loss, wide.hidden, wide.weight), strict=True):
        assert_near(value, want, 1e-4, "gradient")
    assert torch.equal(out.metrics["row"][rows], rows.float())
    assert not out.metrics["gap"].requires_grad
    assert out.metrics["gap"][case.targets == -100].eq(0).all()


def test_it_is_called_on_some_tokens_at_a_time():
    case, seen = case_of(), []

    def objective(stats, rows):
        assert stats.logprobs.shape == rows.shape
        seen.append(rows)
        return -stats.logprobs

    run(case, objective, memory_budget=SMALL)
    assert len(seen) > 2
    assert torch.equal(torch.cat(seen), (case.targets != -100).nonzero()[:, 0])


def test_no_gradient_reaches_what_the_objective_closes_over():
    case, scale = case_of(), torch.tensor(2.0, requires_grad=True)
    out = run(case, lambda stats, rows: -scale * stats.logprobs)
    out.loss.backward()
    assert scale.grad is None and case.hidden.grad.norm() > 0


def test_a_constant_objective_has_zero_gradient():
    case = case_of()
    out = run(case, lambda stats, rows: torch.ones_like(rows, dtype=torch.float32))
    out.loss.backward()
    assert out.loss == (case.targets != -100).sum()
    assert not case.hidden.grad.any() and not case.weight.grad.any()


def test_an_empty_batch_has_the_same_metrics():
    case = case_of()
    case.targets.fill_(-100)
    out = run(case, lambda stats, rows: (-stats.logprobs, {"mine": stats.entropy}))
    out.loss.backward()
    assert out.loss == 0 and not case.weight.grad.any()
    assert set(out.metrics) == {"mine"} and not out.metrics["mine"].any()


def test_late_large_tokens_do_not_overflow_in_fp16():
    # The scale that keeps fp16 from underflow must not follow from first tokens without a loss.
    case = case_of(4096, 23, masked=0.0, dtype=torch.float16)
    weights = torch.zeros(4096)
    weights[2000:2050] = 1.0
    weights[-3:] = 30.0
    out = run(case, lambda stats, rows: -weights[rows] * stats.logprobs, memory_budget=2**17)
    wide = fp64(case)
    loss = -(weights * oracle_stats(wide.hidden, wide.weight, case.targets).logprobs).sum()
    want = gradients(loss, wide.hidden, wide.weight)
    for got, value in zip(gradients(out.loss, case.hidden, case.weight), want, strict=True):
        assert got.isfinite().all()
        assert_near(got, value, 5e-3, "gradient")


@pytest.mark.parametrize(
    "result, words",
    [
        (lambda stats: stats.logprobs.sum(), "got losses ()"),
        (lambda stats: None, "got losses NoneType"),
        (lambda stats: (stats.logprobs, {"x": 1.0}), "got x float"),
    ],
    ids=["scalar", "nothing", "metric"],
)
def test_a_wrong_result_is_refused(result, words):
    case = case_of()
    with pytest.raises(ValueError, match="objective") as error:
        run(case, lambda stats, rows: result(stats))
    assert words in str(error.value) and "expected" in str(error.value)
    with torch.no_grad(), pytest.raises(ValueError, match="objective"):
        run(case, lambda stats, rows: result(stats))
