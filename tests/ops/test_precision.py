"""Errors against the fp64 oracle on the same rounded inputs: fp32, bf16 and fp16.

Every message shows what plain torch, with bf16 logits, makes of the same inputs.
"""

import pytest
import torch

import dgrpo
from dgrpo.testing import near_equal_teacher, oracle, oracle_stats, peaked_case, relative_error
from tests.ops.cases import DIVERGENCES, TEACHERS, case_of, check_dgrpo, fp64, gradients, teacher_of

FULL = tuple(DIVERGENCES)


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fp32_gradient_in_forward(divergence, kind):
    case = case_of(96, 701)
    options = {"teacher": teacher_of(kind, case), **DIVERGENCES[divergence]}
    check_dgrpo(case, 1e-4, old_logprobs=case.old_logprobs, entropy_coef=0.1, **options)


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fp32_other_modes(divergence, kind):
    case = case_of(96, 701)
    wide = fp64(case)
    options = DIVERGENCES[divergence]
    inputs, teacher = (case.hidden, case.weight, case.targets), teacher_of(kind, case)
    want = oracle_stats(wide.hidden, wide.weight, wide.targets, teacher, **options)
    goal = gradients(weighed(want).sum(), wide.hidden, wide.weight)
    plain = dgrpo.linear_loss(*inputs, lambda s, rows: weighed(s), teacher=teacher, **options)
    stats = dgrpo.linear_token_stats(*inputs, teacher, **options)
    scored = dgrpo.linear_logprobs(*inputs)
    for loss in (plain.loss, weighed(stats).sum()):
        for got, wanted in zip(gradients(loss, *inputs[:2]), goal, strict=True):
            assert relative_error(got, wanted) <= 1e-4
    for field in ("logprobs", "divergence", "entropy", "teacher_logprobs"):
        for out in (plain, stats):
            assert relative_error(getattr(out, field), getattr(want, field)) <= 1e-4, field
    assert relative_error(scored.logprobs, want.logprobs) <= 1e-4
    assert relative_error(scored.entropy, want.entropy) <= 1e-4


def weighed(stats):
    return 0.5 * stats.divergence - stats.logprobs - 0.1 * stats.entropy


def near_equal_case(dtype, kl, divergence):
    case = peaked_case(256, 64, 2003, dtype=dtype)
    hidden, weight = near_equal_teacher(case.hidden, case.weight, kl=kl)
    case.hidden.requires_grad_()
    case.weight.requires_grad_()
    options = {"teacher": dgrpo.TeacherHead(hidden, weight), **DIVERGENCES[divergence]}
    return case, options


def plain_torch_error(case, teacher, want):
    """Error of dHidden when logits are bf16 and torch does the rest in fp32."""
    hidden, weight = (x.detach().requires_grad_() for x in (case.hidden, case.weight))
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    log_q = (teacher.hidden @ teacher.weight.T).float().log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
    return relative_error(hidden.grad, want)


@pytest.mark.parametrize("mode", ["loss", "stats"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kl", [0.01, 0.001])
def test_bf16_with_a_near_equal_teacher(kl, divergence, mode):
    case, options = near_equal_case(torch.bfloat16, kl, divergence)
    inputs = (case.hidden, case.weight, case.targets)
    silent = torch.zeros_like(case.advantages)  # the divergence's gradient alone
    want = oracle(*inputs, silent, teacher_coef=1.0, **options)
    if mode == "loss":
        loss = dgrpo.linear_dgrpo_loss(*inputs, silent, teacher_coef=1.0, **options).loss
    else:
        loss = dgrpo.linear_token_stats(*inputs, **options).divergence.mean()
    errors = [
        relative_error(got.float(), wanted)
        for got, wanted in zip(
            gradients(loss, case.hidden, case.weight), (want.d_hidden, want.d_weight), strict=True
        )
    ]
    torch_error = plain_torch_error(case, options["teacher"], want.d_hidden)
    assert max(errors) <= 5e-3, f"{errors}; bf16 logits in plain torch: {torch_error:.3f}"
    if divergence == "reverse_kl":
        assert torch_error > 0.05  # the case is as hard as it should be


@pytest.mark.parametrize("tokens", [64])
@pytest.mark.parametrize("op", ["fused", "plain", "stats"])
def test_fp16_tokens_that_weigh_one_in_32768(op, tokens):
    case = case_of(tokens, 701, dtype=torch.float16)
    inputs = (case.hidden, case.weight, case.targets)
    weights = torch.full((tokens,), 1 / 32768)
    teacher = teacher_of("full", case)
    wide = fp64(case)
    want = oracle_stats(wide.hidden, wide.weight, wide.targets, teacher_of("full", wide))
    if op == "fused":
        out = dgrpo.linear_dgrpo_loss(
            *inputs, case.advantages, teacher=teacher, token_weights=weights
        )
        loss = out.loss
        result = oracle(*inputs, case.advantages, teacher=teacher, token_weights=weights)
        goal = (result.d_hidden, result.d_weight)
    else:
        goal = gradients((weighed(want) * weights).sum(), wide.hidden, wide.weight)
        if op == "plain":
            loss = dgrpo.linear_loss(
                *inputs, lambda s, rows: weighed(s) * weights[rows], teacher=teacher
            ).loss
        else:
            stats = dgrpo.linear_token_stats(*inputs, teacher)
            loss = (weighed(stats) * weights).sum()
    scaler = 2.0**16  # torch.amp.GradScaler's first scale
    for got, wanted in zip(gradients(loss * scaler, *inputs[:2]), goal, strict=True):
        assert got.dtype == torch.float16 and got.isfinite().all()
        assert relative_error(got.double() / scaler, wanted) <= 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["full", "topk"])
def test_low_precision_on_peaked_logits(kind, dtype):
    case = case_of(96, 701, dtype=dtype)
    check_dgrpo(case, 5e-3, teacher=teacher_of(kind, case), old_logprobs=case.old_logprobs)


def test_fp32_is_no_worse_than_plain_torch():
    case = case_of(96, 701, masked=0.0)
    wide = fp64(case)
    teacher, wide_teacher = teacher_of("full", case), teacher_of("full", wide)

    def materialised(inputs, teacher):
        log_p = (inputs.hidden @ inputs.weight.T).log_softmax(-1)
        log_q = (teacher.hidden @ teacher.weight.T).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).sum()

    want = gradients(materialised(wide, wide_teacher), wide.hidden)[0]
    plain = relative_error(gradients(materialised(case, teacher), case.hidden)[0], want)
    out = dgrpo.linear_loss(
        case.hidden, case.weight, case.targets, lambda s, rows: s.divergence, teacher=teacher
    )
    ours = relative_error(gradients(out.loss, case.hidden)[0], want)
    assert ours <= 1.5 * plain, f"ours {ours:.2e}, plain torch {plain:.2e}"
