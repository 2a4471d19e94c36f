"""How many bytes does one step need beyond its inputs and gradients, and how does it grow with N?

On a GPU: the allocator's peak. On a CPU: growth of the resident set of a process per provider, less
the gradients; a provider that would need more than `--limit` GiB is stopped and says so. Compare
equal `terms` only.

The CPU's N lie below the chunks of some rivals (1024 tokens in Liger's JSD, 4096 in TRL), whose
need stops growing there; the GPU's N lie beyond.

    python -m bench.loss_memory
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from bench import options
from bench.cases import Case, make_case
from bench.harness import NOT_REACHED, Row, new_row, too_slow, why
from bench.memory import GIB, SECONDS, TOOK_LONGER, cpu_peaks, gpu_peak
from bench.provider import Provider
from bench.report import console, print_rows
from bench.resume import Report
from bench.sizes import Shape, pair

SHAPES = {
    "tiny": [Shape("tiny", n, 32, 48, 1000, "float32") for n in (64, 128)],
    # Narrow heads: what grows with N is the logits, and width only costs time.
    "cpu": [Shape("V = 32768", n, 32, 48, 32768, "float32") for n in (512, 1024, 2048)],
    "gpu": [pair("qwen2.5", n) for n in (4096, 16384, 32768, 65536, 131072)],
}
COLUMNS = ("peak",)


def providers() -> list[Provider]:
    """Everything that is compared."""
    return options.all_providers()


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save after every shape (GPU) or provider (CPU)."""
    parser = options.parser(__doc__)
    parser.add_argument(
        "--limit", type=float, default=4, help="GiB that a provider may take on a CPU"
    )
    args = parser.parse_args(argv)
    out, report = console(), Report("loss_memory", args.size, resume=args.resume)
    run = on_gpu if torch.cuda.is_available() else on_cpu
    run(SHAPES[args.size], report, args)
    for shape in SHAPES[args.size]:
        print_rows(str(shape), report.at(shape), COLUMNS, out)
    return report.finish(out, plot=not args.no_plot)


def on_gpu(shapes: list[Shape], report: Report, args) -> None:
    """Peaks by the allocator, one step per provider and shape; ours on all shapes first."""
    everyone = options.chosen(providers(), args.only)
    end = time.monotonic() + args.seconds
    for ours in (True, False):
        here = [provider for provider in everyone if provider.ours == ours]
        if not any(report.missing(here, shape) for shape in shapes):
            continue
        warm_up(here, make_case(shapes[0].at(1024), options.device()))
        for shape in shapes:
            todo = report.missing(here, shape)
            if todo:
                case = make_case(shape, options.device())
                report.add([peak_row(provider, case, end, args) for provider in todo])


def peak_row(provider: Provider, case: Case, end: float, args) -> Row:
    """The row of one provider on a GPU, unless its steps would take too long."""
    row, left = new_row(provider, case.shape), end - time.monotonic()
    if row.absent:
        return row
    if left < 0:
        row.absent = f"{NOT_REACHED} within {args.seconds:.0f} s"
        return row
    try:
        row.absent = too_slow(provider, case, args.seconds, left)
        if not row.absent:
            row.peak_bytes = gpu_peak(provider, case)
    except Exception as error:  # a rival that fails must not end the comparison
        row.absent = why(error)
    case.zero_grad()
    torch.cuda.empty_cache()
    return row


def warm_up(everyone: list[Provider], case: Case) -> None:
    """Compile and load what a first step does: it is not to count."""
    for provider in everyone:
        if not provider.absent:
            try:
                provider.step(case)
            except Exception as error:  # it will say so again, in its row
                print(f"{provider.name}: {why(error)}")
    case.zero_grad()


def on_cpu(shapes: list[Shape], report: Report, args) -> None:
    """Peaks by the resident set: a process per provider, two at a time."""
    everyone = providers()
    wanted = {provider.name for provider in options.chosen(everyone, args.only)}
    end = time.monotonic() + args.seconds

    def peaks(number: int) -> list[Row]:
        rows = [new_row(everyone[number], shape) for shape in shapes]
        left = min(SECONDS, end - time.monotonic())
        if rows[0].absent:
            found = [rows[0].absent] * len(rows)
        elif left <= 0:
            found = [f"{NOT_REACHED} within {args.seconds:.0f} s"] * len(rows)
        else:
            limits = {"limit": int(args.limit * GIB), "seconds": left}
            found = cpu_peaks(providers, number, shapes, distinct=64, **limits)
        for row, peak in zip(rows, found, strict=True):
            if isinstance(peak, str):
                # Stopped early for want of time: another run may give it all of its own.
                cut = left < SECONDS and peak.startswith(TOOK_LONGER)
                row.absent = f"{NOT_REACHED} within {args.seconds:.0f} s" if cut else peak
            else:
                row.peak_bytes = peak
        return rows

    missing = {provider.name for shape in shapes for provider in report.missing(everyone, shape)}
    numbers = [n for n, provider in enumerate(everyone) if provider.name in wanted & missing]
    with ThreadPoolExecutor(max_workers=2) as pool:
        for rows in pool.map(peaks, numbers):
            report.add(rows)


if __name__ == "__main__":
    sys.exit(main())
