"""`bench/gpu.sh` with a stand-in for Python: what runs, in which order, what a later call does."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
echo "$*" >>"$CALLS"
for failing in $FAILS; do
    case "$*" in *"${failing%=*}"*) echo broken; exit "${failing#*=}" ;; esac
done
"""
SANITIZER = """#!/bin/sh
echo "compute-sanitizer $2" >>"$CALLS"
"""


@pytest.fixture
def call(tmp_path):
    """Run the script; returns its output and the commands that it started, one per line."""
    tools, calls = tmp_path / "tools", tmp_path / "calls"
    tools.mkdir()
    for name, text in {"python": PYTHON, "compute-sanitizer": SANITIZER}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(*arguments, fails="", seconds="530", status=0):
        calls.write_text("")
        environment = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHON": str(tools / "python"),
            "OUT": str(tmp_path / "out"),
            "CALLS": str(calls),
            "FAILS": fails,
            "SECONDS_IN_ALL": seconds,
        }
        command = ["bash", str(ROOT / "bench" / "gpu.sh"), "--dry", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr, calls.read_text().splitlines()

    return run


def steps(commands):
    """The steps among the commands, in short."""
    found = []
    for command in commands:
        words = command.split()
        if words[0] == "compute-sanitizer":
            found.append(words[1])
        elif words[1] == "pytest":
            found.append("tests")
        else:
            found.append(words[1].removeprefix("bench."))
    return [name for name in dict.fromkeys(found) if name != "summary"]


def test_everything_runs_correctness_first_and_once(call):
    _, commands = call()
    assert steps(commands) == [
        *("tests", "loss_precision", "ceilings", "parts", "loss_speed", "loss_memory"),
        *("tests.gpu.sanitize", "memcheck", "racecheck", "step"),  # warm, then the sanitizers
    ]
    assert commands[-1].startswith("-m bench.summary")
    output, commands = call()
    assert steps(commands) == [] and "parts: ok in an earlier call" in output
    assert steps(call("--again", "parts")[1]) == ["parts"]


def test_a_call_does_the_named_steps_and_the_next_one_the_rest(call):
    assert steps(call("tests", "precision")[1]) == ["tests", "loss_precision"]
    assert steps(call("ceilings", "parts", "speed")[1]) == ["ceilings", "parts", "loss_speed"]
    rest = ["loss_memory", "tests.gpu.sanitize", "memcheck", "racecheck", "step"]
    assert steps(call()[1]) == rest


def test_what_is_not_complete_goes_on_and_what_failed_waits_for_its_name(call):
    output, _ = call("parts", "speed", fails="bench.loss_speed=75 bench.parts=3")
    assert "speed: not complete, the next call goes on" in output
    assert "parts: failed with 3: broken" in output
    output, commands = call("--dry")
    assert "loss_speed" in steps(commands) and "parts" not in steps(commands)
    assert "parts: failed in an earlier call" in output
    assert steps(call("parts")[1]) == ["parts"]
    assert steps(call("parts")[1]) == []  # the second time it was ok


def test_one_failing_test_file_does_not_stop_the_others(call):
    output, _ = call("tests", fails="test_sizes.py=1")
    assert "tests:test_sizes: failed with 1" in output and "tests:test_gpu: ok" in output
    (again,) = [line for line in call("tests")[1] if "-m pytest" in line]
    assert again.endswith("test_sizes.py")


def test_nothing_starts_without_time_left(call):
    output, commands = call("parts", seconds="10")
    assert "parts: not run, no time left" in output and steps(commands) == []


def test_an_unknown_step_is_named(call):
    assert "part: expected one of: tests" in call("part", status=2)[0]
