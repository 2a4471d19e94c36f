"""How long does one forward and backward of the loss take, and how near is that to the GEMMs alone?

Every provider gets the same inputs: a clipped GRPO objective plus the reverse KL to a teacher, from
hidden states to the gradients of hidden states and head. "of floor" is the time of the GEMMs that
no exact dense loss can avoid (z, t, dHidden, dW; without t where no teacher is read), run in turns
with the providers, over the provider's own time. Compare equal `terms` only.

    python -m bench.loss_speed                 CPU sizes without a GPU, real sizes with one
    python -m bench.loss_speed --size gpu --only fused,TRL --seconds 60
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

from bench import options
from bench.cases import make_case
from bench.harness import measure, not_reached
from bench.provider import Provider
from bench.reference import BOTH
from bench.report import console, print_rows
from bench.resume import Report
from bench.sizes import Shape, pair

SHAPES = {
    "tiny": [Shape("tiny", 64, 64, 96, 1000, "float32")],
    # The real models' sizes divided, in fp32: bf16 products are slow on many CPUs.
    "cpu": [
        pair("qwen2.5", 1024, divide=8, dtype="float32"),
        pair("gemma-3", 1024, divide=16, dtype="float32"),
    ],
    "gpu": [
        pair("qwen2.5", 32768),
        pair("qwen2.5", 4096),
        pair("qwen3", 32768),
        pair("llama-3.1", 32768),
        pair("gemma-3", 32768),
        pair("qwen2.5", 131072),
    ],
}
COLUMNS = ("ms", "floor", "peak", "hidden", "weight")


def providers() -> list[Provider]:
    """Everything that is compared."""
    return options.all_providers()


def short_list(everyone: list[Provider]) -> list[Provider]:
    """For the later shapes: single terms, and what compiles long, sit them out."""
    return [
        p
        if p.absent or (p.terms == BOTH and not p.compiles)
        else replace(p, absent="measured on the first shapes only; see --all")
        for p in everyone
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save after every shape: the contract on all of them first, then the rest."""
    parser = options.parser(__doc__)
    parser.add_argument("--all", action="store_true", help="all providers on all GPU shapes")
    args = parser.parse_args(argv)
    out, report = console(), Report("loss_speed", args.size, resume=args.resume)
    end = time.monotonic() + args.seconds
    shapes = SHAPES[args.size]
    for contract in (True, False):
        for index, shape in enumerate(shapes):
            everyone = options.chosen(providers(), args.only)
            if shape.tokens > 4096 and index and not args.all:
                everyone = short_list(everyone)
            everyone = [p for p in everyone if p.contract == contract]
            everyone = report.missing(everyone, shape)
            if not everyone:
                continue
            left = end - time.monotonic()
            if left <= 0 and not contract:
                report.add(not_reached(everyone, shape, args.seconds))
                continue
            # The first shape is the one of the contracts: it may take half of the time.
            share = left / 2 if index == 0 and len(shapes) > 1 else left / (len(shapes) - index)
            report.add(
                measure(
                    everyone,
                    make_case(shape, options.device()),
                    repeats=args.repeats,
                    seconds=share,
                    exact_whole=index == 0 or shape.tokens <= 8192,
                )
            )
            if contract:
                print_rows(f"{shape}, contract", report.at(shape), COLUMNS, out)
    for shape in shapes:
        print_rows(str(shape), report.at(shape), COLUMNS, out)
    return report.finish(out, plot=not args.no_plot)


if __name__ == "__main__":
    sys.exit(main())
