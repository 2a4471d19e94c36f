"""The loss head on a GPU: every op, dtype, divergence and teacher kind against the fp64 oracle."""

import pytest
import torch

import dgrpo
from dgrpo.testing import near_equal_teacher, oracle, oracle_stats, peaked_case, relative_error
from tests.gpu.device import DEVICE, MIB, gpu_tests, on_gpu, small, weighed
from tests.ops.cases import (
    DIVERGENCES,
    TEACHERS,
    assert_near,
    check_dgrpo,
    gradients,
    teacher_of,
)

pytestmark = gpu_tests
MOST = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 5e-3}
DTYPES = list(MOST)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fused_loss(divergence, kind, dtype):
    case = small(dtype)
    options = {"teacher": teacher_of(kind, case), "old_logprobs": case.old_logprobs}
    check_dgrpo(case, MOST[dtype], memory_budget=2 * MIB, **options, **DIVERGENCES[divergence])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_other_ops(divergence, kind, dtype):
    case, options = small(dtype), DIVERGENCES[divergence]
    inputs, teacher = (case.hidden, case.weight, case.targets), teacher_of(kind, case)
    wide = [x.detach().double().requires_grad_() for x in inputs[:2]]
    want = oracle_stats(*wide, case.targets, teacher, **options)
    goal = gradients(weighed(want).sum(), *wide)
    budget = {"memory_budget": 2 * MIB}
    plain = dgrpo.linear_loss(
        *inputs, lambda s, _: weighed(s), teacher=teacher, **options, **budget
    )
    stats = dgrpo.linear_token_stats(*inputs, teacher, **options, **budget)
    for loss in (plain.loss, weighed(stats).sum()):
        for got, wanted in zip(gradients(loss, *inputs[:2]), goal, strict=True):
            assert_near(got, wanted, MOST[dtype], "gradient")
    for field in ("logprobs", "divergence", "entropy", "teacher_logprobs"):
        for out in (plain, stats):
            assert_near(getattr(out, field), getattr(want, field), 1e-4, field)
    scored = dgrpo.linear_logprobs(*inputs, **budget)
    assert_near(scored.logprobs, stats.logprobs, 1e-5, "logprobs")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option_at_once(dtype):
    case = small(dtype)
    bias = torch.randn(3001, device=DEVICE).to(dtype).requires_grad_()
    tilt = torch.randn(3001, device=DEVICE).to(dtype)
    check_dgrpo(
        case,
        2 * MOST[dtype],
        teacher=dgrpo.TeacherHead(case.teacher_hidden, case.teacher_weight, tilt, 1.1, 30.0),
        old_logprobs=case.old_logprobs,
        ref_logprobs=case.ref_logprobs,
        sampler_logprobs=case.ref_logprobs,
        is_cap=1.2,
        token_weights=torch.rand(200, device=DEVICE),
        clip_dual=1.5,
        ref_coef=0.2,
        entropy_coef=0.1,
        temperature=0.8,
        teacher_temperature=1.3,
        bias=bias,
        logit_scale=0.9,
        logit_softcap=40.0,
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bf16_with_a_near_equal_teacher(divergence):
    case = peaked_case(512, 256, 20011, dtype=torch.bfloat16, device=DEVICE)
    hidden, weight = near_equal_teacher(case.hidden, case.weight)
    case.hidden.requires_grad_()
    case.weight.requires_grad_()
    silent = torch.zeros_like(case.advantages)
    inputs = (case.hidden, case.weight, case.targets, silent)
    options = {"teacher": dgrpo.TeacherHead(hidden, weight), "teacher_coef": 1.0}
    options |= DIVERGENCES[divergence]
    want = oracle(*inputs, **options)
    got = gradients(dgrpo.linear_dgrpo_loss(*inputs, **options).loss, *inputs[:2])
    for value, wanted in zip(got, (want.d_hidden, want.d_weight), strict=True):
        assert_near(value, wanted, 5e-3, "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeating_gives_the_same_bits(dtype):
    case = small(dtype)
    teacher = teacher_of("full", case)

    def run():
        inputs = (case.hidden, case.weight, case.targets)
        loss = dgrpo.linear_dgrpo_loss(*inputs, case.advantages, teacher=teacher).loss
        stats = dgrpo.linear_token_stats(*inputs, teacher, divergence="jsd")
        coupled = stats.logprobs.mean() * stats.divergence.mean()
        return [*gradients(loss, *inputs[:2]), *gradients(coupled, *inputs[:2]), loss, coupled]

    first = run()
    for _ in range(3):
        assert all(map(torch.equal, run(), first))


def test_extreme_logits_are_finite():
    case = small(tokens=20)
    case = case._replace(
        hidden=(case.hidden.detach() * 300).requires_grad_(),
        teacher_hidden=case.teacher_hidden * 280,
    )
    assert (case.hidden @ case.weight.T).abs().max() > 9e3
    for kind in ("full", "topk"):
        for options in DIVERGENCES.values():
            out = dgrpo.linear_dgrpo_loss(
                case.hidden, case.weight, case.targets, case.advantages,
                teacher=teacher_of(kind, case), **options,
            )  # fmt: skip
            assert out.loss.isfinite()
            for grad in gradients(out.loss, case.hidden, case.weight):
                assert grad.isfinite().all()


def test_fp16_tokens_that_weigh_one_in_32768():
    case = small(torch.float16)
    inputs = (case.hidden, case.weight, case.targets, case.advantages)
    options = {"teacher": teacher_of("full", case)}
    options["token_weights"] = torch.full((200,), 1 / 32768, device=DEVICE)
    want = oracle(*inputs, **options)
    loss = dgrpo.linear_dgrpo_loss(*inputs, **options).loss * 2.0**16
    for got, wanted in zip(
        gradients(loss, *inputs[:2]), (want.d_hidden, want.d_weight), strict=True
    ):
        assert relative_error(got.double() / 2**16, wanted) <= 5e-3


@on_gpu
def test_autocast_and_a_compiled_model():
    case, body = small(), torch.nn.Linear(16, 16).to(DEVICE)
    teacher = teacher_of("full", case)

    def step(hidden):
        with torch.autocast("cuda", torch.bfloat16):
            return dgrpo.linear_dgrpo_loss(
                body(hidden), case.weight, case.targets, case.advantages, teacher=teacher
            ).loss

    want = gradients(step(case.hidden), body.weight, case.weight)
    got = gradients(torch.compile(step)(case.hidden), body.weight, case.weight)
    for value, wanted in zip(got, want, strict=True):
        assert value.dtype == torch.float32
        assert_near(value, wanted, 2e-2, "gradient")  # inductor fuses the body's rounding


@on_gpu
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("columns", [1001, 152064])
def test_programs_that_share_a_row(columns, group):
    """`row_fused`, whose programs wait for each other, against `row_stats` and `row_grad`."""
    from dgrpo.objectives import Context
    from dgrpo_kernels import STATS, Logits, PolicyRows
    from dgrpo_kernels import triton_rows as kernels

    rows, width = 300, -(-columns // 16) * 16
    z, t = (Logits(torch.randn(rows, width, device=DEVICE)[:, :columns], holes=False) for _ in "zt")
    targets = torch.randint(columns, (rows,), device=DEVICE)
    inputs = torch.rand(7, rows, device=DEVICE)
    context = Context(inputs[1], inputs[0], inputs[2])
    runs = []
    for kernel in ("two", "one", "one"):
        stats = torch.zeros(STATS, rows, device=DEVICE)
        grad = torch.zeros(rows, width, dtype=torch.bfloat16, device=DEVICE)[:, :columns]
        policy = PolicyRows(inputs, torch.zeros(7, rows, device=DEVICE), context)
        if kernel == "one":
            kernels.row_fused(z, t, targets, stats, grad, policy=policy, group=group)
        else:
            kernels.row_stats(z, t, targets, stats)
            kernels.row_grad(z, t, targets, stats, None, grad, policy=policy)
        runs.append((stats, policy.outputs, grad))
    two, one, again = runs
    assert all(map(torch.equal, one, again))
    for got, wanted, most in zip(one, two, (1e-5, 1e-5, 1e-2), strict=True):
        assert_near(got.float(), wanted.double(), most, "row_fused")
