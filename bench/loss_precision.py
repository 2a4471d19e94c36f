"""How exact are the gradients, against fp64 on the same inputs?

In bf16, with peaked logits and two teachers: one that differs, and one that nearly equals the
student (a KL of 0.01 and of 0.001 nats), where the reverse KL's gradient is a small difference of
large logits and whoever rounds logits to bf16 loses it. Relative Frobenius errors over a sample of
tokens and of vocabulary columns. Compare equal `terms` only.

    python -m bench.loss_precision
"""

from __future__ import annotations

import sys
import time

from bench import options
from bench.cases import make_case
from bench.harness import measure, not_reached
from bench.provider import Provider
from bench.report import console, print_rows
from bench.resume import Report
from bench.sizes import Shape

SHAPES = {
    "tiny": [
        (Shape("tiny, another teacher", 32, 64, 96, 500), {}),
        (Shape("tiny, KL 0.01", 32, 64, 64, 500), {"teacher": "near", "kl": 0.01}),
    ],
    "cpu": [
        (Shape("bf16, another teacher", 128, 256, 320, 8192), {}),
        (Shape("bf16, KL 0.01", 128, 256, 256, 8192), {"teacher": "near", "kl": 0.01}),
        (Shape("bf16, KL 0.001", 128, 256, 256, 8192), {"teacher": "near", "kl": 0.001}),
        (Shape("fp32, another teacher", 128, 256, 320, 8192, "float32"), {}),
    ],
    "gpu": [
        (Shape("bf16, another teacher", 2048, 3584, 5120, 152064), {}),
        (Shape("bf16, KL 0.01", 2048, 3584, 3584, 152064), {"teacher": "near", "kl": 0.01}),
        (Shape("bf16, KL 0.001", 2048, 3584, 3584, 152064), {"teacher": "near", "kl": 0.001}),
    ],
}
COLUMNS = ("hidden", "weight", "loss")


def providers() -> list[Provider]:
    """Everything that is compared."""
    return options.all_providers()


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save after every shape."""
    args = options.parser(__doc__).parse_args(argv)
    out, report = console(), Report("loss_precision", args.size, resume=args.resume)
    end = time.monotonic() + args.seconds
    shapes = SHAPES[args.size]
    for index, (shape, teacher) in enumerate(shapes):
        everyone = report.missing(options.chosen(providers(), args.only), shape)
        left = (end - time.monotonic()) / (len(shapes) - index)
        if everyone and left <= 0:
            report.add(not_reached(everyone, shape, args.seconds))
        elif everyone:
            case = make_case(shape, options.device(), **teacher)
            report.add(measure(everyone, case, seconds=left, exact_tokens=512, timed=False))
        print_rows(str(shape), report.at(shape), COLUMNS, out)
    return report.finish(out, plot=not args.no_plot)


if __name__ == "__main__":
    sys.exit(main())
