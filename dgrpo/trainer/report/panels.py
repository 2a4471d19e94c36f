"""Which metrics share a panel, in which order and under which title."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

# Alone in a panel each, in this order, before all others.
FIRST = {
    "reward": "reward",
    "evaluation/reward": "held-out reward",
    "divergence": "KL to the teacher (nats)",
    "clipped": "share of clipped tokens",
    "loss": "loss",
    "entropy": "entropy (nats)",
    "ratio": "policy ratio",
    "token_accuracy": "token accuracy",
    "nll": "negative log-likelihood (nats)",
    "advantage": "advantage",
    "completion_length": "completion length (tokens)",
    "truncated": "share of truncated completions",
    "sampler_mismatch": "sampler mismatch (nats)",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "teacher_coef": "teacher coefficient",
    "time/tokens_per_second": "tokens per second",
    "memory/peak_gib": "peak memory (GiB)",
    # Apart from the other times: it takes many times as long as a step.
    "time/evaluation": "seconds of an evaluation",
}
# One panel for all names below a prefix.
GROUPS = {"evaluation": "held-out", "reward": "parts of the reward", "time": "seconds"}


class Panel(NamedTuple):
    """One plot: metric names and their labels."""

    title: str
    lines: tuple[tuple[str, str], ...]


def panels(names: Iterable[str]) -> list[Panel]:
    """The plots for these metrics: the known ones first, then the groups, then the rest by name."""
    names = list(names)
    found = [
        Panel(title, ((name, _label(name)),)) for name, title in FIRST.items() if name in names
    ]
    grouped: dict[str, list[str]] = {}
    for name in names:
        if name not in FIRST:
            grouped.setdefault(name.partition("/")[0], []).append(name)
    order = {prefix: place for place, prefix in enumerate(GROUPS)}
    for prefix in sorted(grouped, key=lambda p: (order.get(p, len(order)), p)):
        title = GROUPS.get(prefix, _label(prefix))
        lines = tuple((name, _label(name.partition("/")[2] or name)) for name in grouped[prefix])
        if prefix == "evaluation":  # scores and lengths: each its own scale
            found += [Panel(f"{title}: {line[1]}", (line,)) for line in lines]
        else:
            found.append(Panel(title, lines))
    return found


def _label(name: str) -> str:
    return name.replace("_", " ")


def points(steps: list[int], values: list[float | None]) -> tuple[list[int], list[float]]:
    """The steps at which a metric has a value, and the values."""
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    return [step for step, _ in known], [value for _, value in known]


def smooth(values: list[float], top: float | None = None) -> list[float] | None:
    """The mean of the values around each, cut off at `top`; None for a short or coarse curve."""
    count = len(values)
    if count < 40 or len(set(values)) < count / 4:
        return None
    half = max(2, count // 50)
    sums = [0.0, *itertools.accumulate(v if top is None else min(v, top) for v in values)]
    ends = [(max(0, i - half), min(count, i + half + 1)) for i in range(count)]
    return [(sums[high] - sums[low]) / (high - low) for low, high in ends]


def ceiling(name: str, values: list[float]) -> float | None:
    """Where the axis of a time ends, so that steps that also save do not flatten it, or None."""
    if not name.startswith("time/") or name in FIRST or len(values) < 4:
        return None
    usual = 2.5 * sorted(values)[math.ceil(0.75 * len(values)) - 1]
    return usual if 0 < usual < max(values) else None
