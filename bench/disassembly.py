"""What a compiled Triton kernel costs, read off its machine code without a GPU.

NVIDIA: `cuobjdump`, which Triton's package carries; AMD: the assembly that the compiler keeps.
A loop is the span of a backward branch; NVIDIA's loops in detail: `bench.sass`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from typing import Any

from bench.sass import WIDE, instructions, loops

# Bytes of shared memory that one program may ask for.
SHARED_LIMITS = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
AMD_SHARED_LIMIT = 64 << 10

AMD_WIDTHS = {"ubyte": 1, "sbyte": 1, "u8": 1, "ushort": 2, "sshort": 2, "short": 2, "u16": 2}
AMD_WIDTHS |= {"dword": 4, "b32": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


@dataclass(frozen=True)
class MachineCode:
    """Resources of one kernel; sizes in bytes, counts per thread unless named otherwise."""

    registers: int
    spills: int  # instructions (NVIDIA) or registers (AMD) that go through local memory
    stack: int
    shared: int  # of one program
    shared_limit: int
    loop_loads: list[int] = field(default_factory=list)  # bytes per thread, of each load in a loop
    loop_stores: list[int] = field(default_factory=list)

    def faults(self) -> list[str]:
        """Why this kernel is slow or does not start; empty if it is sound."""
        found = []
        if self.spills:
            found.append(f"{self.spills} register spills")
        if self.stack:
            found.append(f"{self.stack} bytes of local memory")
        if self.shared > self.shared_limit:
            found.append(f"{self.shared} bytes of shared memory, over {self.shared_limit}")
        narrow = sorted({size for size in self.loop_loads if size < WIDE})
        if narrow:
            found.append(f"loads of {', '.join(map(str, narrow))} bytes in a loop")
        return found


def inspect(kernel: Any) -> MachineCode:
    """Read a `triton.compiler.CompiledKernel` of a CUDA or HIP target."""
    if "cubin" in kernel.asm:
        listing = cuobjdump(kernel.asm["cubin"])
        limit = SHARED_LIMITS[kernel.metadata.target.arch]
        return from_sass(listing, kernel.metadata.shared, limit)
    return from_amdgcn(kernel.asm["amdgcn"], kernel.metadata.shared)


def cuobjdump(cubin: bytes) -> str:
    """Resource usage and disassembly of a cubin."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def from_sass(listing: str, shared: int, shared_limit: int) -> MachineCode:
    """Read `cuobjdump -res-usage -sass`."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    assert usage, f"no resource usage in the disassembly: {listing[:200]}"
    lines = instructions(listing)
    every = [(loop.start, loop.end) for loop in loops(lines)]
    # Of a loop over rows, only the loops within count: it reads a few numbers per row.
    spans = [
        (start, end)
        for start, end in every
        if not any((a, b) != (start, end) and start <= a and b <= end for a, b in every)
    ]

    def moved(*names: str) -> list[int]:
        return [
            line.width
            for line in lines
            if line.name in names
            and "STRONG" not in line.op  # polls what another program writes
            and any(start <= line.at <= end for start, end in spans)
        ]

    spills = sum(line.name in ("STL", "LDL") for line in lines)
    loads, stores = moved("LDG", "LDGSTS"), moved("STG")
    registers, stack = int(usage[1]), int(usage[2])
    return MachineCode(registers, spills, stack, shared, shared_limit, loads, stores)


def from_amdgcn(assembly: str, shared: int) -> MachineCode:
    """Read the assembly of a HIP kernel."""

    def value(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert match, f"no {name} in the assembly"
        return int(match[1])

    lines = assembly.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.?\w+):", line))}
    loops = [
        (labels[m[1]], i)
        for i, line in enumerate(lines)
        if (m := re.match(r"\s+s_c?branch\w*\s+(\.?\w+)", line)) and labels.get(m[1], i) < i
    ]

    def moved(kind: str) -> list[int]:
        found = []
        for i, line in enumerate(lines):
            m = re.match(rf"\s+(?:global|buffer|flat)_{kind}_(\w+)", line)
            if m and any(start <= i <= end for start, end in loops):
                name = m[1].removeprefix("lds_").split("_d16")[0]
                found.append(AMD_WIDTHS[name])
        return found

    return MachineCode(
        registers=value("vgpr_count"),
        spills=value("vgpr_spill_count") + value("sgpr_spill_count"),
        stack=value("private_segment_fixed_size"),
        shared=shared,
        shared_limit=AMD_SHARED_LIMIT,
        loop_loads=moved("load"),
        loop_stores=moved("store"),
    )
