"""The dGRPO objective in the prologue of `row_grad` against its plain twin."""

import pytest
import torch

from dgrpo.objectives import Context, dgrpo
from dgrpo.ops.steps import TokenStats
from dgrpo.testing import relative_error
from dgrpo_kernels import PolicyRows
from dgrpo_kernels import triton_rows as kernels
from tests.kernels.blocks import (
    DEVICE,
    block,
    fields,
    measured,
    new_grad,
    targets_of,
    want,
)

R, V = 8, 50
SWITCHES = {
    "on policy": {},
    "off policy": {"old": True},
    "dual clip": {"old": True, "clip_dual": 1.3},
    "uneven clip": {"old": True, "clip_low": 0.0, "clip_high": 0.6},
    "reference": {"old": True, "ref": True, "ref_coef": 0.4},
    "reference without coefficient": {"ref": True},
    "importance weights": {"old": True, "weights": True},
    "sampler": {"old": True, "sampler": True},
    "capped sampler": {"old": True, "sampler": True, "is_cap": 1.05},
    "entropy": {"entropy_coef": -0.2},
    "everything": {
        "old": True, "ref": True, "sampler": True, "is_cap": 1.1, "clip_dual": 1.2,
        "ref_coef": 0.3, "entropy_coef": 0.1,
    },
}  # fmt: skip


def draw(seed: int) -> torch.Tensor:
    return torch.randn(R, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def context_of(
    logprobs, *, old=False, ref=False, weights=False, sampler=False, **numbers
) -> Context:
    """Every kind of token: no weight, no advantage, no teacher, ratios in and out of the clip."""
    token_weights, advantages, gate = draw(1).abs(), draw(2), draw(3).abs()
    token_weights[0] = advantages[1] = gate[2] = 0
    behind = logprobs + 0.5 * draw(4)
    behind[3] -= 30  # beyond the clamp
    advantages[3] = -1
    return Context(
        advantages,
        token_weights,
        behind if old else None,
        logprobs + 0.3 * draw(5) if ref else None,
        draw(6).abs() if weights else None,
        logprobs + 0.2 * draw(7) if sampler else None,
        teacher_coef=gate,
        **numbers,
    )


def policy_rows(context: Context) -> PolicyRows:
    """The kernel's inputs as views of longer rows; what is absent is NaN, never to be read."""
    optional = (
        context.old_logprobs, context.ref_logprobs, context.policy_weights, context.sampler_logprobs
    )  # fmt: skip
    inputs = torch.full((7, R + 3), torch.nan, device=DEVICE)[:, 2 : 2 + R]
    rows = (context.token_weights, context.advantages, *optional, context.teacher_coef)
    for row, value in zip(inputs, rows, strict=True):
        if value is not None:
            row.copy_(value)
    outputs = torch.full((7, R + 3), torch.nan, device=DEVICE)[:, 1 : 1 + R]
    return PolicyRows(inputs, outputs, context)


def run(context_options, dtype=torch.float32, spoil=None, teacher=True):
    """Outputs and gradient of the kernel, and the statistics that it read."""
    z, t, targets = block(R, V), block(R, V, seed=1), targets_of(R, V)
    divergence = "reverse_kl" if teacher else "none"
    stats = measured(kernels, z, t if teacher else None, targets, divergence)
    context = context_of(fields(stats).logprobs, **context_options)
    if spoil is not None:
        spoil(context, fields(stats))
    rows, grad = policy_rows(context), new_grad(R, V, dtype)
    kernels.row_grad(
        z, t if teacher else None, targets, stats, None, grad, policy=rows, divergence=divergence
    )
    return rows.outputs, grad, stats, context


def plain(stats, context):
    """Losses, metrics and (a, b, c) of the plain objective."""
    values = fields(stats)
    leaves = [
        x.double().requires_grad_() for x in (values.logprobs, values.divergence, values.entropy)
    ]
    losses, metrics = dgrpo(TokenStats(*leaves, values.teacher_logprobs), context)
    grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    coef = [torch.zeros_like(leaves[0]) if g is None else g for g in grads]
    return losses.detach(), metrics, torch.stack(coef)


@pytest.mark.parametrize("name", SWITCHES)
def test_it_equals_the_plain_objective(name):
    outputs, grad, stats, context = run(SWITCHES[name])
    losses, metrics, coef = plain(stats, context)
    torch.testing.assert_close(outputs[0].double(), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs[1].double(), metrics["ratio"].double(), rtol=1e-5, atol=1e-6)
    assert torch.equal(outputs[2].bool(), metrics["clipped"])
    assert torch.equal(outputs[3].bool(), metrics["clamped"])
    torch.testing.assert_close(outputs[4:].double(), coef, rtol=1e-5, atol=1e-6)
    goal = want(block(R, V), block(R, V, seed=1), targets_of(R, V), coef).grad
    assert relative_error(grad, goal) < 2e-5


@pytest.mark.parametrize("name", ["off policy", "everything"])
def test_its_coefficients_from_outside_give_the_same_bits(name):
    outputs, fused, stats, _ = run(SWITCHES[name], torch.float16)
    again = new_grad(R, V, torch.float16)
    kernels.row_grad(block(R, V), block(R, V, seed=1), targets_of(R, V), stats, outputs[4:7], again)
    assert torch.equal(fused, again)


def test_the_plain_objective_has_every_kind_of_token():
    _, _, stats, context = run(SWITCHES["off policy"])
    _, metrics, _ = plain(stats, context)
    assert metrics["clipped"].any() and not metrics["clipped"].all()
    assert metrics["clamped"].any() and not metrics["clamped"].all()


def test_without_a_teacher():
    outputs, grad, stats, context = run({"old": True}, teacher=False)
    losses, _, coef = plain(stats, context)
    torch.testing.assert_close(outputs[0].double(), losses, rtol=1e-5, atol=1e-6)
    goal = want(block(R, V), None, targets_of(R, V), coef).grad
    assert relative_error(grad, goal) < 2e-5


def test_zero_coefficients_skip_what_is_not_finite():
    def spoil(context, stats):
        stats.divergence[2] = torch.nan  # teacher_coef 0
        context.old_logprobs[1] = -torch.inf  # advantage 0
        context.old_logprobs[0] = torch.nan  # token weight 0

    outputs, grad, _, _ = run({"old": True}, spoil=spoil)
    assert outputs[0].isfinite().all() and grad.isfinite().all()
    assert not grad[0].any() and outputs[0, 0] == 0


def test_an_undefined_log_probability_shows_in_the_loss():
    def spoil(context, stats):
        stats.logprobs[:2] = torch.nan  # also where the weight or the advantage is 0

    outputs, *_ = run({"old": True}, spoil=spoil)
    assert outputs[0, :2].isnan().all() and outputs[0, 2:].isfinite().all()


@pytest.mark.parametrize("old", [True, False])
def test_a_token_that_the_student_forbids(old):
    def spoil(context, stats):
        stats.logprobs[2:5] = -torch.inf
        if old:
            context.old_logprobs[2] = -torch.inf  # as when the same bias forbade it then

    outputs, _, stats, context = run({"old": old}, spoil=spoil)
    losses, metrics, coef = plain(stats, context)
    torch.testing.assert_close(outputs[0].double(), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs[4:].double(), coef, rtol=1e-5, atol=1e-6)
    assert torch.equal(outputs[3].bool(), metrics["clamped"])
    assert outputs[:, 2:5].isfinite().all() and not outputs[4, 2:5].any()
    assert outputs[1, 2] == 1
