"""Tokens that a bias of -inf forbids: with a soft cap too, in every op, as in the plain logits."""

import pytest
import torch

import dgrpo
from dgrpo.head import FusedHead
from dgrpo.testing import oracle, oracle_stats
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

BACKENDS = ("torch", "triton")
CAPS = (None, 20.0)
FORBIDDEN = slice(7, 60, 5)


def bias_of(case, forbidden=FORBIDDEN):
    bias = torch.linspace(-1, 1, len(case.weight), dtype=case.weight.dtype)
    bias[forbidden] = -torch.inf
    return bias.requires_grad_()


def allowed(case):
    """The same case, its targets outside the forbidden columns."""
    masked = case.targets < 0
    return case._replace(targets=torch.where(masked, case.targets, 5 * (case.targets // 5)))


def with_forbidden(teacher, columns):
    bias = torch.zeros(101, dtype=teacher.weight.dtype)
    bias[columns] = -torch.inf
    return dgrpo.TeacherHead(teacher.hidden, teacher.weight, bias, logit_softcap=25.0)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "clipped_forward_kl"])
@pytest.mark.parametrize("kind", TEACHERS)
def test_a_student_that_forbids_tokens(kind, divergence, cap):
    case = allowed(fp64(case_of()))
    options = {"teacher": teacher_of(kind, case), "logit_softcap": cap, **DIVERGENCES[divergence]}
    check_dgrpo(case, 1e-7, bias=bias_of(case), entropy_coef=0.1, **options)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_student_and_teacher_forbid_the_same(backend, policy, divergence, cap):
    case = allowed(case_of(10))
    teacher = with_forbidden(teacher_of("full", case), FORBIDDEN)
    options = {"logit_softcap": cap, "policy_logits": policy, **DIVERGENCES[divergence]}
    check_dgrpo(
        case, 1e-4, backend, teacher=teacher, bias=bias_of(case), entropy_coef=0.1,
        old_logprobs=case.old_logprobs, **options,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_that_forbids_tokens(divergence, backend):
    case = case_of(10)
    teacher = with_forbidden(teacher_of("full", case), FORBIDDEN)
    check_dgrpo(case, 1e-4, backend, teacher=teacher, **DIVERGENCES[divergence])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["fused", "plain", "stats"])
def test_the_forward_kl_of_what_the_student_forbids_is_infinite(op, backend):
    case = allowed(case_of(6, masked=0.0))
    bias, teacher = bias_of(case), teacher_of("full", case)
    inputs, options = (case.hidden, case.weight, case.targets), {"bias": bias, "teacher": teacher}
    options |= {"divergence": "forward_kl", "backend": backend}
    if op == "fused":
        out = dgrpo.linear_dgrpo_loss(*inputs, torch.zeros(6), teacher_coef=2.0, **options)
        divergence, loss = out.divergence, out.loss * 3
    elif op == "plain":
        out = dgrpo.linear_loss(*inputs, lambda stats, rows: stats.divergence, **options)
        divergence, loss = out.divergence, out.loss
    else:
        divergence = dgrpo.linear_token_stats(*inputs, **options).divergence
        loss = divergence.sum()
    assert divergence.isposinf().all() and loss.isposinf()
    want = oracle_stats(*inputs, teacher, bias=bias, divergence="forward_kl").divergence
    goal = gradients(want.sum(), case.hidden, case.weight, bias)  # p - q elsewhere
    for got, value in zip(gradients(loss, case.hidden, case.weight, bias), goal, strict=True):
        assert_near(got, value, 1e-4, "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("kind", ["full", "topk"])
@pytest.mark.parametrize("old", [None, "finite", "forbidden too"])
def test_a_target_that_the_student_forbids(old, kind, cap, backend):
    case = case_of(8, masked=0.0)
    forbidden = case.targets[:2]
    bias = bias_of(case, forbidden)
    options = {"logit_softcap": cap, "bias": bias, "teacher": teacher_of(kind, case)}
    if old:
        options["old_logprobs"] = case.old_logprobs.clone()
    if old == "forbidden too":
        options["old_logprobs"][torch.isin(case.targets, forbidden)] = -torch.inf
    inputs = (case.hidden, case.weight, case.targets, case.advantages)
    out = dgrpo.linear_dgrpo_loss(*inputs, backend=backend, **options)
    assert out.logprobs[:2].isneginf().all() and out.loss.isfinite()
    grads = gradients(out.loss, case.hidden, case.weight, bias)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[1][forbidden].any() and not grads[2][forbidden].any()
    want = oracle(*inputs, **options)
    assert_near(out.loss.reshape(1), want.loss.reshape(1), 1e-4, "loss")
    assert_near(out.ratio, want.ratio, 1e-4, "ratio")
    assert torch.equal(out.clamped, want.clamped)
    for got, name in zip(grads, ("d_hidden", "d_weight", "d_bias"), strict=True):
        assert_near(got, getattr(want, name), 1e-4, name)


@pytest.mark.parametrize("cap", CAPS)
def test_the_ops_and_the_plain_logits_agree(cap):
    case = allowed(case_of(masked=0.0))
    head = FusedHead(16, 101, bias=True, logit_scale=0.7, logit_softcap=cap)
    with torch.no_grad():
        head.weight.copy_(case.weight)
        head.bias.copy_(bias_of(case))
    logits = head.logits(case.hidden)
    assert logits[:, FORBIDDEN].isneginf().all()
    log_p = logits.log_softmax(-1)
    got = dgrpo.linear_token_stats(
        case.hidden, head.weight, case.targets, bias=head.bias, logit_scale=0.7, logit_softcap=cap
    )
    want = log_p.gather(1, case.targets[:, None])[:, 0]
    assert_near(got.logprobs, want, 1e-5, "logprobs")
    leaves = (case.hidden, head.weight, head.bias)
    for value, goal in zip(
        gradients(got.logprobs.sum(), *leaves), gradients(want.sum(), *leaves), strict=True
    ):
        assert value.isfinite().all() and goal.isfinite().all()
        assert_near(value, goal, 1e-4, "gradient")
