"""The sweep: block sizes from a byte budget, counted matrix products, invariance, repeatability."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dgrpo
from dgrpo.ops.gemm import accumulate, accumulate_bias, grad_hidden, project
from dgrpo.ops.plan import Plan, Workspace, make_plan
from dgrpo.testing import relative_error
from tests.ops.cases import DIVERGENCES, TEACHERS, case_of, fp64, gradients, teacher_of

QWEN = {"columns": 152064, "width": 3584, "dtype": torch.bfloat16, "teacher_width": 5120}
GIB = 2**30

# plan


@pytest.mark.parametrize(
    "budget, ridge, parts",
    [
        (GIB, 184, (640, 512, 416, 352, 256, 128)),
        (GIB, 263, (640, 512, 416, 352, 256)),
        (2 * GIB, 184, (1312, 1056, 832, 672, 544, 320)),
    ],
    ids=["H200, 1 GiB", "H100, 1 GiB", "H200, 2 GiB"],
)
def test_sizes_at_the_design_point(budget, ridge, parts):
    assert make_plan(32768, **QWEN, budget=budget, processors=132, ridge=ridge).parts == parts


def transient(plan: Plan, columns, width, dtype, teacher_width=None, lifts=False) -> int:
    """Bytes that the sweep holds beside inputs and gradients, counted from its buffers."""
    size, wide = dtype.itemsize, max(dtype.itemsize, 4)
    weight = torch.empty(0, dtype=dtype, device="meta")
    space = Workspace(plan, columns, weight, teacher=teacher_width is not None, gradients=True)
    teacher = max(plan.parts) * (teacher_width or 0) * (size + 4 * lifts)
    states = plan.grad_rows * width * (size + wide + 4 * lifts)  # gathered, and dHidden
    return space.buffer.numel() + teacher + states + plan.scratch


SHAPES = {
    "qwen2.5 7b/32b": QWEN,
    "no teacher": {**QWEN, "teacher_width": None},
    "gemma": {"columns": 262144, "width": 2560, "dtype": torch.bfloat16, "teacher_width": 5376},
    "fp32": {"columns": 50257, "width": 768, "dtype": torch.float32, "teacher_width": 1024},
    "fp64": {"columns": 1003, "width": 64, "dtype": torch.float64},
    "lifted": {**QWEN, "lifts": True},
    "wide and short": {"columns": 64, "width": 8192, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("processors", [0, 132])
@pytest.mark.parametrize("budget", [2**26, 2**28, GIB, 2 * GIB])
@pytest.mark.parametrize("name", SHAPES)
def test_the_budget_is_kept_and_used(name, budget, processors):
    shape = SHAPES[name]
    plan = make_plan(10**6, **shape, budget=budget, processors=processors, ridge=184)
    used = transient(plan, **shape)
    least = Plan(10**6, (1,), plan.scratch)
    assert used <= max(budget, transient(least, **shape))
    assert max(plan.parts) >= 4096 or used >= 0.45 * budget


def test_a_large_vocabulary_has_parts_that_no_product_waits_for():
    plan = make_plan(32768, **SHAPES["gemma"], budget=GIB, processors=132, ridge=263)
    assert plan.mean_rows >= 256


@pytest.mark.parametrize("budget", [GIB, 2 * GIB])
def test_the_count_of_rows_evens_the_blocks_out(budget):
    def rows_of(count):
        plan = make_plan(count, **QWEN, budget=budget, processors=132, ridge=184)
        return [block.stop - block.start for block, _ in plan.blocks()]

    most = max(rows_of(10**6))
    for count in (most + 256, 2 * most + 128):
        blocks = rows_of(count)
        assert blocks[-1] > 0.4 * blocks[0], blocks  # not 128 rows with a dW of their own


def test_memory_does_not_follow_the_number_of_tokens():
    few, many = (make_plan(n, **QWEN, processors=132, ridge=184) for n in (8192, 10**7))
    assert transient(few, **QWEN) <= GIB and transient(many, **QWEN) <= GIB
    assert make_plan(1, **QWEN, processors=132).parts == (1,)


def test_planning_is_quick_at_every_count():
    shapes = [make_plan(count, **QWEN, processors=132, ridge=184) for count in range(1, 9000, 7)]
    assert len({plan.parts for plan in shapes}) > 100  # the sizes do follow the count


@pytest.mark.parametrize("count", [0, 1, 7, 64, 65, 1000])
def test_blocks_cover_all_rows_once(count):
    plan = Plan(count, (5, 4, 3), 0)
    blocks = list(plan.blocks())
    rows = [row for _, parts in blocks for part in parts for row in range(part.start, part.stop)]
    assert rows == list(range(count))
    assert all(b.stop - b.start <= 12 for b, _ in blocks)
    assert all(p.stop - p.start <= 5 and p.stop > p.start for _, parts in blocks for p in parts)


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
