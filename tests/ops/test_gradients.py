"""fp16 gradients: in range for any number of tokens, any coefficients and any upstream gradient."""

import math

import pytest
import torch

import dgrpo
from dgrpo.testing import oracle, oracle_stats, relative_error
from tests.ops.cases import DIVERGENCES, case_of, fp64, gradients, teacher_of

BACKENDS = ("torch", "triton")
OPS = ("fused", "plain", "stats")
BUDGETS = (30000, 2**30)  # parts of a few rows, and all rows at once


def half_case(tokens=64, vocab=101, **options):
    return case_of(tokens, vocab, dtype=torch.float16, masked=0.0, **options)


def loss_of(op, case, coef, backend="auto", budget=2**30, bias=None, **options):
    """`sum coef (0.5 D - logp - 0.1 entropy)` by one of the three differentiable ops."""
    options |= {"backend": backend, "memory_budget": budget, "bias": bias}
    inputs = (case.hidden, case.weight, case.targets)
    if op == "fused":
        return dgrpo.linear_dgrpo_loss(
            *inputs, torch.ones(len(coef)), token_weights=coef, entropy_coef=0.1, **options
        ).loss
    if op == "plain":
        return dgrpo.linear_loss(
            *inputs, lambda stats, rows: coef[rows] * weighed(stats), **options
        ).loss
    return (coef * weighed(dgrpo.linear_token_stats(*inputs, **options))).sum()


def weighed(stats):
    return 0.5 * stats.divergence - stats.logprobs - 0.1 * stats.entropy


def wanted(case, coef, bias=None, **options):
    """fp64 gradients of the same loss. On-policy, the policy term's are those of -logp."""
    wide = fp64(case)
    if bias is not None:
        bias = bias.detach().double().requires_grad_()
    stats = oracle_stats(wide.hidden, wide.weight, case.targets, bias=bias, **options)
    leaves = [x for x in (wide.hidden, wide.weight, bias) if x is not None]
    return gradients((coef.double() * weighed(stats)).sum(), *leaves)


def check(got, want, most=5e-3, upstream=1.0):
    for value, goal in zip(got, want, strict=True):
        assert value.isfinite().all()
        error = relative_error(value.double() / upstream, goal)
        assert error <= most, f"{error:.2e}"


@pytest.mark.parametrize("op", OPS)
def test_many_tokens_that_pull_in_one_direction(op):
    # dW times the tokens' common scale, about N, is 97,000: beyond fp16.
    tokens = 32768
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(tokens, 16, generator=generator) + 3).half().requires_grad_()
    weight = (torch.randn(50, 16, generator=generator) * 0.02).half().requires_grad_()
    case = half_case(8)._replace(
        hidden=hidden, weight=weight, targets=torch.full((tokens,), 7), teacher_hidden=None
    )
    coef = torch.full((tokens,), 1 / tokens)
    bias = torch.zeros(50, dtype=torch.float16, requires_grad=True)
    loss = loss_of(op, case, coef, bias=bias)
    wide = case._replace(hidden=hidden.double(), weight=weight.double())
    wide = wide._replace(
        hidden=wide.hidden.detach().requires_grad_(), weight=wide.weight.detach().requires_grad_()
    )
    goal_bias = torch.zeros(50, dtype=torch.float64, requires_grad=True)
    stats = oracle_stats(wide.hidden, wide.weight, case.targets, bias=goal_bias)
    want = gradients((coef * weighed(stats)).sum(), wide.hidden, wide.weight, goal_bias)
    assert 2 < want[1].abs().max() < 4
    for upstream in (1.0, 64.0):
        got = gradients(loss * upstream, hidden, weight, bias)
        check(got[1:], want[1:], upstream=upstream)
    check(gradients(loss * 2**16, hidden), want[:1], upstream=2**16)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("order", ["small first", "large first", "mixed"])
def test_coefficients_of_different_sizes(order, op, backend, budget):
    tokens = 64 if backend == "torch" else 12
    case = half_case(tokens)
    coef = torch.full((tokens,), 1e-6)
    large = {"small first": slice(tokens // 2, None), "large first": slice(tokens // 2)}
    coef[large.get(order, slice(None, None, 3))] = 1.0
    options = {"teacher": teacher_of("full", case)}
    loss = loss_of(op, case, coef, backend, budget, **options)
    got, want = gradients(loss, case.hidden, case.weight), wanted(case, coef, **options)
    check(got, want)
    small = coef < 1  # and those tokens' own gradients are as good
    got = gradients(loss * 2.0**20, case.hidden)[0] if order != "mixed" else None
    if got is not None:
        check([got[small]], [want[0][small]], upstream=2.0**20)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-7, 30.0, 3000.0])
def test_any_size_of_coefficients(size, op, budget):
    case = half_case()
    coef = torch.full((64,), size)
    bias = torch.zeros(101, dtype=torch.float16, requires_grad=True)
    options = {"teacher": teacher_of("full", case)}
    upstream = 1.0 if size == 0 else 1 / size  # as GradScaler would find it
    loss = loss_of(op, case, coef, budget=budget, bias=bias, **options) * upstream
    got = gradients(loss, case.hidden, case.weight, bias)
    check(got, wanted(case, coef * upstream, bias, **options))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["ratio", "advantages", "policy weights", "teacher", "reference"])
def test_dgrpo_coefficients_beside_the_token_weights(what, backend, budget):
    case = half_case(24)
    tokens = torch.arange(24)
    late = tokens >= 17
    given = {"teacher": teacher_of("full", case), "token_weights": torch.full((24,), 1e-3)}
    advantages = -torch.ones(24)
    if what == "ratio":
        given["old_logprobs"] = case.old_logprobs - 11.0 * late
    elif what == "advantages":
        advantages = torch.where(late, 1e6, -1.0)
    elif what == "policy weights":
        given["policy_weights"] = torch.where(late, 1e6, 1.0)
    elif what == "teacher":
        given["teacher_coef"] = torch.where(late, 1e6, 0.5)
    else:
        given |= {"ref_logprobs": case.ref_logprobs + 11.0 * late, "ref_coef": 5.0}
    inputs = (case.hidden, case.weight, case.targets, advantages)
    want = oracle(*inputs, **given)
    out = dgrpo.linear_dgrpo_loss(*inputs, backend=backend, memory_budget=budget, **given)
    upstream = 2.0 ** -math.ceil(math.log2(want.d_hidden.abs().max()))  # as GradScaler finds it
    got = gradients(out.loss * upstream, case.hidden, case.weight)
    check(got, (want.d_hidden, want.d_weight), upstream=upstream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["full", "topk"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_that_forbids_likely_tokens(divergence, kind, backend):
    # The reverse KL is near 1e6 nats there, and so is its gradient.
    case = half_case(12)
    bias = torch.zeros(101)
    best = (case.hidden @ case.weight.T).argmax(-1)
    bias[best[:4]] = -torch.inf
    teacher = dgrpo.TeacherHead(case.teacher_hidden, case.teacher_weight, bias)
    if kind == "topk":
        teacher = dgrpo.TopKTeacher(best[:, None], torch.full((12, 1), -torch.inf))
    options = {"teacher": teacher, **DIVERGENCES[divergence]}
    silent, coef = torch.zeros(12), torch.full((12,), 1e-3)
    inputs = (case.hidden, case.weight, case.targets, silent)
    out = dgrpo.linear_dgrpo_loss(*inputs, token_weights=coef, backend=backend, **options)
    want = oracle(*inputs, token_weights=coef, **options)
    assert relative_error(out.divergence, want.divergence) < 1e-3
    assert (want.divergence.max() > 1e5) == (divergence in ("reverse_kl", "jeffreys"))
    check(gradients(out.loss, case.hidden, case.weight), (want.d_hidden, want.d_weight), 1e-2)


@pytest.mark.parametrize("op", OPS)
def test_a_confident_student_keeps_its_small_gradients(op):
    # The gradient of the other columns, p, is about 4e-7 each: fp16 ends at 6e-8.
    case = half_case(16)
    weight = torch.zeros(101, 16, dtype=torch.float16)
    weight[:, 0] = torch.linspace(-1, 1, 101)
    weight[7, 0] = 14.75
    hidden = torch.ones(16, 16, dtype=torch.float16)
    case = case._replace(
        targets=torch.full((16,), 7), weight=weight.requires_grad_(), hidden=hidden.requires_grad_()
    )
    coef = torch.full((16,), 1 / 16)
    loss = loss_of(op, case, coef) * 2.0**16
    want = wanted(case, coef)
    check(gradients(loss, case.hidden, case.weight), want, 2e-2, upstream=2.0**16)


@pytest.mark.parametrize("op", OPS)
def test_backward_twice_and_other_upstream_gradients(op):
    case = half_case()
    coef = torch.full((64,), 1 / 32768)
    loss = loss_of(op, case, coef)
    once, twice = (gradients(loss, case.hidden, case.weight) for _ in range(2))
    assert all(map(torch.equal, once, twice))
    want = wanted(case, coef)
    for upstream in (16.0, 2.0**16, 2.0**22):
        got = gradients(loss * upstream, case.hidden, case.weight)
        check(got, want, upstream=upstream)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("scale", [2.0**-12, 1000.0])
def test_a_logit_scale_far_from_one(scale, op):
    case = half_case()
    case = case._replace(weight=(case.weight.detach().float() / scale).clamp(-6e4, 6e4).half())
    case.weight.requires_grad_()
    coef = torch.full((64,), 1 / 64)
    loss = loss_of(op, case, coef, logit_scale=scale)
    check(gradients(loss, case.hidden), wanted(case, coef, logit_scale=scale)[:1])


@pytest.mark.parametrize("op", OPS)
def test_fp32_parameters_under_fp16_autocast(op):
    case = half_case()
    case = case._replace(
        hidden=case.hidden.detach().float().requires_grad_(),
        weight=case.weight.detach().float().requires_grad_(),
    )
    coef = torch.full((64,), 1e-6)
    coef[40:] = 100.0
    bias = torch.zeros(101, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(op, case, coef, budget=BUDGETS[0], bias=bias)
    check(gradients(loss, case.hidden, case.weight, bias), wanted(case, coef, bias))


@pytest.mark.parametrize("op", OPS)
def test_an_fp16_leaf_under_bf16_autocast(op):
    case = half_case()
    coef = torch.full((64,), 1 / 2**22)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(op, case, coef) * 2.0**22
    got = gradients(loss, case.hidden, case.weight)
    low = case._replace(
        hidden=case.hidden.detach().bfloat16().requires_grad_(),
        weight=case.weight.detach().bfloat16().requires_grad_(),
    )
    check(got, wanted(low, coef), 1e-2, upstream=2.0**22)


@pytest.mark.parametrize("op", OPS)
def test_a_token_without_a_finite_loss_leaves_the_others_alone(op):
    case = half_case()
    coef = torch.full((64,), 1e-3)
    want = wanted(case, coef)[0]
    coef[5] = torch.nan
    for budget in BUDGETS:
        d_hidden = gradients(loss_of(op, case, coef, budget=budget), case.hidden)[0]
        others = torch.arange(64) != 5
        assert d_hidden[5].isnan().any()
        check([d_hidden[others]], [want[others]])
