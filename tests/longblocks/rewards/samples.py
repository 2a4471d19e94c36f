"""Rewards that behave badly, for the runner's tests. Imported by the worker process as a file."""

import ctypes
import os
import subprocess
import sys
import time


def moody(prompts, completions, **columns):
    """Does what each completion says."""
    print("words on standard output")
    return [_mood(text) for text in completions]


def _mood(text):
    if text == "raise":
        raise RuntimeError("boom")
    if text == "exit":
        raise SystemExit(3)
    if text == "hang":
        time.sleep(1000)
    if text == "child":
        subprocess.run([sys.executable, "-c", "import time; time.sleep(1000)"])
    if text == "spin":
        while True:
            pass
    if text == "die":
        os._exit(3)
    if text == "crash":
        ctypes.string_at(0)
    return {"nan": float("nan"), "inf": float("inf"), "none": None, "text": "why"}.get(
        text, float(len(text))
    )


def wrong_length(prompts, completions, **columns):
    return [1.0]


def wrong_type(prompts, completions, **columns):
    return 1.0


def odd(prompts, completions, *, kind, **columns):
    """Returns what a reward should not, for all completions alike."""
    import numpy

    n = len(completions)
    return {
        "text": "good",
        "texts": ["0.9"] * n,
        "nothing": None,
        "bool": True,
        "dict": {"score": [1.0] * n},
        "part": {"reward": [1.0] * n, "style": "fine"},
        "huge": [10**400] * n,
        "matrix": numpy.ones((n, 2)),
        "bools": [True] * n,
        "generator": (1.0 for _ in completions),
        "lines": ["first\nsecond"] * n,
    }[kind[0]]


def quits(prompts, completions, **columns):
    sys.exit(0)


def fatal(prompts, completions, **columns):
    os._exit(7)


def scolds(prompts, completions, **columns):
    raise ValueError("one line\n  and another")


def parts(prompts, completions, *, answer, bonus=0.0, **columns):
    values = [float(a == c) for a, c in zip(answer, completions, strict=True)]
    return {"reward": [v + bonus for v in values], "right": values, "often": [None] * len(values)}


def imported(prompts, completions, **columns):
    return [float("torch" in sys.modules)] * len(completions)


def arrays(prompts, completions, **columns):
    import numpy

    return numpy.ones(len(completions), dtype=numpy.float32) / 4


def pid(prompts, completions, **columns):
    return [float(os.getpid())] * len(completions)


def leisurely(prompts, completions, **columns):
    time.sleep(0.1 * len(completions))
    return [1.0] * len(completions)


def echo(prompts, completions, *, column, **columns):
    return {"reward": [1.0] * len(completions), "size": [float(len(c)) for c in column]}
