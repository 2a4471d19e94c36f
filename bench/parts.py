"""Where does one sweep spend its time, and how near is each part to its own floor?

Times each part alone, at the block sizes that the byte budget gives, and multiplies by how often a
sweep over N tokens runs it. A product's floor is the same product at M = 4096 with its output in
the operands' dtype and nothing added; a row kernel's is its bytes over the rate of a large copy.
The sum is then held against the step as it really runs.

    python -m bench.parts --budget 2048
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from bench import options
from bench.cases import Case, make_case
from bench.ceilings import burst_ms, copy_rate
from bench.harness import FLOOR_ROWS, gemms, time_once
from bench.ours import MIB, fused
from bench.report import console, percent, save
from bench.sizes import Shape, pair
from dgrpo.objectives import Context
from dgrpo.ops.gemm import accumulate, accumulator, grad_hidden, project, writes_fp32
from dgrpo.ops.plan import CPU_RIDGE, Plan, make_plan, padded, ridge_of
from dgrpo_kernels.rows import POLICY_INPUTS, POLICY_OUTPUTS, STATS, Logits, PolicyRows

SHAPES = {
    "tiny": (Shape("tiny", 64, 64, 96, 1000, "float32"), 1, 2**22),
    "cpu": (pair("qwen2.5", 1024, divide=8, dtype="float32"), 64, 2**28),
    "gpu": (pair("qwen2.5", 32768), 2048, 2**32),
}


class Part(NamedTuple):
    """A part of the sweep: one run of it, how often it runs, its floor over the whole sweep."""

    name: str
    run: Callable[[], object]
    calls: float
    floor_ms: float
    bound: str  # "compute" or "memory"


def plan_of(case: Case, budget: int) -> Plan:
    """The blocks that the op chooses for this case."""
    shape, device = case.shape, case.hidden.device
    gpu = device.type == "cuda"
    return make_plan(
        shape.tokens,
        shape.vocab,
        shape.hidden,
        dtype=case.hidden.dtype,
        teacher_width=shape.teacher_hidden,
        budget=budget,
        processors=torch.cuda.get_device_properties(0).multi_processor_count if gpu else 0,
        ridge=ridge_of(device) if gpu else CPU_RIDGE,
        lifts=not writes_fp32("mm", case.weight),
    )


def row_kernels(
    case: Case, z: Tensor, t: Tensor, grad: Tensor, *, triton: bool
) -> dict[str, Callable[[], object]]:
    """The row kernels on R rows: statistics, then the gradient (with triton, objective fused)."""
    rows, device = len(z), z.device
    targets = case.targets[:rows]
    stats = torch.zeros(STATS, rows, device=device)
    logits = Logits(z, holes=False), Logits(t, holes=False)
    coefficients, options = torch.full((3, rows), 1 / case.shape.tokens, device=device), {}
    if triton:
        import dgrpo_kernels.triton_rows as backend

        inputs = torch.zeros(POLICY_INPUTS, rows, device=device)
        inputs[0] = 1 / case.shape.tokens
        inputs[1], inputs[2] = case.advantages[:rows], case.old_logprobs[:rows]
        inputs[6] = case.teacher_coef
        outputs = torch.zeros(POLICY_OUTPUTS, rows, device=device)
        context = Context(inputs[1], inputs[0], inputs[2])
        coefficients, options = None, {"policy": PolicyRows(inputs, outputs, context)}
    else:
        import dgrpo.ops.rows_torch as backend

    found = {
        "row_stats": lambda: backend.row_stats(*logits, targets, stats),
        "row_grad": lambda: backend.row_grad(
            *logits, targets, stats, coefficients, grad, **options
        ),
    }
    if triton:  # both in one kernel: not part of the sum while the op does not use it
        found["row_fused"] = lambda: backend.row_fused(*logits, targets, stats, grad, **options)
    return found


@torch.no_grad()
def parts(case: Case, plan: Plan, copied: int, repeats: int) -> list[Part]:
    """Every part of the sweep over this case, ready to run; the logits blocks hold real logits."""
    shape, device = case.shape, case.hidden.device
    tokens, vocab = shape.tokens, shape.vocab
    weight, teacher_weight = case.weight.detach(), case.teacher_weight
    rows_each = plan.mean_rows
    z, t = (torch.empty(rows_each, padded(vocab), device=device)[:, :vocab] for _ in range(2))
    h, h_teacher = case.hidden.detach()[:rows_each], case.teacher_hidden[:rows_each]
    grad = torch.zeros(plan.grad_rows, padded(vocab), dtype=weight.dtype, device=device)[:, :vocab]
    wide = case.hidden.detach()[: plan.grad_rows]
    total = torch.zeros(vocab, shape.hidden, dtype=accumulator(weight.dtype), device=device)
    project(h, weight, z, plan.scratch)
    project(h_teacher, teacher_weight, t, plan.scratch)
    for start in range(0, plan.grad_rows, rows_each):
        # G holds real gradients: products of zeros run faster.
        part = grad[start : start + rows_each]
        rows = row_kernels(case, z[: len(part)], t[: len(part)], part, triton=z.is_cuda)
        for run in rows.values():
            run()

    scale = tokens / min(FLOOR_ROWS, tokens)
    floor = {name: scale * burst_ms(run, repeats=repeats) for name, run in gemms(case).items()}
    rate = copy_rate(copied, device, repeats) / 1e3  # bytes per millisecond
    many, few = tokens / rows_each, tokens / plan.grad_rows
    size = weight.dtype.itemsize
    products = {
        "z": (lambda: project(h, weight, z, plan.scratch), many),
        "t": (lambda: project(h_teacher, teacher_weight, t, plan.scratch), many),
        "dHidden": (lambda: grad_hidden(grad, weight, plan.scratch), few),
        "dW": (lambda: accumulate(total, grad, wide, plan.scratch), few),
    }
    read = {"row_stats": 8, "row_grad": 8 + size, "row_fused": 8 + size}  # bytes per logit
    every = tokens * vocab / rate
    return [
        *(Part(n, run, calls, floor[n], "compute") for n, (run, calls) in products.items()),
        *(Part(n, run, many, read[n] * every, "memory") for n, run in rows.items()),
    ]


def main(argv: list[str] | None = None) -> None:
    """Measure, print, save."""
    parser = options.parser(__doc__)
    parser.add_argument("--budget", type=int, help="MiB of transient memory")
    args = parser.parse_args(argv)
    shape, budget, copied = SHAPES[args.size]
    budget = (args.budget or budget) * MIB
    case = make_case(shape, options.device())
    plan = plan_of(case, budget)
    found = []
    for part in parts(case, plan, copied, args.repeats):
        each = burst_ms(part.run, repeats=args.repeats)
        found.append(
            {
                "part": part.name,
                "bound": part.bound,
                "calls": part.calls,
                "ms_each": each,
                "ms": each * part.calls,
                "floor_ms": part.floor_ms,
            }
        )
    step_ms = whole_step(case, budget, args.repeats)
    body = {
        "shape": str(shape),
        "budget": budget,
        "part_rows": plan.parts,
        "grad_rows": plan.grad_rows,
        "step_ms": step_ms,
        "rows": found,
    }
    save("parts", args.size, body)
    print_parts(shape, plan, found, step_ms)


def whole_step(case: Case, budget: int, repeats: int) -> float:
    """Median milliseconds of the fused op, forward and backward, on this case."""

    def step() -> None:
        case.zero_grad()
        fused(case, budget=budget).backward()

    step()
    return statistics.median(time_once(step) for _ in range(max(2, repeats)))


def print_parts(shape: Shape, plan: Plan, found: list[dict], step_ms: float) -> None:
    """The table, the sum, and what the sum leaves unexplained."""
    title = f"{shape}; M = {plan.grad_rows} rows of G, {plan.mean_rows} rows of logits on average"
    table = Table(title=title, title_justify="left", box=None)
    for heading in ("part", "bound by", "calls", "ms each", "ms", "floor ms", "of floor"):
        table.add_column(heading, justify="right")
    for row in found:
        table.add_row(
            row["part"],
            row["bound"],
            f"{row['calls']:.4g}",
            f"{row['ms_each']:.4g}",
            f"{row['ms']:.4g}",
            f"{row['floor_ms']:.4g}",
            percent(row["floor_ms"] / row["ms"]),
        )
    total = sum(row["ms"] for row in found if row["part"] != "row_fused")
    floor = sum(row["floor_ms"] for row in found if row["bound"] == "compute")
    table.add_section()
    table.add_row("sum", "", "", "", f"{total:.4g}", f"{floor:.4g}", percent(floor / total))
    table.add_row("step", "", "", "", f"{step_ms:.4g}", f"{floor:.4g}", percent(floor / step_ms))
    out = console()
    out.print(table)
    out.print("sum and step are held against the four products alone\n")


if __name__ == "__main__":
    main()
