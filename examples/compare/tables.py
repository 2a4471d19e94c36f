"""Means with intervals, and the tables of the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.compare.raw import Raw

MAIN = "dgrpo"
SINGLE = ("sft", "kd", "grpo", "opd")  # what dGRPO has to stand up to
PAIRS = (
    *(("dgrpo", name) for name in SINGLE),
    *(("dgrpo-beta-1_0", name) for name in ("dgrpo", "kd", "opd", "sft-right")),
    ("dgrpo", "dgrpo-beta-0_1"),
    *((name, f"{name}-sampled") for name in ("dgrpo", "opd")),
    *((name, f"{name}-no-cold") for name in ("sft", "kd", "opd", "dgrpo")),
    *(("dgrpo", name) for name in ("sft-long", "sft-right", "sft-gold")),
    ("dgrpo-4x", "sft-4x"),
)
DRAWS = 10_000


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def estimate(right: np.ndarray, documents: Sequence[int], draws: int = DRAWS) -> Estimate:
    """The mean of (seeds, prompts) values with a 95 % percentile bootstrap interval.

    Seeds and whole documents are drawn with replacement, independently of each other, as each seed
    is scored on the same documents. With three seeds their part is a rough one, and rather too
    small. `documents` may go on beyond the prompts that were scored.
    """
    seeds, _ = right.shape
    _, group = np.unique(np.asarray(documents[: right.shape[1]]), return_inverse=True)
    sums = np.stack([np.bincount(group, row) for row in right])  # (seeds, documents)
    sizes = np.bincount(group)
    rng = np.random.default_rng(0)
    k = len(sizes)
    chosen = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
    drawn = rng.multinomial(k, np.full(k, 1 / k), size=draws)
    means = ((chosen @ sums) * drawn).sum(1) / (seeds * (drawn @ sizes))
    low, high = np.percentile(means, (2.5, 97.5))
    return Estimate(float(right.mean()), float(low), float(high))


def right(raw: Raw, method: str, kind: str) -> np.ndarray:
    """The scores of a method, (seeds, prompts) of 0 and 1; of a shared model (1, prompts)."""
    runs = [f"{method}/seed-{seed}" for seed in raw.seeds]
    runs = runs if runs[0] in raw.scores else [raw.about["shared"][method]]
    return np.array([[int(c) for c in raw.scores[run][kind]] for run in runs], float)


def difference(raw: Raw, a: str, b: str, kind: str) -> Estimate:
    """Method a minus method b, paired by seed and prompt."""
    return estimate(right(raw, a, kind) - right(raw, b, kind), raw.documents)


def cost(raw: Raw, method: str) -> tuple[float, float, float]:
    """Updates, completion tokens and seconds of a run: medians over the seeds, cold start aside."""
    ends = [raw.metrics[f"{method}/seed-{seed}"][-1] for seed in raw.seeds]
    keys = ("step", "completion_tokens", "seconds")
    updates, tokens, seconds = (float(np.median([end[key] for end in ends])) for key in keys)
    return updates, tokens, seconds


def write(raw: Raw, results: Path) -> str:
    """Writes table.md, and returns it."""
    parts = methods_table(raw), verdict(raw), pairs_table(raw), rates_table(raw)
    text = "\n\n".join(parts) + "\n"
    (results / "table.md").write_text(text)
    return text


def methods_table(raw: Raw) -> str:
    """A line for each method: right answers, dGRPO's lead, each seed, cost."""
    lines = [
        "| method | greedy, % right | sampled, % right | dGRPO minus it, greedy | seeds, greedy | "
        "updates | tokens | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    chance = 100 * raw.about["chance"]
    lines.append(f"| any number of the document | {chance:.0f} | | | | | | |")
    for name in ("base", "cold", "teacher", *raw.methods):
        greedy = right(raw, name, "greedy")
        cells = [name, show(estimate(greedy, raw.documents))]
        cells.append(show(estimate(right(raw, name, "sampled"), raw.documents)))
        cells += ["", "", "", "", ""]
        if len(greedy) == len(raw.seeds) > 1 or name in raw.methods:
            lead = difference(raw, MAIN, name, "greedy")
            cells[3] = "" if name == MAIN else show(lead, "+")
            cells[4] = ", ".join(f"{100 * row.mean():.1f}" for row in greedy)
        if name in raw.methods:
            updates, tokens, seconds = cost(raw, name)
            cells[5:] = [f"{updates:.0f}", f"{tokens / 1000:.0f}k", f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(raw: Raw) -> str:
    """Whether dGRPO stands at least level with the best single method, in a sentence each."""
    lines, single = [], [name for name in SINGLE if name in raw.methods]
    for kind in ("greedy", "sampled") if single else ():
        best = max(single, key=lambda name: right(raw, name, kind).mean())
        lead = difference(raw, MAIN, best, kind)
        word = (
            "is ahead of"
            if lead.low > 0
            else "is behind"
            if lead.high < 0
            else "equals, within the interval,"
        )
        lines.append(
            f"* {kind}: dGRPO {word} the best single method, {best}: {show(lead, '+')} points."
        )
    return "\n".join(lines)


def pairs_table(raw: Raw) -> str:
    """The differences that the page speaks of, paired by seed and prompt."""
    lines = ["| in points | greedy | sampled |", "|---|---|---|"]
    for a, b in PAIRS:
        if a in raw.methods and b in raw.methods:
            found = (show(difference(raw, a, b, kind), "+") for kind in ("greedy", "sampled"))
            lines.append(f"| {a} minus {b} | {' | '.join(found)} |")
    return "\n".join(lines)


def rates_table(raw: Raw) -> str:
    """The learning rates that were tried, the chosen one in bold."""
    chosen, tried = raw.about["rates"]["chosen"], raw.about["rates"]["tried"]
    lines = ["| family | learning rate: % right of the validation prompts |", "|---|---|"]
    for name, rate in chosen.items():
        cells = []
        for key, value in tried.items():
            own, text = key.split(" ")
            if own == name:
                mark = "**" if float(text) == rate else ""
                cells.append(f"{mark}{text}: {100 * value:.1f}{mark}")
        lines.append(f"| {name} | {', '.join(cells)} |")
    return "\n".join(lines)


def show(value: Estimate, sign: str = "") -> str:
    """In percent, "73.4 [69.9, 76.8]"."""
    mean, low, high = (f"{100 * v:{sign}.1f}" for v in value)
    return f"{mean} [{low}, {high}]"
