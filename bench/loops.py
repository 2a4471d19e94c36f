"""What does a row kernel's inner loop cost per column, and which unit of the GPU bounds it?

Figures are computed from machine code and from the ceilings in `bench.gpus`; none is measured.
`python -m bench.aot --loops` prints them. `computed` gives them to other code, from a process of
its own: compiling needs Triton without its interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.gpus import Ceilings
from bench.sass import BARRIERS, SHUFFLES, main_loop

TOKENS, VOCAB = 32768, 152064  # of the times: the contract's shape
ROWS_AT_ONCE = 256  # of logits, at 1 GiB: sets how many programs there are at a time
COLUMNS = 8  # that counts are given for: what a thread takes per turn of most loops
WARP = 32

ISSUE_SLOTS = 4  # warp instructions per cycle and multiprocessor
MUFU_LANES = 16  # results per cycle and multiprocessor
REGISTERS = 65536  # of a multiprocessor; a warp gets them in steps of 256
MOST_WARPS, MOST_PROGRAMS = 64, 32  # of a multiprocessor
SHARED_IN_ALL = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
SHARED_RESERVED = 1 << 10  # per program


class Figures(NamedTuple):
    """One kernel on one architecture; counts per 8 columns of one row."""

    name: str
    target: str
    instructions: float
    classes: dict[str, float]
    barriers: float
    shuffles: float
    in_flight: int  # 16-byte loads per thread, before the first one is used
    registers: int
    warps: int  # of a program
    programs: float  # per row
    resident: int  # warps that fit a multiprocessor
    warps_per_sm: float  # of those, what 256 rows of logits fill
    bytes_in_flight: float  # per multiprocessor
    bytes_per_column: float  # of HBM, read and written
    issue_ms: float  # of N = 32768 rows of V = 152064, if issue slots were the only bound
    mufu_ms: float
    hbm_ms: float


def figures(
    listing: str,
    *,
    name: str,
    gpu: Ceilings,
    blocks: int,
    bias: bool,
    warps: int,
    shared: int,
    programs: float,
) -> Figures:
    """Count the main loop of a `cuobjdump -res-usage -sass` listing.

    Args:
        blocks: of fp32 logits that the kernel reads: 1, or 2 with a teacher.
        bias: reads a bias for each block too, which comes from the cache.
        warps, shared: of a program, in warps and bytes.
        programs: per row of logits.
    """
    loop = main_loop(listing)
    if loop is None:
        raise ValueError(f"{name}: no loop in the machine code reads 16 bytes at a time")
    registers = int(listing.split("REG:")[1].split()[0])
    columns = sum(loop.moved("LDG", "LDGSTS")) / 4 / (blocks * (1 + bias))
    scale = COLUMNS / columns
    classes = {kind: scale * count for kind, count in loop.classes().items()}
    total = scale * len(loop.body)
    moved = 4 * blocks + sum(loop.moved("STG")) / columns
    resident = resident_warps(registers, warps, shared, gpu.target)
    filled = min(resident, ROWS_AT_ONCE * programs * warps / gpu.processors)
    eights = TOKENS * VOCAB / COLUMNS
    cycles = gpu.processors * gpu.clock
    return Figures(
        name=name,
        target=gpu.target,
        instructions=total,
        classes=classes,
        barriers=scale * loop.count(BARRIERS),
        shuffles=scale * loop.count(SHUFFLES),
        in_flight=loop.in_flight(),
        registers=registers,
        warps=warps,
        programs=programs,
        resident=resident,
        warps_per_sm=filled,
        bytes_in_flight=filled * WARP * 16 * loop.in_flight(),
        bytes_per_column=moved,
        issue_ms=1e3 * total * eights / WARP / (ISSUE_SLOTS * cycles),
        mufu_ms=1e3 * classes["MUFU"] * eights / (MUFU_LANES * cycles),
        hbm_ms=1e3 * moved * TOKENS * VOCAB / gpu.bandwidth,
    )


def resident_warps(registers: int, warps: int, shared: int, target: str) -> int:
    """Warps of one kernel that a multiprocessor holds at the same time."""
    of_a_warp = -(-registers * WARP // 256) * 256
    programs = min(
        MOST_WARPS // warps,
        REGISTERS // of_a_warp // warps,
        SHARED_IN_ALL[target] // (shared + SHARED_RESERVED),
        MOST_PROGRAMS,
    )
    return programs * warps


def print_figures(found: Sequence[Figures], compiler: str) -> None:
    """A line per kernel and architecture."""
    print(f"{compiler}; computed from machine code, nothing measured. Instructions per 8 columns;")
    print(f"ms at N = {TOKENS}, V = {VOCAB} on an A100, H200 and B200, each bound alone;")
    print(f"warps and KiB in flight per multiprocessor from {ROWS_AT_ONCE} rows of logits\n")
    kinds = list(found[0].classes) if found else []
    print(
        f"{'target':7} {'kernel-variant':34} {'all':>4} "
        + " ".join(f"{kind:>7}" for kind in kinds)
        + "  bar shfl flight regs warps /SM   KiB   issue   MUFU    HBM"
    )
    for one in found:
        print(
            f"{one.target:7} {one.name:34} {one.instructions:4.0f} "
            + " ".join(f"{one.classes[kind]:7.1f}" for kind in kinds)
            + f" {one.barriers:4.1f} {one.shuffles:4.1f} {one.in_flight:6} {one.registers:4} "
            f"{one.warps:5} {one.warps_per_sm:3.0f} {one.bytes_in_flight / 1024:5.0f} "
            f"{one.issue_ms:7.2f} {one.mufu_ms:6.2f} {one.hbm_ms:6.2f}"
        )


def computed(*targets: str, only: str = "plain") -> dict[tuple[str, str], Figures]:
    """Figures of the variants whose name holds `only`, by name and target.

    Compiles them, in a process of its own, in seconds.

    Raises:
        RuntimeError: they could not be compiled here; the message ends with the reason.
    """
    root = Path(__file__).parent.parent
    hidden = ("TRITON_INTERPRET",)
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment["PYTHONPATH"] = f"{root}:{root / 'kernels'}"
    command = [sys.executable, "-m", "bench.aot", "--loops", "--json", "--only", only]
    command += ["--targets", *targets]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"bench.aot: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    rows = [Figures(**entry) for entry in json.loads(done.stdout)]
    return {(one.name, one.target): one for one in rows}
