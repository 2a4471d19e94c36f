"""`row_grad` against autograd in fp64 and against its twin in plain torch."""

import math

import pytest
import torch

from dgrpo.ops import rows_torch
from dgrpo.testing import relative_error
from dgrpo_kernels import triton_rows as kernels
from tests.kernels.blocks import (
    DEVICE,
    DIVERGENCES,
    SIZES,
    TRANSFORMS,
    block,
    fields,
    measured,
    near,
    new_grad,
    raw_of,
    targets_of,
    transform,
    want,
)

BACKENDS = {"triton": kernels, "torch": rows_torch}
A, B, C = range(3)


def coefficients(rows: int) -> torch.Tensor:
    """(3, R) as a view of those of more rows."""
    draw = torch.randn(3, rows + 4, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    return draw[:, 2 : 2 + rows]


def grad_of(backend, z, t, divergence, coef=None, dtype=torch.float32, **options):
    rows, columns = z.raw.shape
    targets = targets_of(rows, columns)
    coef = coefficients(rows) if coef is None else coef
    stats = measured(BACKENDS[backend], z, t, targets, divergence, **options)
    out = new_grad(rows, columns, dtype)
    BACKENDS[backend].row_grad(z, t, targets, stats, coef, out, divergence=divergence, **options)
    return out


def check(backend, z, t, divergence="reverse_kl", most=2e-5, **options):
    got = grad_of(backend, z, t, divergence, **options)
    targets, coef = targets_of(*z.raw.shape), coefficients(len(z.raw))
    name = divergence if t is not None else "reverse_kl"
    goal = want(z, t, targets, coef, divergence=name, **options).grad
    assert relative_error(got, goal) <= most


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("columns", SIZES[1:])
def test_any_number_of_columns(columns, holes, backend):
    check(backend, block(3, columns, holes=holes), block(3, columns, seed=1, holes=holes))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_divergences_and_transforms(name, divergence, backend):
    z, t = block(3, 77, **TRANSFORMS[name]), block(3, 77, seed=1, **TRANSFORMS[name])
    check(backend, z, t._replace(temperature=1.3), divergence, **DIVERGENCES[divergence])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_without_a_teacher(name, backend):
    check(backend, block(3, 77, **TRANSFORMS[name]), None, "none")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_a_rounded_policy(divergence, name, backend):
    z = block(3, 300, **TRANSFORMS[name])
    t, targets, coef = block(3, 300, seed=1), targets_of(3, 300), coefficients(3)
    options = {"divergence": divergence, "round_policy": True, **DIVERGENCES[divergence]}
    stats = measured(BACKENDS[backend], z, t, targets, **options)
    out = new_grad(3, 300, torch.float32)
    BACKENDS[backend].row_grad(z, t, targets, stats, coef, out, **options)
    assert relative_error(out, want(z, t, targets, coef, **options).grad) < 2e-5


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_is_rounded_once(backend, dtype, most):
    z, t = block(3, 500), block(3, 500, seed=1)
    wide = grad_of(backend, z, t, "reverse_kl")
    low = grad_of(backend, z, t, "reverse_kl", dtype=dtype)
    assert torch.equal(low, wide.to(dtype))
    goal = want(z, t, targets_of(3, 500), coefficients(3)).grad
    assert relative_error(low.float(), goal) < most


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("noise, most", [(0.1, 2e-6), (0.02, 1e-5), (1e-3, 2e-4), (3e-4, 1e-3)])
def test_a_near_equal_teacher(noise, most, holes, backend):
    z = block(3, 3000, holes=holes)
    t = near(z, noise)  # a KL of about noise^2 / 2: 5e-3 to 5e-8 nats
    coef = torch.zeros(3, 3, device=DEVICE)
    coef[B] = 1
    got = grad_of(backend, z, t, "reverse_kl", coef=coef)
    assert relative_error(got, want(z, t, targets_of(3, 3000), coef).grad) < most


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_zero_coefficient_skips_its_term(divergence, backend):
    z, t = block(3, 40), block(3, 40, seed=1)
    t.raw.fill_(torch.nan)
    coef = coefficients(3).clone()
    coef[B] = 0
    got = grad_of(backend, z, t, divergence, coef=coef, **DIVERGENCES[divergence])
    goal = want(z, None, targets_of(3, 40), coef).grad
    assert relative_error(got, goal) < 2e-5
    assert not grad_of(backend, z, t, divergence, coef=coef * 0, **DIVERGENCES[divergence]).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_statistics_of_a_skipped_term(backend):
    z, targets = block(2, 40), targets_of(2, 40)
    stats = measured(BACKENDS[backend], z, None, targets, "none")
    fields(stats).entropy.fill_(torch.nan)
    coef = coefficients(2).clone()
    coef[C] = 0
    out = new_grad(2, 40, torch.float32)
    BACKENDS[backend].row_grad(z, None, targets, stats, coef, out, divergence="none")
    assert relative_error(out, want(z, None, targets, coef).grad) < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_column_below_fp32_counts_in_the_clip(backend):
    # p = exp(-110) is 0 in fp32, but q log(q/p) = 0.011 stays below the clip.
    z, t = block(1, 32), block(1, 32, seed=1)
    z.raw.fill_(-110.0)
    z.raw[0, 0] = 0.0
    t.raw.fill_(-9.2)
    t.raw[0, 1] = 0.0
    options = {"parameter": 0.5}
    coef = torch.tensor([[0.0], [1.0], [0.0]], device=DEVICE)
    got = grad_of(backend, z, t, "clipped_forward_kl", coef=coef, **options)
    goal = want(z, t, targets_of(1, 32), coef, divergence="clipped_forward_kl", **options).grad
    assert goal[0, 5] < -1e-5
    assert relative_error(got, goal) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_taken_out_get_no_gradient(backend):
    z, targets = block(2, 40, softcap=9.0, holes=True), targets_of(2, 40)
    z.raw[:, 3:6] = -torch.inf
    stats = measured(BACKENDS[backend], z, None, targets, "none")
    coef = coefficients(2)
    fields(stats).aux.fill_(0.3)
    fields(stats).log_sum_t.fill_(torch.inf)
    out = new_grad(2, 40, torch.float32)
    BACKENDS[backend].row_grad(z, None, targets, stats, coef, out, divergence="bucket")
    assert not out[:, 3:6][targets[:, None] != torch.arange(3, 6, device=DEVICE)].any()
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_the_bucket_gradient(name, backend):
    # p_v aux - q_v; the second row's q has the student's shape, 300 nats above it.
    z, targets = block(3, 77, holes=True, **TRANSFORMS[name]), targets_of(3, 77)
    coef = coefficients(3)
    stats = measured(BACKENDS[backend], z, None, targets, "none")
    aux, shift = torch.tensor([0.5, -2.0, 0.0]), torch.tensor([torch.inf, -2.0, 1.0])
    fields(stats).aux.copy_(aux)
    fields(stats).max_t.copy_(fields(stats).max_z)
    fields(stats).log_sum_t.copy_(fields(stats).log_sum_z + shift.to(DEVICE))
    out = new_grad(3, 77, torch.float32)
    BACKENDS[backend].row_grad(z, None, targets, stats, coef, out, divergence="bucket")
    raw = raw_of(z).requires_grad_()
    lp = transform(raw, z).log_softmax(-1)
    slope = (aux - (-shift).exp()).to(DEVICE)[:, None] * lp.detach().exp()
    slope = torch.autograd.grad(transform(raw, z), raw, slope)[0]
    goal = want(z, None, targets, coef).grad + coef[B].double()[:, None] * slope
    assert relative_error(out, goal) < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tail_below_fp32_gets_the_teachers_mass(backend):
    # p = e^-300 is 0 in fp32, but q is the teacher's 0.2 over the row's 31 tail columns.
    z = block(1, 32)
    z.raw.fill_(-300.0)
    z.raw[0, 0] = 0.0
    stats = measured(BACKENDS[backend], z, None, targets_of(1, 32), "none")
    at = fields(stats)
    at.max_t.fill_(-300.0)
    at.log_sum_t.fill_(math.log(31 / 0.2))
    coef = torch.tensor([[0.0], [1.0], [0.0]], device=DEVICE)
    out = new_grad(1, 32, torch.float32)
    BACKENDS[backend].row_grad(z, None, targets_of(1, 32), stats, coef, out, divergence="bucket")
    torch.testing.assert_close(out[0, 1:], torch.full((31,), -0.2 / 31, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cap", [None, 9.0])
def test_a_forbidden_target_gets_no_gradient(cap, backend):
    z, targets = block(2, 40, bias=True, softcap=cap), targets_of(2, 40)
    z.bias[targets] = -torch.inf
    out = grad_of(backend, z, None, "none")
    assert out.isfinite().all()
    assert not out[:, targets].any()


def test_repeating_gives_the_same_bits():
    z, t = block(4, 2500), block(4, 2500, seed=1)
    assert torch.equal(*(grad_of("triton", z, t, "jsd", parameter=0.3) for _ in range(2)))


def test_only_its_own_rows_are_written():
    z, targets = block(2, 40), targets_of(2, 40)
    stats = measured(kernels, z, None, targets, "none")
    buffer = torch.full((4, 48), 7.0, device=DEVICE)
    kernels.row_grad(z, None, targets, stats, coefficients(2), buffer[1:3, :40], divergence="none")
    assert (buffer[0] == 7).all() and (buffer[3] == 7).all()
    assert (buffer[1:3, :40] != 7).all()
