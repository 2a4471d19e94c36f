"""The sweep: block sizes from a byte budget, counted matrix products, invariance, repeatability."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dgrpo
from dgrpo.ops.gemm import accumulate, accumulate_bias, grad_hidden, project
from dgrpo.ops.plan import Workspace
from dgrpo.testing import relative_error
from tests.ops.cases import DIVERGENCES, TEACHERS, case_of, fp64, gradients, teacher_of


class Apart(Workspace):
    """Logits in buffers of their own."""

    def logits(self, part):
        return [x.new_empty(len(x), x.stride(0))[:, : x.shape[1]] for x in super().logits(part)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["full", "topk"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_in_the_rows_of_g_change_no_bit(dtype, kind, backend, monkeypatch):
    case = case_of(14, dtype=dtype)
    options = {"memory_budget": 3500 * dtype.itemsize, "backend": backend}
    runs = []
    for space in (Workspace, Apart):
        monkeypatch.setattr("dgrpo.ops.sweep.Workspace", space)
        runs.append(run("plain", case, teacher=teacher_of(kind, case), **options))
    assert all(map(torch.equal, *runs))


# invariance


def run(op, case, **options):
    """Loss and gradients of one op."""
    inputs = (case.hidden, case.weight, case.targets)
    if op == "fused":
        out = dgrpo.linear_dgrpo_loss(*inputs, case.advantages, **options)
        loss = out.loss
    elif op == "plain":
        loss = dgrpo.linear_loss(
            *inputs, lambda s, rows: s.divergence * s.logprobs - s.entropy, **options
        ).loss
    else:
        stats = dgrpo.linear_token_stats(*inputs, **options)
        loss = (stats.divergence * stats.logprobs - stats.entropy).sum()
    return [loss.detach(), *gradients(loss, case.hidden, case.weight)]


@pytest.mark.parametrize("op", ["fused", "plain", "stats"])
@pytest.mark.parametrize("kind", TEACHERS)
def test_block_sizes_change_nothing(kind, op):
    case = fp64(case_of(40))
    teacher = teacher_of(kind, case)
    whole = run(op, case, teacher=teacher)
    for budget in (1, 3000, 20000, 50000):
        for got, want in zip(
            run(op, case, teacher=teacher, memory_budget=budget), whole, strict=True
        ):
            assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("op", ["fused", "plain", "stats"])
def test_repeating_gives_the_same_bits(op, dtype):
    case = case_of(dtype=dtype)
    options = {"teacher": teacher_of("full", case), "memory_budget": 20000}
    assert all(map(torch.equal, run(op, case, **options), run(op, case, **options)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_padding_of_the_rows_is_never_used(backend, monkeypatch):
    case = case_of(8, 33)
    options = {"teacher": teacher_of("topk", case), "backend": backend}
    clean = run("stats", case, **options)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: dirty(empty(*a, **k)))
    assert all(map(torch.equal, clean, run("stats", case, **options)))


def dirty(values):
    return values.fill_(float("nan")) if values.is_floating_point() else values


# matrix products

N, V, H, HT = 48, 101, 16, 12
Z, T = 2 * N * V * H, 2 * N * V * HT


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def train(case, **options):
    """A forward and a backward pass of the fused loss."""
    out = dgrpo.linear_dgrpo_loss(
        case.hidden, case.weight, case.targets, case.advantages, **options
    )
    if out.loss.requires_grad:
        out.loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [2**30, 30000])
class TestProducts:
    def case(self, dtype, masked=0.0):
        case = case_of(N, V, dtype=dtype, masked=masked)
        return case, teacher_of("full", case)

    def test_four_with_a_teacher(self, dtype, budget):
        case, teacher = self.case(dtype)
        got = flops(lambda: train(case, teacher=teacher, memory_budget=budget))
        assert got == 3 * Z + T

    def test_three_without_a_teacher(self, dtype, budget):
        case, _ = self.case(dtype)
        assert flops(lambda: train(case, memory_budget=budget)) == 3 * Z

    def test_three_with_a_frozen_head(self, dtype, budget):
        case, teacher = self.case(dtype)
        case.weight.requires_grad_(False)
        assert flops(lambda: train(case, teacher=teacher, memory_budget=budget)) == 2 * Z + T

    def test_three_with_frozen_states(self, dtype, budget):
        case, teacher = self.case(dtype)
        case.hidden.requires_grad_(False)
        assert flops(lambda: train(case, teacher=teacher, memory_budget=budget)) == 2 * Z + T

    def test_two_without_a_teacher_and_with_a_frozen_head(self, dtype, budget):
        case, _ = self.case(dtype)
        case.weight.requires_grad_(False)
        assert flops(lambda: train(case, memory_budget=budget)) == 2 * Z

    def test_two_without_gradient(self, dtype, budget):
        case, teacher = self.case(dtype)
        with torch.no_grad():
            assert flops(lambda: train(case, teacher=teacher, memory_budget=budget)) == Z + T
            assert flops(lambda: train(case, memory_budget=budget)) == Z
        scored = flops(
            lambda: dgrpo.linear_logprobs(
                case.hidden, case.weight, case.targets, memory_budget=budget
            )
        )
        assert scored == Z

    def test_six_when_recomputing(self, dtype, budget):
        case, teacher = self.case(dtype)
        loss = []
        inputs = (case.hidden, case.weight, case.targets, teacher)
        forward = flops(
            lambda: loss.append(dgrpo.linear_token_stats(*inputs, memory_budget=budget)[1].sum())
        )
        assert forward == Z + T
        assert flops(loss[0].backward) == 3 * Z + T

    def test_masked_tokens_are_free(self, dtype, budget):
        case, teacher = self.case(dtype, masked=0.6)
        left = int((case.targets != -100).sum())
        assert 0 < left < N
        got = flops(lambda: train(case, teacher=teacher, memory_budget=budget))
        assert got == (3 * Z + T) * left // N

    def test_any_objective_costs_the_same(self, dtype, budget):
        case, teacher = self.case(dtype)

        def step():
            dgrpo.linear_loss(
                case.hidden, case.weight, case.targets, lambda s, rows: s.divergence,
                teacher=teacher, memory_budget=budget, **DIVERGENCES["jsd"],
            ).loss.backward()  # fmt: skip

        assert flops(step) == 3 * Z + T

    def test_a_truncated_vocabulary_is_not_multiplied(self, dtype, budget):
        case, teacher = self.case(dtype)
        case.targets.clamp_(max=89)
        got = flops(lambda: train(case, teacher=teacher, vocab_size=90, memory_budget=budget))
        assert got == (3 * Z + T) * 90 // V


# the products themselves


@pytest.mark.parametrize("scratch", [1, 10**4, 10**9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_products_are_exact_in_fp32(dtype, scratch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, grad = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((9, 16), (150, 16), (9, 150))
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total, bias = torch.ones(150, 16, dtype=wide), torch.ones(150, dtype=wide)
    logits = torch.full((9, 160), torch.nan, dtype=wide)
    project(hidden, weight, logits[:, :150], scratch)
    accumulate(total, grad, hidden, scratch)
    accumulate_bias(bias, grad, scratch)
    h, w, g = hidden.double(), weight.double(), grad.double()
    for got, want in [
        (logits[:, :150], h @ w.T),
        (grad_hidden(grad, weight, scratch), g @ w),
        (total, 1 + g.T @ h),
        (bias, 1 + g.sum(0)),
    ]:
        assert got.dtype == wide
        assert relative_error(got, want) < 1e-6
    assert logits[:, 150:].isnan().all()
