"""What does a shape cost on paper? Products, memory traffic and bytes, from two stated ceilings.

Everything printed is computed, but for ceilings and times that come from a measurement on this
kind of GPU (`bench/results`), which are marked so. The products and the row kernels are counted one
after the other: only overlap, or second reads from the cache, can go below their sum. The estimate
below them adds what products of these blocks and the row kernels' machine code cost beyond that.

    python -m bench.roofline --gpu h200 --student qwen3-8b --teacher qwen3-32b --tokens 131072
"""

from __future__ import annotations

import argparse
import json
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from bench.estimate import blocks_of, estimate
from bench.gpus import GPUS, Ceilings
from bench.loops import TOKENS, VOCAB, computed
from bench.ours import MIB
from bench.report import console, human, output_folder
from bench.sizes import MODELS, Shape, heads
from dgrpo.ops.plan import Plan, make_plan


class Cost(NamedTuple):
    """One line: operations, bytes, milliseconds at the ceiling."""

    name: str
    flops: float
    moved: float
    ms: float


class Roofline(NamedTuple):
    """The costs of one step on one GPU."""

    products: list[Cost]  # the four GEMMs
    rows: list[Cost]  # the row kernels and the sums of dW
    plan: Plan

    def ms(self, of: list[Cost]) -> float:
        """Milliseconds of some of the lines, one after the other."""
        return sum(cost.ms for cost in of)

    @property
    def share(self) -> float:
        """The share of the floor that a sweep without overlap can reach."""
        floor = self.ms(self.products)
        return floor / (floor + self.ms(self.rows))


def roofline(shape: Shape, gpu: Ceilings, budget: int) -> Roofline:
    """Costs of one fused forward and backward of `shape` with `budget` bytes of workspace."""
    n, v, width, teacher = shape.tokens, shape.vocab, shape.hidden, shape.teacher_hidden
    plan = make_plan(
        n,
        v,
        width,
        dtype=torch.bfloat16,
        teacher_width=teacher,
        budget=budget,
        processors=gpu.processors,
        ridge=gpu.flops / gpu.bandwidth,
    )

    def product(name: str, depth: int) -> Cost:
        flops = 2.0 * n * v * depth
        return Cost(name, flops, 0.0, 1e3 * flops / gpu.flops)

    def traffic(name: str, moved: float) -> Cost:
        return Cost(name, 0.0, moved, 1e3 * moved / gpu.bandwidth)

    sums = -(-n // plan.grad_rows)
    return Roofline(
        [
            product("z = h W^T", width),
            product("t = hT WT^T", teacher),
            product("dHidden = G W", width),
            product("dW += G^T h", width),
        ],
        [
            traffic("row_stats: read z, t (fp32)", 8.0 * n * v),
            traffic("row_grad: read z, t, write G (bf16)", 10.0 * n * v),
            traffic(f"dW: {sums} times read and written (fp32)", 8.0 * sums * v * width),
        ],
        plan,
    )


def memory(shape: Shape, budget: int) -> dict[str, float]:
    """Bytes beyond inputs and gradients: ours as promised, and what whole logits need at least."""
    n, v, width = shape.tokens, shape.vocab, shape.hidden
    ours = {
        "workspace (the byte budget)": budget,
        "dW in fp32": 4 * v * width,
        "one scaled copy of the gradients in backward (bf16)": 2 * (n + v) * width,
    }
    whole = {"whole logits: log-probabilities of both models, fp32": 8 * n * v}
    return {**ours, "ours, together": sum(ours.values()), **whole}


def print_estimate(shape: Shape, gpu: Ceilings, plan: Plan, out: Console) -> None:
    """What the step should take with these blocks and the machine code of the row kernels."""
    kernels, note = {}, "row kernels bound by HBM alone"
    try:
        found = computed(gpu.target)
        kernels = {name.split("-")[0]: figures for (name, _), figures in found.items()}
        note = "row kernels counted in their machine code"
    except RuntimeError as error:
        note += f" ({error})"
    guess = estimate(shape, gpu, blocks_of(plan), kernels)
    share = f"{100 * guess.share:.0f} % of the floor"
    out.print(f"estimate, computed, {note}: {guess.ms:.0f} ms, {share}")
    parts = (f"{name} {ms:.1f}" for name, ms in guess._asdict().items() if name != "floor")
    out.print(f"  {', '.join(parts)}")
    for name, one in kernels.items():
        read = 1e3 * one.bytes_per_column * TOKENS * VOCAB / gpu.bandwidth
        out.print(
            f"  {name}: {one.instructions:.0f} instructions per 8 columns, {one.in_flight} loads "
            f"in flight; at N = {TOKENS}, V = {VOCAB} issue allows {one.issue_ms:.1f} ms, "
            f"MUFU {one.mufu_ms:.1f}, HBM {read:.1f}"
        )
    out.print()


def measured_ceilings(gpu: str) -> Ceilings | None:
    """The ceilings that `bench.ceilings` found on this kind of GPU, if it was run there."""
    report = _load("ceilings-gpu.json", gpu)
    best = max((row.get("tflops", 0.0) for row in report.get("rows", [])), default=0.0)
    if not best:
        return None
    rate = report["copy_bytes_per_s"]
    processors = report["machine"]["gpu"]["multiprocessors"]
    return GPUS[gpu]._replace(
        flops=best * 1e12,
        bandwidth=rate,
        processors=processors,
        source="measured by bench.ceilings",
    )


def measured_step(gpu: str, shape: Shape) -> dict | None:
    """The fastest of our rows of `bench.loss_speed` for this shape on this kind of GPU, if any."""
    report = _load("loss_speed-gpu.json", gpu)
    here = [
        row
        for row in report.get("rows", [])
        if row["shape"] == shape.name
        and row["tokens"] == shape.tokens
        and row["ours"]
        and row["ms"]
        and row["terms"] == "policy+kl"
    ]
    return min(here, key=lambda row: row["ms"], default=None)


def _load(name: str, gpu: str) -> dict:
    path = output_folder() / name
    report = json.loads(path.read_text()) if path.exists() else {}
    found = report.get("machine", {}).get("gpu", {}).get("name", "")
    return report if gpu.lower() in found.lower() and found else {}


def main(argv: list[str] | None = None) -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--student", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--teacher", choices=MODELS, default="qwen3-32b")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--budget", type=int, default=1024, help="MiB of workspace")
    args = parser.parse_args(argv)
    shape = heads(args.student, args.teacher, args.tokens)
    ceilings = measured_ceilings(args.gpu) or GPUS[args.gpu]
    budget = args.budget * MIB
    found = roofline(shape, ceilings, budget)
    out = console()
    out.print(f"[bold]{shape}[/bold] on {args.gpu}, {args.budget} MiB of workspace")
    out.print(
        f"ceilings ({ceilings.source}): {ceilings.flops / 1e12:.0f} TFLOP/s, "
        f"{ceilings.bandwidth / 1e12:.2f} TB/s"
    )
    parts = " + ".join(map(str, found.plan.parts))
    out.print(f"blocks: {found.plan.grad_rows} rows of G, in parts of {parts} rows of logits\n")
    table = Table(title="time, computed", title_justify="left", box=None)
    for heading in ("part", "TFLOP", "bytes moved", "ms"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for cost in found.products + found.rows:
        flops = f"{cost.flops / 1e12:.4g}" if cost.flops else ""
        table.add_row(cost.name, flops, human(cost.moved or None), f"{cost.ms:.1f}")
    floor, rest = found.ms(found.products), found.ms(found.rows)
    table.add_section()
    table.add_row("floor: the four products", "", "", f"{floor:.1f}")
    table.add_row("step, nothing overlapped", "", "", f"{floor + rest:.1f}")
    z, t, d_hidden, d_weight = (cost.ms for cost in found.products)
    separate = 4 * z + 2 * (t + d_hidden + d_weight)
    table.add_row("separate log-probability and KL kernels, 10 products", "", "", f"{separate:.1f}")
    out.print(table)
    out.print(f"share of the floor without overlap: at most {100 * found.share:.0f} %\n")
    print_estimate(shape, ceilings, found.plan, out)
    table = Table(
        title="bytes beyond inputs and gradients, computed", title_justify="left", box=None
    )
    table.add_column("what")
    table.add_column("bytes", justify="right")
    for name, count in memory(shape, budget).items():
        table.add_row(name, human(count))
    out.print(table)
    step = measured_step(args.gpu, shape)
    if step is None:
        out.print("\nmeasured: nothing for this shape on this GPU in the results")
    else:
        out.print(
            f"\nmeasured ({step['provider']}): {step['ms']:.1f} ms, "
            f"{100 * step['floor_share']:.0f} % of the floor of its own run, "
            f"peak {human(step['peak_bytes'])}"
        )


if __name__ == "__main__":
    main()
