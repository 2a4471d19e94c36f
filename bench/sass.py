"""NVIDIA machine code as text: instructions, the loops that stream, and what is in flight in one.

Reads the output of `cuobjdump -sass`. A loop is the span of a backward branch. Counts are per
thread: a warp issues each instruction once for its 32 threads.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

WIDE = 16  # bytes of a load that streams well

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
REGISTER = re.compile(r"(?<![\w])R(\d+)\b")
CLASSES = {
    "MUFU": "MUFU",
    "FP32": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 FADD32I FMUL32I FFMA32I",
    "integer": "IADD IADD3 IMAD IABS LEA SHF LOP3 PRMT VIADD "
    "UIADD3 UIMAD ULEA USHF ULOP3 UPRMT UVIADD",
    "select": "FSETP FSEL FSET FMNMX FMNMX3 ISETP SEL IMNMX VIMNMX VIMNMX3 VIADDMNMX PLOP3 "
    "UISETP USEL UPLOP3 P2R R2P",
    "load": "LDG LDGSTS LD LDS LDL LDC LDCU ULDC",
    "store": "STG ST STS STL",
}
BARRIERS = ("BAR",)
SHUFFLES = ("SHFL", "REDUX", "CREDUX")  # whatever passes values between the lanes of a warp
CLASS_OF = {name: group for group, names in CLASSES.items() for name in names.split()}
OTHER = "other"  # moves, conversions, branches, barriers, shuffles


class Instruction(NamedTuple):
    """One line of a listing."""

    at: int  # address in bytes
    op: str  # with its modifiers
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.op.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes that a load or store such as `LDG.E.128` moves."""
        parts = self.op.split(".")
        bits = [int(part) for part in parts if part in ("64", "128", "256")]
        if bits:
            return bits[0] // 8
        return 1 if {"U8", "S8"} & {*parts} else 2 if {"U16", "S16"} & {*parts} else 4

    @property
    def writes(self) -> set[int]:
        """The registers that a load fills."""
        first = REGISTER.match(self.operands.strip())
        return {int(first[1]) + i for i in range(self.width // 4)} if first else set()

    @property
    def reads(self) -> set[int]:
        """The registers named as sources; of a vector only the first."""
        first, _, rest = self.operands.partition(",")
        # A store's first operand is an address, and is read too.
        sources = self.operands if "[" in first else rest
        return {int(number) for number in REGISTER.findall(sources)}


class Loop(NamedTuple):
    """The instructions of one loop, in order."""

    body: list[Instruction]

    @property
    def start(self) -> int:
        return self.body[0].at

    @property
    def end(self) -> int:
        return self.body[-1].at

    def moved(self, *names: str) -> list[int]:
        """Bytes of each load or store with one of these opcodes."""
        return [line.width for line in self.body if line.name in names]

    def classes(self) -> dict[str, int]:
        """Instructions by class; together they are all of the loop."""
        found = Counter(CLASS_OF.get(line.name, OTHER) for line in self.body)
        return {name: found[name] for name in (*CLASSES, OTHER)}

    def count(self, names: tuple[str, ...]) -> int:
        """Instructions with one of these opcodes."""
        return sum(line.name in names for line in self.body)

    def in_flight(self) -> int:
        """16-byte loads from global memory that are outstanding at most at the same time.

        A load is outstanding until one of its registers is read, also in the next turn of the
        loop. Copies into shared memory (LDGSTS) fill no registers and are not counted.
        """
        waiting: dict[int, set[int]] = {}
        most = 0
        for line in self.body * 2:
            read = line.reads
            waiting = {first: filled for first, filled in waiting.items() if not filled & read}
            if line.name == "LDG" and line.width >= WIDE and line.writes:
                waiting[min(line.writes)] = line.writes
                most = max(most, sum(4 * len(filled) for filled in waiting.values()) // WIDE)
        return most


def instructions(listing: str) -> list[Instruction]:
    """All instructions of a listing, in order."""
    return [Instruction(int(at, 16), op, rest) for at, op, rest in LINE.findall(listing)]


def loops(lines: list[Instruction]) -> list[Loop]:
    """Every loop, outer and inner ones, by address; branches back to one place are one loop."""
    ends: dict[int, int] = {}
    for line in lines:
        if line.name == "BRA" and (to := re.search(r"0x([0-9a-f]+)", line.operands)):
            start = int(to[1], 16)
            if start < line.at:  # equal: the padding at the end
                ends[start] = max(line.at, ends.get(start, 0))
    return [
        Loop([line for line in lines if start <= line.at <= end])
        for start, end in sorted(ends.items())
    ]


def streaming_loops(listing: str) -> list[Loop]:
    """Innermost loops that read global memory 16 bytes at a time, by address."""
    found = [
        loop
        for loop in loops(instructions(listing))
        if any(width >= WIDE for width in loop.moved("LDG", "LDGSTS"))
    ]

    def inside(inner: Loop, outer: Loop) -> bool:
        return inner != outer and outer.start <= inner.start and inner.end <= outer.end

    return [loop for loop in found if not any(inside(other, loop) for other in found)]


def main_loop(listing: str) -> Loop | None:
    """The streaming loop that reads most per turn, and not the tail that follows it."""
    return max(
        streaming_loops(listing),
        key=lambda loop: sum(loop.moved("LDG", "LDGSTS")),
        default=None,
    )
