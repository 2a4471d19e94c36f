"""What should each shape cost on a GPU, and what should each change give? Markdown for the docs.

    python -m bench.costs

Computed (`bench.estimate`), but for the column "measured", which takes what `bench.loss_speed`
saved on this kind of GPU.
"""

from __future__ import annotations

from bench.estimate import Estimate, blocks_of, estimate
from bench.gpus import GPUS
from bench.loops import Figures, computed
from bench.loss_speed import SHAPES
from bench.ours import MIB
from bench.roofline import measured_step, roofline
from bench.sizes import Shape, pair

BUDGETS = (1024, 2048)  # MiB
CARDS = ("h200", "h100")
CONTRACT = pair("qwen2.5", 32768)


def plain_kernels(target: str) -> dict[str, Figures]:
    """The row kernels of the plain path, counted in the machine code of today."""
    found = computed(target)
    return {name: found[f"{name}-plain", target] for name in ("row_stats", "row_grad")}


def of_now(shape: Shape, gpu: str, budget: int, kernels: dict[str, Figures] | None) -> Estimate:
    """The estimate with the plan of today."""
    plan = roofline(shape, GPUS[gpu], budget * MIB).plan
    return estimate(shape, GPUS[gpu], blocks_of(plan), kernels)


def changes(gpu: str, budget: int, kernels: dict[str, Figures]) -> dict[str, Estimate]:
    """The contract's shape as it is, then with one change after the other."""
    card = GPUS[gpu]
    plan = roofline(CONTRACT, card, budget * MIB).plan
    blocks = blocks_of(plan)
    return {
        "as it is": estimate(CONTRACT, card, blocks, kernels),
        "row kernels bound by HBM alone": estimate(CONTRACT, card, blocks),
        "and the second read from L2": estimate(CONTRACT, card, blocks, second_read_in_l2=True),
    }


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shape_rows(kernels: dict[str, Figures]) -> list[list[str]]:
    """Floor, estimate and measurement of every shape that `bench/gpu.sh` measures."""
    found = []
    for gpu in CARDS:
        for shape in SHAPES["gpu"]:
            guesses = [of_now(shape, gpu, budget, kernels) for budget in BUDGETS]
            step = measured_step(gpu, shape)
            found.append(
                [
                    gpu.upper(),
                    f"{shape.name}, N = {shape.tokens}",
                    f"{guesses[0].floor:.0f}",
                    *(f"{guess.ms:.0f} ({100 * guess.share:.0f} %)" for guess in guesses),
                    f"{step['ms']:.0f} ({100 * step['floor_share']:.0f} %)" if step else "not yet",
                ]
            )
    return found


def change_rows(kernels: dict[str, Figures]) -> list[list[str]]:
    """The estimates of `changes`, a column per GPU and budget."""
    cells: dict[str, list[str]] = {}
    for gpu in CARDS:
        for budget in BUDGETS:
            for name, guess in changes(gpu, budget, kernels).items():
                cells.setdefault(name, []).append(f"{guess.ms:.0f} ({100 * guess.share:.0f} %)")
    return [[name, *values] for name, values in cells.items()]


def main() -> None:
    """Compile the plain row kernels, print both tables."""
    kernels = plain_kernels("sm_90")
    budgets = [f"{budget // 1024} GiB" for budget in BUDGETS]
    headings = ["GPU", "shape", "floor", *(f"estimate, {name}" for name in budgets), "measured"]
    print("Computed, ms and share of the floor\n")
    print(table(headings, shape_rows(kernels)))
    print(f"\nComputed, {CONTRACT}\n")
    print(table(["", *(f"{c.upper()}, {b}" for c in CARDS for b in budgets)], change_rows(kernels)))


if __name__ == "__main__":
    main()
