"""`row_stats` and `row_divergence` against fp64 formulas and against their twin in plain torch."""

import pytest
import torch

from dgrpo.ops import rows_torch
from dgrpo.testing import relative_error
from dgrpo_kernels import STATS, Logits
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
    new_stats,
    targets_of,
    want,
)

BACKENDS = {"triton": kernels, "torch": rows_torch}
NAMES = ("logprobs", "teacher_logprobs", "divergence", "entropy")


def check(backend, z, t, divergence="reverse_kl", most=1e-5, **options):
    targets = targets_of(*z.raw.shape)
    got = fields(measured(BACKENDS[backend], z, t, targets, divergence, **options))
    goal = want(z, t, targets, divergence=divergence, **options)
    for name in NAMES if t is not None else ("logprobs", "entropy"):
        value, wanted = getattr(got, name).double(), getattr(goal, name)
        scale = wanted.abs().amax().clamp(min=1)  # a KL of 0.1 is the difference of numbers near 1
        error = ((value - wanted).abs() / scale).max().item()
        assert error <= most, f"{name}: error {error:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("columns", SIZES)
def test_any_number_of_columns(columns, holes, backend):
    check(backend, block(3, columns, holes=holes), block(3, columns, seed=1, holes=holes))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_divergences_and_transforms(name, divergence, backend):
    z, t = block(3, 77, **TRANSFORMS[name]), block(3, 77, seed=1, **TRANSFORMS[name])
    check(backend, z, t._replace(temperature=1.3), divergence, **DIVERGENCES[divergence])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_teacher(backend):
    z = block(3, 2100)
    check(backend, z, None)
    stats = measured(BACKENDS[backend], z, None, targets_of(3, 2100), "none")
    assert not fields(stats).teacher_logprobs.any() and not fields(stats).divergence.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_a_rounded_policy(name, backend):
    z = block(3, 500, **TRANSFORMS[name])
    check(backend, z, block(3, 500, seed=1), round_policy=True)
    plain, coarse = (
        fields(measured(BACKENDS[backend], z, None, targets_of(3, 500), "none", round_policy=on))
        for on in (False, True)
    )
    assert (plain.logprobs != coarse.logprobs).any()
    assert torch.equal(plain.entropy, coarse.entropy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_a_near_equal_teacher_keeps_its_digits(divergence, backend):
    z = block(4, 3000)
    t, targets = near(z, 0.05), targets_of(4, 3000)
    got = fields(measured(BACKENDS[backend], z, t, targets, divergence, **DIVERGENCES[divergence]))
    goal = want(z, t, targets, divergence=divergence, **DIVERGENCES[divergence]).divergence
    assert goal.max() < 0.01
    assert relative_error(got.divergence, goal) < 5e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target", [-1, -100, 40, 2**40])
def test_a_target_outside_reads_what_it_is_told(target, backend):
    z, t, targets = block(3, 40), block(3, 40, seed=1), targets_of(3, 40)
    clean, stats = new_stats(3), new_stats(3)
    BACKENDS[backend].row_stats(z, t, targets, clean)
    targets = targets.clone()
    targets[1] = target
    BACKENDS[backend].row_stats(z, t, targets, stats, missing=-7.0)
    others = torch.tensor([0, 2], device=DEVICE)
    assert fields(stats).logprobs[1] == fields(stats).teacher_logprobs[1] == -7
    assert torch.equal(stats[:, others], clean[:, others])
    rest = [i for i in range(STATS) if i not in (4, 5)]
    assert torch.equal(stats[rest], clean[rest])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_whose_first_block_was_taken_out(backend):
    z = block(2, 2100, holes=True)
    z.raw[0, :2050] = -torch.inf  # all of the first 2048 columns
    z.raw[1] = -torch.inf  # all columns
    targets = torch.tensor([2060, 5], device=DEVICE)
    got = fields(measured(BACKENDS[backend], z, None, targets, "none"))
    left = z.raw[:1, 2050:].double().log_softmax(-1)
    assert got.logprobs[0].item() == pytest.approx(left[0, 10].item(), rel=1e-5)
    entropy = -(left.exp() * left).sum()
    assert got.entropy[0].item() == pytest.approx(entropy.item(), rel=1e-4)
    assert got.log_sum_z[1] == -torch.inf and got.entropy[1] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_that_excludes_columns(divergence, backend):
    z, t = block(3, 60), block(3, 60, seed=1, bias=True)
    t.bias[:20] = -torch.inf
    options = DIVERGENCES[divergence]
    stats = measured(BACKENDS[backend], z, t, targets_of(3, 60), divergence, **options)
    got = fields(stats)
    assert got.divergence.isfinite().all() and (got.divergence > 0).all()
    if divergence in ("forward_kl", "jsd"):  # finite without any floor
        held = t._replace(bias=t.bias.clamp(min=-1e4))
        goal = want(z, held, targets_of(3, 60), divergence=divergence, **options)
        assert relative_error(got.divergence, goal.divergence) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teacher_that_excludes_the_whole_first_block(backend):
    z, t = block(2, 2100), block(2, 2100, seed=1, bias=True)
    t.bias[:2050] = -torch.inf
    got = fields(measured(BACKENDS[backend], z, t, targets_of(2, 2100), "reverse_kl"))
    held = t._replace(bias=t.bias.clamp(min=-1e6))
    goal = want(z, held, targets_of(2, 2100)).divergence
    assert goal.max() > 1e5
    assert relative_error(got.divergence, goal) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("column", [3, 2060])
def test_a_student_that_excludes_what_the_teacher_says(column, backend):
    z, t = block(2, 2100, bias=True), block(2, 2100, seed=1)
    z.bias[column] = -torch.inf
    t.raw[0, column] = 20.0
    t.raw[1, column] = -200.0  # q is 0 in fp32: no part of the sum
    t.raw[:, 2070] = 5.0
    got = fields(measured(BACKENDS[backend], z, t, targets_of(2, 2100), "forward_kl"))
    held = z._replace(bias=z.bias.clamp(min=-100))
    goal = want(held, t, targets_of(2, 2100), divergence="forward_kl").divergence
    assert got.divergence[0] == torch.inf
    assert got.divergence[1].item() == pytest.approx(goal[1].item(), rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_neighbours_of_the_view_are_left_alone(backend):
    whole = torch.full((STATS, 9), 5.0, device=DEVICE)
    BACKENDS[backend].row_stats(block(3, 40), None, targets_of(3, 40), whole[:, 3:6])
    assert (whole[:, :3] == 5).all() and (whole[:, 6:] == 5).all()


@pytest.mark.parametrize("launch", ["z", "t"])
def test_a_block_of_narrow_rows_is_refused(launch):
    good, bad = block(2, 32), Logits(torch.zeros(2, 31, device=DEVICE))
    z, t = (bad, good) if launch == "z" else (good, bad)
    with pytest.raises(ValueError, match=rf"{launch}: got strides \(31, 1\), expected unit"):
        kernels.row_stats(z, t, targets_of(2, 31), new_stats(2))
