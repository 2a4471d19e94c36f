"""`linear_dgrpo_loss` against the fp64 oracle: every option, both backends, many shapes."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import dgrpo
from dgrpo.testing import oracle
from tests.ops.cases import (
    DIVERGENCES,
    TEACHERS,
    assert_near,
    case_of,
    check_dgrpo,
    fp64,
    gradients,
    teacher_of,
)

SMALL = 101 * 4 * 12  # bytes: a few rows of logits


def option_cases(case):
    """Named options of the loss, drawn around the case."""
    generator = torch.Generator().manual_seed(3)
    tokens, vocab = len(case.targets), len(case.weight)
    off = {"old_logprobs": case.old_logprobs}
    weights = torch.rand(tokens, generator=generator)
    far = case.old_logprobs - 0.6 * torch.randn(tokens, generator=generator)
    bias = torch.randn(vocab, generator=generator).to(case.weight.dtype).requires_grad_()
    gate = (torch.rand(tokens, generator=generator) > 0.5).float()
    return {
        "on policy": {},
        "off policy": off,
        "wide clip": {"old_logprobs": far, "clip_low": 0.1, "clip_high": 0.5},
        "dual clip": {"old_logprobs": far - 1, "clip_dual": 1.5},
        "beyond the clamp": {"old_logprobs": case.old_logprobs + torch.tensor([0.0, 30.0, -30.0])
            .repeat(tokens)[:tokens]},
        "token weights": {**off, "token_weights": weights},
        "importance weights": {**off, "policy_weights": weights},
        "sampler": {**off, "sampler_logprobs": far},
        "capped sampler": {**off, "sampler_logprobs": far, "is_cap": 1.1},
        "reference": {**off, "ref_logprobs": case.ref_logprobs, "ref_coef": 0.3},
        "entropy": {**off, "entropy_coef": 0.2},
        "gated teacher": {**off, "teacher_coef": gate},
        "teacher coefficient in a tensor": {"teacher_coef": torch.tensor(0.7)},
        "no teacher term": {**off, "teacher_coef": 0.0},
        "temperatures": {**off, "temperature": 0.7, "teacher_temperature": 1.9},
        "bias": {**off, "bias": bias},
        "scale and cap": {**off, "bias": bias, "logit_scale": 0.6, "logit_softcap": 15.0},
        "truncated vocabulary": {"vocab_size": vocab - 7},
        "rounded policy": {**off, "policy_logits": "bfloat16"},
        "rounded and capped": {"policy_logits": "bfloat16", "logit_softcap": 15.0, "bias": bias},
    }  # fmt: skip


OPTIONS = list(option_cases(case_of()))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_in_fp64(name):
    case = fp64(case_of())
    case.targets[case.targets >= 90] = 3  # inside the truncated vocabulary
    options = option_cases(case)[name]
    teacher = teacher_of("full", case)
    # bf16 rounding of fp64 and of fp32 logits differs by double rounding at most.
    check_dgrpo(case, 1e-9, teacher=teacher, memory_budget=SMALL, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_in_the_kernels(name):
    case = case_of(tokens=10)
    case.targets[case.targets >= 90] = 3
    options = option_cases(case)[name]
    check_dgrpo(case, 1e-4, "triton", teacher=teacher_of("full", case), **options)


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_in_fp64(divergence, kind):
    case = fp64(case_of())
    options = {"teacher": teacher_of(kind, case), "old_logprobs": case.old_logprobs}
    check_dgrpo(case, 1e-9, memory_budget=SMALL, **options, **DIVERGENCES[divergence])


@pytest.mark.parametrize("kind", ("full", "padded_topk"))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_everything_at_once(divergence, kind):
    case = fp64(case_of())
    bias = torch.randn(101, dtype=torch.float64, requires_grad=True)
    teacher = teacher_of(kind, case)
    if kind == "full":
        teacher = dgrpo.TeacherHead(
            teacher.hidden, teacher.weight, torch.randn(101).double(), 1.2, logit_softcap=20.0
        )
    check_dgrpo(
        case,
        1e-9,
        teacher=teacher,
        old_logprobs=case.old_logprobs,
        ref_logprobs=case.ref_logprobs,
        sampler_logprobs=case.ref_logprobs,
        is_cap=1.2,
        token_weights=torch.rand(24),
        clip_dual=1.5,
        ref_coef=0.2,
        entropy_coef=0.1,
        temperature=0.8,
        teacher_temperature=1.3 if kind == "full" else 1.0,  # top-k comes at one temperature
        bias=bias,
        logit_scale=0.7,
        logit_softcap=25.0,
        memory_budget=SMALL,
        **DIVERGENCES[divergence],
    )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 40),
    vocab=st.integers(2, 300),
    masked=st.sampled_from([0.0, 0.3, 0.9]),
    budget=st.integers(1, 2**17),
    divergence=st.sampled_from(list(DIVERGENCES)),
    kind=st.sampled_from(TEACHERS[:3]),
    three=st.booleans(),
)
def test_any_shape(tokens, vocab, masked, budget, divergence, kind, three):
    case = fp64(case_of(tokens, vocab, masked=masked))
    hidden, targets, advantages = case.hidden, case.targets, case.advantages
    if three and tokens % 2 == 0:
        hidden = hidden.detach().view(2, tokens // 2, -1).requires_grad_()
        targets, advantages = targets.view(2, -1), advantages.view(2, -1)
        if kind == "by_rows":
            kind = "full"
    options = {"teacher": teacher_of(kind, case), **DIVERGENCES[divergence]}
    got = dgrpo.linear_dgrpo_loss(
        hidden, case.weight, targets, advantages, memory_budget=budget, **options
    )
    want = oracle(hidden, case.weight, targets, advantages, **options)
    d_hidden, d_weight = gradients(got.loss, hidden, case.weight)
    assert got.logprobs.shape == targets.shape
    assert_near(got.divergence, want.divergence, 1e-9, "divergence")
    assert_near(d_hidden, want.d_hidden, 1e-9, "d_hidden")
    assert_near(d_weight, want.d_weight, 1e-9, "d_weight")


def test_no_teacher():
    case = fp64(case_of())
    check_dgrpo(case, 1e-9, old_logprobs=case.old_logprobs, entropy_coef=0.1)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_inputs_get_no_gradient(frozen):
    case = fp64(case_of())
    want = oracle(case.hidden, case.weight, case.targets, case.advantages)
    case.hidden.requires_grad_(frozen == "weight")
    case.weight.requires_grad_(frozen == "hidden")
    out = dgrpo.linear_dgrpo_loss(case.hidden, case.weight, case.targets, case.advantages)
    assert_near(out.loss.reshape(1), want.loss.reshape(1), 1e-9, "loss")
    assert out.loss.requires_grad == (frozen != "both")
    if frozen == "weight":
        assert_near(gradients(out.loss, case.hidden)[0], want.d_hidden, 1e-9, "d_hidden")
    if frozen == "hidden":
        assert_near(gradients(out.loss, case.weight)[0], want.d_weight, 1e-9, "d_weight")


def test_only_hidden_weight_and_bias_get_gradients():
    case = fp64(case_of())
    extra = {
        "old_logprobs": case.old_logprobs.clone().requires_grad_(),
        "token_weights": torch.rand(24).requires_grad_(),
        "teacher_coef": torch.tensor(0.5, requires_grad=True),
    }
    teacher = dgrpo.TeacherHead(case.teacher_hidden.clone().requires_grad_(), case.teacher_weight)
    for backend, inputs in {"torch": case, "triton": case_of(10)}.items():
        if backend == "triton":
            extra = {"teacher_coef": extra["teacher_coef"]}
            teacher = teacher_of("full", inputs)
        out = dgrpo.linear_dgrpo_loss(
            inputs.hidden, inputs.weight, inputs.targets, inputs.advantages,
            teacher=teacher, backend=backend, **extra,
        )  # fmt: skip
        out.loss.backward()
        assert inputs.hidden.grad is not None and inputs.weight.grad is not None
    assert teacher.hidden.grad is None and extra["teacher_coef"].grad is None


def test_a_teacher_that_shares_the_students_weight_is_constant():
    case = fp64(case_of())
    teacher = dgrpo.TeacherHead(case.hidden + 0.3, case.weight)
    fixed = dgrpo.TeacherHead((case.hidden + 0.3).detach(), case.weight.detach().clone())
    grads = []
    for given_teacher in (teacher, fixed):
        out = dgrpo.linear_dgrpo_loss(
            case.hidden, case.weight, case.targets, case.advantages, teacher=given_teacher
        )
        grads.append(gradients(out.loss, case.hidden, case.weight))
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)


def test_outputs_are_detached_and_zero_where_masked():
    case = case_of()
    out = dgrpo.linear_dgrpo_loss(
        case.hidden, case.weight, case.targets, case.advantages,
        teacher=teacher_of("full", case), old_logprobs=case.old_logprobs,
    )  # fmt: skip
    masked = case.targets == -100
    assert masked.any()
    assert out.loss.shape == () and out.loss.requires_grad
    for name, value in out._asdict().items():
        if name != "loss":
            assert value.shape == case.targets.shape and not value.requires_grad
            assert not value[masked].any(), name
    assert out.clipped.dtype == out.clamped.dtype == torch.bool


def test_a_head_that_is_gathered_for_each_pass():
    from contextlib import contextmanager

    case, entered = fp64(case_of()), []

    @contextmanager
    def gather():
        entered.append("in")
        yield case.teacher_weight, None
        entered.append("out")

    teacher = dgrpo.TeacherHead(case.teacher_hidden, gather)
    inputs = (case.hidden, case.weight, case.targets)
    want = oracle(*inputs, case.advantages, teacher=teacher_of("full", case))
    out = dgrpo.linear_dgrpo_loss(*inputs, case.advantages, teacher=teacher)
    assert entered == ["in", "out"]
    assert_near(gradients(out.loss, case.weight)[0], want.d_weight, 1e-9, "d_weight")
    assert entered == ["in", "out"]
    dgrpo.linear_token_stats(*inputs, teacher).divergence.sum().backward()
    assert entered == ["in", "out"] * 3
