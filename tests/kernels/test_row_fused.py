"""`row_fused` against `row_stats` and `row_grad`. Interpreted, one program has the whole row."""

import pytest
import torch

from dgrpo.testing import relative_error
from dgrpo_kernels import triton_rows as kernels
from tests.kernels.blocks import DEVICE, block, fields, near, new_grad, new_stats, targets_of
from tests.kernels.test_dgrpo_row import SWITCHES, R, context_of, policy_rows

OUTSIDE, SILENT = 5, 6  # rows: a target outside the vocabulary, a teacher that is skipped


def both(columns, teacher=True, switches="everything", dtype=torch.float32, **transform):
    """(statistics, policy outputs, gradient) of the two kernels, then of the one."""
    z = block(R, columns, **transform)
    t = near(z, 0.3) if teacher else None
    targets = targets_of(R, columns).clone()
    targets[OUTSIDE] = -1
    if teacher:
        t.raw[SILENT] = torch.nan
    found = []
    for fused in (False, True):
        stats, grad = new_stats(R), new_grad(R, columns, dtype)
        divergence = "reverse_kl" if teacher else "none"
        kernels.row_stats(z, t, targets, stats, divergence=divergence)
        context = context_of(fields(stats).logprobs.nan_to_num(-3.0), **SWITCHES[switches])
        context.teacher_coef[SILENT] = 0
        policy = policy_rows(context)
        if fused:
            stats = new_stats(R)
            kernels.row_fused(z, t, targets, stats, grad, policy=policy)
        else:
            kernels.row_grad(z, t, targets, stats, None, grad, policy=policy, divergence=divergence)
        found.append((stats, policy.outputs, grad))
    return found


def same(columns, **options):
    for two, one in zip(*both(columns, **options), strict=True):
        assert torch.equal(two.isnan(), one.isnan())
        if DEVICE == "cpu":
            assert torch.equal(two.nan_to_num(0), one.nan_to_num(0))
        else:  # several programs merge their sums in another order
            assert relative_error(one.nan_to_num(0), two.nan_to_num(0).double()) < 1e-5


@pytest.mark.parametrize("columns", [1, 33, 2048, 5003, 8192, 9001])
@pytest.mark.parametrize("teacher", [True, False])
def test_any_number_of_columns(teacher, columns):
    same(columns, teacher=teacher)


@pytest.mark.parametrize("switches", SWITCHES)
def test_the_objectives_inputs(switches):
    same(77, switches=switches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_a_scale(dtype):
    same(501, dtype=dtype, scale=0.7, temperature=1.3)


def test_what_it_takes():
    z, bent, holes = block(1, 20), block(1, 20, softcap=9.0), block(1, 20, holes=True)
    assert kernels.takes(z, z, "reverse_kl", False) and kernels.takes(z, None, "none", False)
    assert not kernels.takes(bent, z, "reverse_kl", False)
    assert not kernels.takes(z, holes, "reverse_kl", False)
    assert not kernels.takes(z, z, "jsd", False)
    assert not kernels.takes(z, z, "reverse_kl", True)
