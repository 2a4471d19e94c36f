"""How the ops are called in the wild: shapes, views, rows, and every mode of autograd."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dgrpo
from dgrpo.testing import oracle
from tests.ops.cases import (
    TEACHERS,
    assert_near,
    case_of,
    check_dgrpo,
    fp64,
    gradients,
    teacher_of,
)

BACKENDS = ("torch", "triton")


def loss_of(case, **options):
    options.setdefault("teacher", teacher_of("full", case))
    return dgrpo.linear_dgrpo_loss(
        case.hidden, case.weight, case.targets, case.advantages, **options
    ).loss


def every_loss(case, **options):
    """The scalar of each op that has one."""
    teacher = teacher_of("full", case)
    inputs = (case.hidden, case.weight, case.targets)
    stats = dgrpo.linear_token_stats(*inputs, teacher, **options)
    return {
        "fused": loss_of(case, teacher=teacher, **options),
        "plain": dgrpo.linear_loss(
            *inputs, lambda s, rows: s.divergence - s.logprobs, teacher=teacher, **options
        ).loss,
        "stats": (stats.divergence - stats.logprobs + stats.entropy).sum(),
    }


# shapes and strides


def test_three_dimensions_and_views():
    case = fp64(case_of(24))
    want = loss_of(case)
    grads = gradients(want, case.hidden, case.weight)
    hidden = case.hidden.detach().view(4, 6, 16)
    longer = torch.cat([hidden, torch.full_like(hidden[:, :1], torch.nan)], 1).requires_grad_()
    wide = torch.stack([case.weight.detach(), torch.ones_like(case.weight)], 2).requires_grad_()
    weight = wide[..., 0]
    assert not longer[:, :-1].is_contiguous() and not weight.is_contiguous()
    targets = case.targets.view(4, 6)
    teacher = teacher_of("full", case)
    teacher = dgrpo.TeacherHead(teacher.hidden.view(4, 6, -1), teacher.weight)
    got = dgrpo.linear_dgrpo_loss(
        longer[:, :-1], weight, targets, case.advantages.view(4, 6), teacher=teacher
    )
    assert got.logprobs.shape == (4, 6)
    torch.testing.assert_close(got.loss, want)
    d_hidden, d_wide = gradients(got.loss, longer, wide)
    assert_near(d_hidden[:, :-1].reshape(24, 16), grads[0], 1e-12, "d_hidden")
    assert_near(d_wide[..., 0], grads[1], 1e-12, "d_weight")
    assert not d_hidden[:, -1].any() and not d_wide[..., 1].any()


@pytest.mark.parametrize("masked", [0.0, 0.25])
def test_a_shifted_batch_as_language_models_have_it(masked):
    case = fp64(case_of(24, masked=masked))
    hidden = case.hidden.detach().view(2, 12, 16).requires_grad_()
    targets = case.targets.view(2, 12)
    got = dgrpo.linear_dgrpo_loss(
        hidden[:, :-1], case.weight, targets[:, 1:], case.advantages.view(2, 12)[:, 1:]
    )
    want = oracle(hidden[:, :-1], case.weight, targets[:, 1:], case.advantages.view(2, 12)[:, 1:])
    assert_near(gradients(got.loss, hidden)[0][:, :-1], want.d_hidden, 1e-9, "d_hidden")


def test_a_transposed_weight():
    case = fp64(case_of())
    columns = case.weight.detach().T.contiguous().requires_grad_()
    loss = dgrpo.linear_dgrpo_loss(case.hidden, columns.T, case.targets, case.advantages).loss
    want = oracle(case.hidden, columns.T, case.targets, case.advantages)
    assert_near(gradients(loss, columns)[0], want.d_weight.T, 1e-9, "d_weight")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [2, 3, 17, 257, 2049])
def test_vocabularies_that_divide_nothing(vocab, backend):
    # With few columns the rest of a peaked row is rounding alone.
    case = case_of(3, vocab, masked=0.0, peak=32.0 if vocab > 9 else 3.0)
    check_dgrpo(case, 1e-4, backend, teacher=teacher_of("full", case))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", TEACHERS[:1] + TEACHERS[2:3])
def test_one_token(kind, backend):
    case = case_of(1, masked=0.0)
    check_dgrpo(case, 1e-4, backend, teacher=teacher_of(kind, case))


def test_one_column():
    case = fp64(case_of(3, 2, masked=0.0))
    out = dgrpo.linear_dgrpo_loss(
        case.hidden, case.weight[:1], case.targets * 0, case.advantages, entropy_coef=1.0
    )
    out.loss.backward()
    assert not out.logprobs.any() and not case.hidden.grad.any()


# rows


@pytest.mark.parametrize("where", ["dense", "masked"])
def test_given_rows_change_nothing(where):
    case = case_of(masked=0.0 if where == "dense" else 0.4)
    rows = (case.targets != -100).nonzero()[:, 0]
    found, given = loss_of(case), loss_of(case, rows=rows, check=True)
    assert torch.equal(found, given)
    pairs = zip(*(gradients(x, case.hidden, case.weight) for x in (found, given)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("op", ["fused", "plain", "stats"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_unmasked_token(op, backend):
    case = case_of()
    case.targets.fill_(-100)
    loss = every_loss(case, backend=backend)[op]
    assert loss == 0 and loss.requires_grad
    loss.backward()
    for leaf in (case.hidden, case.weight):
        assert leaf.grad is not None and not leaf.grad.any()


def test_no_token_at_all():
    case = case_of()
    empty = (case.hidden[:0], case.weight, case.targets[:0])
    loss = dgrpo.linear_dgrpo_loss(*empty, case.advantages[:0]).loss
    loss.backward()
    assert loss == 0 and not case.weight.grad.any()
    assert dgrpo.linear_logprobs(*empty).logprobs.shape == (0,)


# autograd


@pytest.mark.parametrize("op", ["fused", "plain", "stats"])
def test_backward_twice(op):
    case = case_of()
    loss = every_loss(case)[op]
    once, twice = (gradients(loss, case.hidden, case.weight) for _ in range(2))
    assert all(map(torch.equal, once, twice))


@pytest.mark.parametrize("op", ["fused", "plain", "stats"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scaled_upstream_gradient(op, dtype):
    case = case_of(dtype=dtype)
    loss = every_loss(case)[op]
    plain = gradients(loss, case.hidden, case.weight)
    scaled = gradients(loss * 8, case.hidden, case.weight)
    for small, large in zip(plain, scaled, strict=True):
        assert large.dtype == dtype
        assert_near(large, small.double() * 8, 1e-3 if dtype == torch.float16 else 1e-5, "gradient")


def test_gradient_accumulation():
    case = fp64(case_of(24))
    weights = torch.full((24,), 1 / int((case.targets != -100).sum()))
    whole = gradients(loss_of(case), case.hidden, case.weight)
    for part in (slice(0, 9), slice(9, 24)):
        teacher = dgrpo.TeacherHead(case.teacher_hidden[part], case.teacher_weight)
        dgrpo.linear_dgrpo_loss(
            case.hidden[part], case.weight, case.targets[part], case.advantages[part],
            teacher=teacher, token_weights=weights[part],
        ).loss.backward()  # fmt: skip
    assert_near(case.hidden.grad, whole[0], 1e-6, "d_hidden")
    assert_near(case.weight.grad, whole[1], 1e-6, "d_weight")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("op", ["fused", "stats"])
def test_inside_a_checkpointed_region(op, reentrant):
    case = case_of()
    want = gradients(every_loss(case)[op], case.hidden, case.weight)

    def run(hidden):
        return every_loss(case._replace(hidden=hidden))[op]

    got = gradients_of_checkpoint(run, case, reentrant)
    assert all(map(torch.equal, got, want))


def gradients_of_checkpoint(run, case, reentrant):
    checkpoint(run, case.hidden, use_reentrant=reentrant).backward()
    return case.hidden.grad, case.weight.grad


@pytest.mark.parametrize("op", ["fused", "plain", "stats"])
def test_autocast_runs_products_in_its_dtype_and_nothing_else(op):
    case = case_of()
    low = case_of(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = every_loss(case)[op]
    got = gradients(loss, case.hidden, case.weight)
    want_loss = every_loss(low._replace(advantages=case.advantages))[op]
    want = gradients(want_loss, low.hidden, low.weight)
    assert loss.dtype == torch.float32
    for value, wanted in zip(got, want, strict=True):
        assert value.dtype == torch.float32
        assert_near(value, wanted.float(), 5e-3, "gradient")  # bf16 rounds at the end only there


def test_autocast_over_a_model():
    case, body = case_of(), torch.nn.Linear(16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = body(case.hidden)  # bf16 states beside an fp32 head
        loss = loss_of(case._replace(hidden=hidden))
    loss.backward()
    assert hidden.dtype == torch.bfloat16
    assert body.weight.grad.norm() > 0 and case.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradient(mode):
    case = case_of()
    want = every_loss(case)
    with mode():
        got = every_loss(case)
    for name, loss in got.items():
        assert not loss.requires_grad
        torch.testing.assert_close(loss, want[name].detach(), rtol=1e-6, atol=1e-6)


def test_inference_tensors_as_inputs():
    case = case_of()
    with torch.inference_mode():
        hidden = case.hidden * 1
    out = dgrpo.linear_logprobs(hidden, case.weight, case.targets)
    assert out.logprobs.isfinite().all()


@pytest.mark.parametrize("op", ["fused", "stats"])
def test_in_a_compiled_model(op):
    case = case_of()
    body = torch.nn.Linear(16, 16)

    def step(hidden):
        return every_loss(case._replace(hidden=body(hidden).tanh()))[op] * 2

    want = gradients(step(case.hidden), body.weight, case.weight)
    torch._dynamo.reset()
    got = gradients(torch.compile(step, backend="aot_eager")(case.hidden), body.weight, case.weight)
    for value, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("kind", ["full", "topk", None])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_call_goes_down_once(backend, kind):
    """No file of ops and kernels is entered twice on the way down, and at most 8 are."""
    case, root = case_of(), Path(dgrpo.__file__).parents[1]
    homes = (str(root / "dgrpo/ops"), str(root / "kernels"))
    teacher = None if kind is None else teacher_of(kind, case)
    inputs = (case.hidden, case.weight, case.targets, case.advantages)
    ways: set[tuple[str, ...]] = set()

    def follow(frame, event, _):
        if event != "call" or not frame.f_code.co_filename.startswith(homes):
            return
        way: list[str] = []
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(homes) and name not in way[-1:]:
                way.append(name)
            frame = frame.f_back
        ways.add(tuple(str(Path(name).relative_to(root)) for name in reversed(way)))

    before = sys.getprofile()
    sys.setprofile(follow)
    try:
        dgrpo.linear_dgrpo_loss(*inputs, teacher=teacher, backend=backend)
    finally:
        sys.setprofile(before)
    assert 4 < max(map(len, ways)) <= 8, max(ways, key=len)
    assert not [way for way in ways if len(set(way)) < len(way)]
