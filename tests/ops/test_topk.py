"""The divergence to a top-k teacher by hand: tails far apart, columns that the student forbids."""

import math

import pytest
import torch

import dgrpo
from dgrpo.testing import oracle_stats
from tests.ops.cases import assert_near, gradients

BACKENDS = ("torch", "triton")
FORWARD = {
    "forward_kl": {"divergence": "forward_kl"},
    "clipped_forward_kl": {"divergence": "clipped_forward_kl", "divergence_clip": 1e3},
}
OTHERS = {"reverse_kl": {"divergence": "reverse_kl"}, "jsd": {"divergence": "jsd", "jsd_beta": 0.3}}
EVERY = {
    **FORWARD,
    **OTHERS,
    "clipped": {"divergence": "clipped_forward_kl", "divergence_clip": 0.1},
}
INF = math.inf


def one_row(logits):
    """A hidden state and a head whose logits are these."""
    weight = torch.tensor(logits)[:, None].requires_grad_()
    return torch.ones(1, 1), weight


def top(ids, probs):
    return dgrpo.TopKTeacher(torch.tensor([ids]), torch.tensor([probs]).log())


def divergence_of(hidden, weight, teacher, op="stats", **options):
    inputs = (hidden, weight, torch.zeros(1, dtype=torch.int64))
    if op == "stats":
        return dgrpo.linear_token_stats(*inputs, teacher, **options).divergence.sum()
    if op == "plain":
        objective = lambda stats, rows: stats.divergence  # noqa: E731
        return dgrpo.linear_loss(*inputs, objective, teacher, **options).loss
    return dgrpo.linear_dgrpo_loss(
        *inputs, torch.zeros(1), teacher=teacher, teacher_coef=1.0, **options
    ).loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["fused", "plain", "stats"])
@pytest.mark.parametrize("divergence", FORWARD)
@pytest.mark.parametrize("below", [10.0, 85.0, 100.0, 800.0])
def test_a_tail_far_below_the_teachers(below, divergence, op, backend):
    # Tail of three columns, shared as the student shares it: 0.2 e^-1 / (1 + 2 e^-1) and so on.
    hidden, weight = one_row([-below, below / 4, -below - 1, -below - 1])
    loss = divergence_of(
        hidden, weight, top([1], [0.8]), op, backend=backend, **FORWARD[divergence]
    )
    loss.backward()
    share = torch.tensor([1.0, 0, math.exp(-1), math.exp(-1)])
    p = torch.softmax(weight.detach().double()[:, 0], 0)
    want = p - 0.2 * share / share.sum()
    want[1] = p[1] - 0.8
    assert_near(weight.grad[:, 0], want, 1e-5, "d_weight")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", EVERY)
def test_transforms_of_a_tail_far_below(name, backend):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, generator=generator)
    weight = (4 * torch.randn(40, 8, generator=generator)).requires_grad_()
    bias = torch.randn(40, generator=generator).requires_grad_()
    ids = (hidden @ weight.T).topk(3).indices
    teacher = dgrpo.TopKTeacher(ids, torch.tensor([0.4, 0.2, 0.1]).log().expand(6, 3).contiguous())
    targets = torch.arange(6)
    options = {"logit_scale": 1.5, "logit_softcap": 60.0, "temperature": 0.2, **EVERY[name]}
    got = dgrpo.linear_token_stats(
        hidden, weight, targets, teacher, bias=bias, backend=backend, **options
    ).divergence
    want = oracle_stats(hidden, weight, targets, teacher, bias=bias, **options).divergence
    assert_near(got, want, 1e-4, "divergence")
    grads = zip(
        gradients(got.sum(), weight, bias), gradients(want.sum(), weight, bias), strict=True
    )
    for value, goal in grads:
        assert_near(value, goal, 1e-4, "gradient")


def forbidden(ids, column):
    """p over six columns without `column`; q of the top-k teacher {3: .5, 4: .3} by bucket."""
    logits = [0.1, 0.5, -0.3, 0.7, 0.2, 0.4]
    hidden, weight = one_row(logits)
    bias = torch.zeros(6)
    bias[column] = -INF
    p = torch.softmax(torch.tensor(logits, dtype=torch.float64) + bias, 0)
    tail = [v for v in range(6) if v not in ids]
    return hidden, weight, bias, torch.stack([*(p[i] for i in ids), p[tail].sum()])


def by_hand(p, q, divergence, divergence_clip=INF, jsd_beta=0.5):
    """Over buckets, with 0 log 0 = 0."""

    def kl(x, y):
        return torch.where(x > 0, x * (x / y).log(), 0.0)

    if divergence == "reverse_kl":
        return kl(p, q).sum()
    if divergence == "jsd":
        m = (1 - jsd_beta) * p + jsd_beta * q
        return jsd_beta * kl(q, m).sum() + (1 - jsd_beta) * kl(p, m).sum()
    return kl(q, p).clamp(max=divergence_clip).sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("column", [3, 4, 0])
def test_a_column_that_the_student_forbids(column, name, backend):
    hidden, weight, bias, p = forbidden([3, 4], column)
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    teacher = top([3, 4, -1], [0.5, 0.3, 9.0])
    options = {"bias": bias, "backend": backend}
    for op in ("fused", "plain", "stats"):
        got = divergence_of(hidden, weight, teacher, op, **options, **EVERY[name])
        want = by_hand(p, q, **EVERY[name])
        assert got.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-6)
        grad = gradients(got, weight)[0]
        assert grad.isfinite().all() and grad[column] == 0
        goal = oracle_stats(
            hidden, weight, torch.tensor([0]), teacher, bias=bias, **EVERY[name]
        ).divergence.sum()
        assert goal.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-6)
        assert_near(grad, gradients(goal, weight)[0], 1e-5, "d_weight")


def test_the_reverse_kl_named_by_hand():
    # What the teacher gives to a column that the student forbids is not the tail's.
    weight = torch.zeros(6, 1)
    bias = torch.tensor([0, 0, 0, -INF, 0, 0])
    got = divergence_of(torch.ones(1, 1), weight, top([3, 4], [0.5, 0.3]), bias=bias)
    assert got.item() == pytest.approx(0.8 * math.log(0.8 / 0.2) + 0.2 * math.log(0.2 / 0.3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target, want", [(0, 0.2), (3, 0.5), (4, 0.3)])
def test_the_teachers_log_probability_beside_a_forbidden_column(target, want, backend):
    hidden, weight, bias, _ = forbidden([3, 4], 3)
    stats = dgrpo.linear_token_stats(
        hidden, weight, torch.tensor([target]), top([3, 4], [0.5, 0.3]), bias=bias, backend=backend
    )
    assert stats.teacher_logprobs.item() == pytest.approx(math.log(want), rel=1e-5)
    assert stats.logprobs.isneginf().item() == (target == 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", EVERY)
def test_a_tail_that_the_student_forbids(name, backend):
    hidden, weight = one_row([0.3, 0.1, 0.2])
    bias = torch.tensor([-INF, 0.0, 0.0])
    p = torch.tensor([0.0, *torch.softmax(torch.tensor([0.1, 0.2]), 0)], dtype=torch.float64)
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    got = divergence_of(
        hidden, weight, top([1, 2], [0.5, 0.3]), bias=bias, backend=backend, **EVERY[name]
    )
    want = by_hand(p, q, **EVERY[name])
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    grad = gradients(got, weight)[0]
    assert grad.isfinite().all() and grad[0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", EVERY)
def test_a_tail_without_columns_is_no_bucket(name, backend):
    hidden, weight = one_row([0.3, 0.1])
    teacher = top([1, 0, -1, -1], [0.6, 0.4, 1.0, 1.0])
    got = divergence_of(hidden, weight, teacher, backend=backend, **EVERY[name])
    p = torch.softmax(torch.tensor([0.1, 0.3], dtype=torch.float64), 0)
    q = torch.tensor([0.6, 0.4], dtype=torch.float64)
    assert got.item() == pytest.approx(by_hand(p, q, **EVERY[name]).item(), rel=1e-4)
    assert gradients(got, weight)[0].isfinite().all()
