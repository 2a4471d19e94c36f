"""Block sizes from a byte budget, the device and the number of rows."""

import warnings

import pytest
import torch

from dgrpo.ops import gemm
from dgrpo.ops.plan import Plan, Workspace, make_plan

QWEN = {"columns": 152064, "width": 3584, "dtype": torch.bfloat16, "teacher_width": 5120}
GIB = 2**30


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


def test_products_that_fall_back_are_told():
    probe = gemm._writes_fp32.__wrapped__
    with pytest.warns(UserWarning, match=r"addmm\(out_dtype=torch.float32\) does not work.*fp32"):
        assert not probe("addmm", torch.device("meta"), torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not probe("mm", torch.device("cpu"), torch.bfloat16)  # a CPU never has them
