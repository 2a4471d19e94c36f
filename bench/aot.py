"""Would every Triton kernel run well on GPUs that are not here? Compiles and reads machine code.

    python -m bench.aot                  # the variants that matter, under a minute
    python -m bench.aot --all            # every combination of options on every target
    python -m bench.aot --loops          # what the inner loops cost a column, and what bounds them
    python -m bench.aot --keep FOLDER    # the same, and a file of machine code per variant

Fails on register spills, local memory, too much shared memory, and loads narrower than 16 bytes in
a loop.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.variants import (  # first: it turns the interpreter off
    ODD_VOCAB,
    ROWS,
    TARGETS,
    Variant,
    all_variants,
    common_variants,
    compiling,
    core_variants,
    fused_variant,
    loop_variants,
)

# isort: split
import triton

from bench.disassembly import cuobjdump, inspect
from bench.gpus import GPUS, TYPICAL
from bench.loops import Figures, figures, print_figures


def check(target: str, variants: list[Variant]) -> int:
    """Compile and print a line for each variant; returns how many have faults."""
    failures = 0
    for variant in variants:
        with compiling(TARGETS[target]) as compiled:
            variant.launch()
        assert compiled, f"{variant.name}: launched no kernel"
        for kernel in compiled:
            code = inspect(kernel)
            faults = code.faults()
            failures += bool(faults)
            narrowest = min(code.loop_loads, default=0)
            print(
                f"{target:7} {variant.name:66} {kernel.metadata.num_warps:5} {code.registers:5} "
                f"{code.spills:6} {code.stack:5} {code.shared:7} {narrowest or '-':>5} "
                f"{min(code.loop_stores, default='-'):>5}  {'; '.join(faults) or 'ok'}",
                flush=True,
            )
    return failures


def loop_figures(target: str, variants: list[Variant], keep: Path | None) -> list[Figures]:
    """Compile `variants` and count their inner loops; machine code goes to files in `keep`."""
    found = []
    for variant in variants:
        programs: list[int] = []
        with compiling(TARGETS[target], programs) as compiled:
            variant.launch()
        assert len(compiled) == 1, f"{variant.name}: launched {len(compiled)} kernels"
        kernel, listing = compiled[0], cuobjdump(compiled[0].asm["cubin"])
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{variant.name}.{target}.sass").write_text(listing)
        counted = figures(
            listing,
            name=variant.name,
            gpu=GPUS[TYPICAL[target]],
            blocks=variant.blocks,
            bias=variant.bias,
            warps=kernel.metadata.num_warps,
            shared=kernel.metadata.shared,
            programs=programs[0] / ROWS,
        )
        found.append(counted)
    return found


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every combination on every target")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--loops", action="store_true", help="count the inner loops (NVIDIA)")
    parser.add_argument("--keep", type=Path, help="a folder for the machine code; with --loops")
    parser.add_argument("--only", default="", help="variants whose name holds this; with --loops")
    parser.add_argument("--json", action="store_true", help="print JSON; with --loops")
    arguments = parser.parse_args()
    if arguments.loops or arguments.keep:
        chosen = [variant for variant in loop_variants() if arguments.only in variant.name]
        targets = [target for target in arguments.targets if target in TYPICAL]
        found = [x for target in targets for x in loop_figures(target, chosen, arguments.keep)]
        if arguments.json:
            print(json.dumps([one._asdict() for one in found]))
        else:
            print_figures(found, f"triton {triton.__version__}")
        return 0
    return check_all(arguments.targets, everything=arguments.all)


def check_all(targets: list[str], *, everything: bool) -> int:
    """Check the variants of every target and print a table; returns the exit status."""
    print(f"triton {triton.__version__}; bytes per thread for loads and stores in loops")
    print(
        f"{'target':7} {'kernel, divergence, vocabulary, options':66} {'warps':5} {'regs':>5} "
        f"{'spills':6} {'stack':5} {'shared':>7} {'loads':5} {'stores':5}"
    )
    failures = 0
    for target in targets:
        some = common_variants() if target == "sm_90" else core_variants()
        some = all_variants() if everything else some
        if target.startswith("sm_"):  # `row_fused` is for CUDA alone
            some = [*some, fused_variant("plain"), fused_variant("full", ODD_VOCAB)]
        failures += check(target, some)
    print(f"{failures} with faults" if failures else "no faults")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
