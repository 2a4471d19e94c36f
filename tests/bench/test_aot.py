"""The kernels' machine code on GPUs that are not here, and that the check finds what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from bench.gpus import GPUS
from bench.loops import computed, figures, resident_warps
from bench.sass import instructions, main_loop, streaming_loops

ROOT = Path(__file__).parents[2]


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    """A module of this repository in a process of its own, without the interpreter."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


def test_every_kernel_is_sound_on_every_target():
    result = run("bench.aot")
    faulty = [line for line in result.stdout.splitlines()[2:] if not line.endswith(" ok")]
    assert result.returncode == 0, "\n".join([*faulty, result.stderr[-2000:]])
    assert "no faults" in result.stdout
    for word in ("row_stats", "row_divergence", "row_grad", "topk_take", "topk_put"):
        assert f"sm_90   {word}" in result.stdout
    assert all(f"\n{target}" in result.stdout for target in ("sm_80", "sm_100", "gfx942"))


@pytest.fixture(scope="module")
def toys():
    result = run("tests.bench.aot_toys")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_sound_toy_passes(toys):
    assert toys["sound"] == {"sm_90": [], "gfx942": []}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("toy", ["narrow", "unaligned"])
def test_narrow_loads_in_a_loop_are_found(toys, toy, target):
    assert toys[toy][target] == ["loads of 4 bytes in a loop"]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_spills_and_local_memory_are_found(toys, target):
    faults = " ".join(toys["spilling"][target])
    assert "register spills" in faults and "bytes of local memory" in faults


def test_too_much_shared_memory_is_found(toys):
    assert toys["hungry"]["sm_90"] == ["524288 bytes of shared memory, over 232448"]


PLAIN = ("row_stats-plain", "row_grad-plain")
# Two row blocks read 16 bytes at a time, one after the other; then a tail of one.
LISTING = """
 REG:38 STACK:0 SHARED:0
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FADD R12, R6, R7 ;
        /*0030*/              @!P0 LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0040*/                   LDG.E.128 R20, desc[UR4][R16.64] ;
        /*0050*/                   MUFU.EX2 R13, R8 ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/                   SHFL.BFLY PT, R14, R13, 0x1, 0x1f ;
        /*0080*/                   FSETP.GT.AND P1, PT, R20, R12, PT ;
        /*0090*/                   LDG.E.128 R24, desc[UR4][R16.64+0x10] ;
        /*00a0*/                   IADD3 R16, R16, R24, RZ ;
        /*00b0*/                   STG.E.64 desc[UR4][R18.64], R24 ;
        /*00c0*/               @P0 BRA 0x10 ;
        /*00d0*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00e0*/               @P1 BRA 0xd0 ;
        /*00f0*/                   EXIT ;
        /*0100*/                   BRA 0x100;
"""


def test_a_loop_is_counted_by_class():
    loop = main_loop(LISTING)
    assert (loop.start, loop.end, len(loop.body)) == (0x10, 0xC0, 12)
    counts = {"MUFU": 1, "FP32": 1, "integer": 1, "select": 1, "load": 4, "store": 1, "other": 3}
    assert loop.classes() == counts
    assert [one.start for one in streaming_loops(LISTING)] == [0x10, 0xD0]


def test_loads_are_in_flight_until_one_of_their_registers_is_read():
    assert main_loop(LISTING).in_flight() == 2
    together = LISTING.replace("FADD R12, R6, R7", "FADD R12, R0, R0")
    assert main_loop(together).in_flight() == 3
    store = next(line for line in instructions(LISTING) if line.name == "STG")
    assert store.reads == {18, 24}


def test_figures_are_per_eight_columns_of_one_row():
    h200 = GPUS["h200"]
    options = {"gpu": h200, "bias": False, "warps": 4, "shared": 0, "programs": 8}
    found = figures(LISTING, name="toy", blocks=2, **options)
    assert found.instructions == 12 and found.bytes_per_column == 9  # 8 columns a turn
    assert figures(LISTING, name="toy", blocks=1, **options).instructions == 6
    assert found.barriers == found.shuffles == 1 and found.registers == 38
    columns = 32768 * 152064
    cycles = columns / 8 * 12 / 32 / (132 * 4)
    assert found.issue_ms == pytest.approx(1e3 * cycles / h200.clock)
    assert found.mufu_ms == pytest.approx(1e3 * columns / 8 / (132 * 16) / h200.clock)
    assert found.hbm_ms == pytest.approx(1e3 * columns * 9 / h200.bandwidth)
    assert found.warps_per_sm == resident_warps(38, 4, 0, "sm_90") == 48
    assert found.bytes_in_flight == 48 * 32 * 2 * 16
    assert resident_warps(32, 16, 0, "sm_90") == 64
    assert resident_warps(32, 4, 100 << 10, "sm_90") == 8


@pytest.fixture(scope="module")
def plain_loops():
    return computed("sm_80", "sm_90", "sm_100")


def test_the_plain_loops_are_counted_on_every_nvidia_target(plain_loops):
    found = plain_loops
    names = [(name, f"sm_{number}") for number in (80, 90, 100) for name in PLAIN]
    assert sorted(found) == sorted(names)
    for one in found.values():
        assert one.instructions == pytest.approx(sum(one.classes.values())) and one.in_flight > 0
        assert one.bytes_per_column == (10 if one.name.startswith("row_grad") else 8)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("kernel, most", [("row_stats", 130), ("row_grad", 95)])
def test_the_plain_loops_keep_their_bounds(plain_loops, kernel, most, target):
    one = plain_loops[f"{kernel}-plain", target]
    assert one.barriers == one.shuffles == 0
    assert one.in_flight >= 4
    newest = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
    assert one.instructions <= most * (1 if newest else 1.1)


def test_machine_code_is_kept_in_a_file_per_variant(tmp_path):
    result = run("bench.aot", "--keep", str(tmp_path), "--targets", "sm_90", "--only", "plain")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.sm_90.sass" for name in PLAIN}
    assert "row_stats-plain" in result.stdout and "nothing measured" in result.stdout
    assert main_loop((tmp_path / "row_stats-plain.sm_90.sass").read_text()) is not None


def test_loops_that_do_not_compile_here_say_why():
    with pytest.raises(RuntimeError, match="invalid choice: 'sm_1'"):
        computed("sm_1")
