"""Extreme values: what must stay finite, what must show as NaN, what must not be read."""

import pytest
import torch

import dgrpo
from dgrpo.testing import oracle, peaked_case
from tests.ops.cases import (
    DIVERGENCES,
    assert_near,
    case_of,
    check_dgrpo,
    gradients,
    teacher_of,
)

BACKENDS = ("torch", "triton")


def loss_of(case, **options):
    options.setdefault("teacher", teacher_of("full", case))
    return dgrpo.linear_dgrpo_loss(
        case.hidden, case.weight, case.targets, case.advantages, **options
    ).loss


def finite(case, loss):
    assert loss.isfinite()
    for grad in gradients(loss, case.hidden, case.weight):
        assert grad.isfinite().all()
    return gradients(loss, case.hidden, case.weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_advantage_with_an_infinite_ratio(backend):
    case = case_of(10, masked=0.0)
    case.advantages[::2] = 0
    old = case.old_logprobs.clone()
    old[0], old[2], old[4] = -torch.inf, torch.inf, torch.nan
    loss = loss_of(case, old_logprobs=old, backend=backend)
    got = finite(case, loss)
    kept = torch.where(case.advantages == 0, case.old_logprobs, old)
    want = oracle(
        case.hidden, case.weight, case.targets, case.advantages,
        teacher=teacher_of("full", case), old_logprobs=kept,
    )  # fmt: skip
    assert_near(got[1], want.d_weight, 1e-4, "d_weight")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["full", "topk"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_of_ten_thousand(divergence, kind, backend):
    case = case_of(6, masked=0.0, peak=32.0)
    case = case._replace(
        hidden=(case.hidden.detach() * 300).requires_grad_(),
        teacher_hidden=case.teacher_hidden * 280,
    )
    assert (case.hidden @ case.weight.T).abs().max() > 9e3
    teacher = teacher_of(kind, case)
    options = {"teacher": teacher, "entropy_coef": 0.1, **DIVERGENCES[divergence]}
    got = finite(case, loss_of(case, backend=backend, **options))
    want = oracle(case.hidden, case.weight, case.targets, case.advantages, **options)
    for value, name in zip(got, ("d_hidden", "d_weight"), strict=True):
        assert_near(value, getattr(want, name), 5e-3, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_far_below_the_teacher(divergence, backend):
    # Columns whose p underflows in fp32 while q does not: the clip must still see log p.
    case = case_of(6, masked=0.0)
    case = case._replace(
        hidden=(case.hidden.detach() * 5).requires_grad_(), teacher_hidden=case.teacher_hidden / 8
    )
    options = {"teacher": teacher_of("full", case), **DIVERGENCES[divergence]}
    if divergence == "clipped_forward_kl":
        options["divergence_clip"] = 1.0
    check_dgrpo(case, 2e-4, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_without_mass_on_the_sampled_token(divergence, backend):
    case = case_of(6, masked=0.0)
    bias = torch.zeros(101)
    bias[case.targets[:3]] = -torch.inf
    teacher = dgrpo.TeacherHead(case.teacher_hidden, case.teacher_weight, bias)
    loss = loss_of(case, teacher=teacher, backend=backend, **DIVERGENCES[divergence])
    finite(case, loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["fused", "fused without gradient"])
def test_a_nan_teacher_where_its_coefficient_is_zero(op, backend):
    case = case_of(10, masked=0.0)
    broken = case.teacher_hidden.clone()
    broken[::2] = torch.nan
    coef = torch.ones(10)
    coef[::2] = 0
    losses = []
    for hidden in (case.teacher_hidden, broken):
        teacher = dgrpo.TeacherHead(hidden, case.teacher_weight)
        with torch.set_grad_enabled(op == "fused"):
            loss = loss_of(case, teacher=teacher, teacher_coef=coef, backend=backend)
        losses.append((loss.detach(), *(finite(case, loss) if op == "fused" else ())))
    assert all(map(torch.equal, *losses))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["fused", "plain", "stats"])
def test_tokens_without_a_teacher(op, backend):
    case = case_of(10, masked=0.0)
    rows = torch.arange(10)
    rows[::2] = -1
    broken = case.teacher_hidden.clone()
    broken[::2] = torch.nan  # never to be read, row 0 included
    teacher = dgrpo.TeacherHead(broken, case.teacher_weight, rows=rows)
    inputs = (case.hidden, case.weight, case.targets)
    options = {"teacher": teacher, "backend": backend}
    if op == "stats":
        divergence = dgrpo.linear_token_stats(*inputs, **options).divergence
        loss = divergence.sum()
    elif op == "plain":
        out = dgrpo.linear_loss(*inputs, lambda s, rows: s.divergence, **options)
        divergence, loss = out.divergence, out.loss
    else:
        out = dgrpo.linear_dgrpo_loss(*inputs, torch.zeros(10), **options)
        divergence, loss = out.divergence, out.loss
    assert not divergence[::2].any() and divergence[1::2].all()
    d_hidden, _ = finite(case, loss)
    assert not d_hidden[::2].any() and d_hidden[1::2].any(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target", [101, 10**12, -1, -(10**12)])
def test_a_target_outside_the_vocabulary(target, backend):
    case = case_of(6, masked=0.0)
    clean = dgrpo.linear_logprobs(case.hidden, case.weight, case.targets, backend=backend)
    case.targets[2] = target
    out = dgrpo.linear_dgrpo_loss(
        case.hidden, case.weight, case.targets, case.advantages,
        teacher=teacher_of("full", case._replace(targets=case.targets.clamp(0, 100))),
        token_weights=torch.tensor([1.0, 1, 0, 1, 1, 1]), backend=backend,
    )  # fmt: skip
    assert out.loss.isnan() and out.logprobs[2].isnan() and out.teacher_logprobs[2].isnan()
    others = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(out.logprobs[others], clean.logprobs[others])
    topk = teacher_of("topk", case._replace(targets=case.targets.clamp(0, 100)))
    assert loss_of(case, teacher=topk, backend=backend).isnan()
    with pytest.raises(ValueError, match=f"targets: got {target}, expected -100 or 0 to 100"):
        loss_of(case, teacher=topk, check=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_no_weight_have_no_gradient(backend):
    case = case_of(10, masked=0.0)
    weights = torch.ones(10)
    weights[::2] = 0
    case.old_logprobs[::2] = torch.nan
    loss = loss_of(case, token_weights=weights, old_logprobs=case.old_logprobs, backend=backend)
    d_hidden, _ = finite(case, loss)
    assert not d_hidden[::2].any() and d_hidden[1::2].any(1).all()


@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_teacher_of_another_dtype(dtype, teacher_dtype):
    case = case_of(dtype=dtype)
    teacher = dgrpo.TeacherHead(
        case.teacher_hidden.to(teacher_dtype), case.teacher_weight.to(teacher_dtype)
    )
    check_dgrpo(case, 5e-3 if dtype == torch.bfloat16 else 1e-4, teacher=teacher)


@pytest.mark.parametrize("backend", BACKENDS)
def test_undefined_inputs_of_a_token_without_weight_do_not_count(backend):
    case = peaked_case(6, 8, 50)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    broken = case.old_logprobs.clone()
    broken[1] = torch.nan
    token_weights = torch.full((6,), 1 / 6)
    token_weights[1] = 0
    out = dgrpo.linear_dgrpo_loss(
        hidden,
        weight,
        case.targets,
        case.advantages,
        old_logprobs=broken,
        ref_logprobs=broken,
        ref_coef=0.1,
        token_weights=token_weights,
        backend=backend,
    )
    out.loss.backward()
    assert out.loss.isfinite() and hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    assert (hidden.grad[1] == 0).all() and (hidden.grad[0] != 0).any()
