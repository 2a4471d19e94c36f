"""The kernels' machine code on GPUs that are not here, and that the check finds what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
