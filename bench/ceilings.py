"""What can this machine do at best? The two ceilings that everything else is held against.

A large copy gives the memory's ceiling. Matrix products of the sizes of the sweep give the
arithmetic's: bf16 operands with bf16 and with fp32 output, for M rows at a time, the last one also
added to an fp32 sum, as the sweep adds up dW.

    python -m bench.ceilings
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.table import Table

from bench import options
from bench.harness import synchronize, time_once
from bench.report import console, save
from bench.resume import UNFINISHED, saved
from bench.sizes import Shape, pair

SHAPES = {
    "tiny": (Shape("tiny", 64, 64, 96, 1000, "float32"), (32, 64), 2**22),
    "cpu": (pair("qwen2.5", 1024, divide=8, dtype="float32"), (256, 512, 1024), 2**28),
    "gpu": (pair("qwen2.5", 4096), (256, 512, 1024, 2048, 3072, 3584, 4096), 2**32),
}


class Product(NamedTuple):
    """A matrix product and what one run of it costs."""

    name: str
    rows: int
    output: str
    flops: float
    run: Callable[[], object]


def burst_ms(run: Callable[[], object], *, repeats: int = 5, milliseconds: float = 20) -> float:
    """Median milliseconds of one run, in bursts long enough that launches do not count."""
    run()
    synchronize()
    count = max(1, min(50, int(milliseconds / max(time_once(run), 1e-3))))
    return statistics.median(
        time_once(lambda: [run() for _ in range(count)]) / count for _ in range(repeats)
    )


def copy_rate(count: int, device: torch.device, repeats: int = 5) -> float:
    """Bytes per second of a copy of `count` bytes, those read plus those written."""
    source = torch.randn(count // 4, device=device)
    target = torch.empty_like(source)
    return 2 * count / (burst_ms(lambda: target.copy_(source), repeats=repeats) / 1e3)


def products(shape: Shape, rows: int, device: torch.device) -> list[Product]:
    """z, dHidden and dW at M = `rows`, for each output that this device can write."""
    dtype = getattr(torch, shape.dtype)
    draw = torch.Generator(device).manual_seed(0)

    def block(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, generator=draw).to(dtype)

    hidden, weight = block(rows, shape.hidden), block(shape.vocab, shape.hidden)
    grad = block(rows, shape.vocab)
    operands = {
        "z": (hidden, weight.T),
        "dHidden": (grad, weight),
        "dW": (grad.T, hidden),
    }
    flops = 2.0 * rows * shape.vocab * shape.hidden
    # On a GPU with a dtype of its own for the output; elsewhere that does not exist.
    outputs = [dtype, torch.float32] if device.type == "cuda" and dtype.itemsize == 2 else [dtype]
    found = []
    for name, (left, right) in operands.items():
        for output in outputs:
            out = torch.zeros(left.shape[0], right.shape[1], dtype=output, device=device)
            label = str(output).removeprefix("torch.")
            keywords = {} if output == dtype else {"out_dtype": output}
            run = _bind(torch.mm, left, right, out=out, **keywords)
            found.append(Product(name, rows, label, flops, run))
            if name == "dW" and output == torch.float32:
                run = _bind(torch.addmm, out, left, right, out=out, **keywords)
                found.append(Product(name, rows, "float32 +=", flops, run))
    return found


def _bind(function: Callable, *operands, **keywords) -> Callable[[], object]:
    return lambda: function(*operands, **keywords)


def measured(shape: Shape, rows: int, device: torch.device, repeats: int) -> list[dict]:
    """Milliseconds and FLOP/s of the products at M = `rows`, ready for JSON."""
    found = []
    for product in products(shape, rows, device):
        entry = {"product": product.name, "M": rows, "output": product.output}
        try:
            entry["ms"] = burst_ms(product.run, repeats=repeats)
            entry["tflops"] = product.flops / entry["ms"] / 1e9
        except (RuntimeError, TypeError) as error:  # an output that this build cannot write
            entry["absent"] = str(error).splitlines()[0][:120]
        found.append(entry)
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save after the copy and after every M."""
    args = options.parser(__doc__).parse_args(argv)
    out, device = console(), options.device()
    shape, many_rows, copied = SHAPES[args.size]
    end, status = time.monotonic() + args.seconds, 0
    body = saved("ceilings", args.size) if args.resume else {}
    body = {
        "shape": str(shape),
        "copy_bytes_per_s": body.get("copy_bytes_per_s") or copy_rate(copied, device, args.repeats),
        "rows": body.get("rows", []),
    }
    for rows in sorted(many_rows, reverse=True):
        if any(row["M"] == rows for row in body["rows"]):
            continue
        if time.monotonic() > end:
            out.print(f"out of time before M = {rows}")
            status = UNFINISHED
            break
        body["rows"] += measured(shape, rows, device, args.repeats)
        save("ceilings", args.size, body)
    table = Table(title=f"{shape}", title_justify="left", box=None)
    for heading in ("product", "M", "output", "ms", "TFLOP/s"):
        table.add_column(heading, justify="right")
    for row in body["rows"]:
        cells = (
            ["", row["absent"]] if "absent" in row else [f"{row['ms']:.3f}", f"{row['tflops']:.4g}"]
        )
        table.add_row(row["product"], str(row["M"]), row["output"], *cells)
    out.print(table)
    rate = body["copy_bytes_per_s"] / 1e12
    out.print(f"copy of {copied / 2**30:.3g} GiB: {rate:.4g} TB/s, read and written")
    save("ceilings", args.size, body)
    return status


if __name__ == "__main__":
    sys.exit(main())
