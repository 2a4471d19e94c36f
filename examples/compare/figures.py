"""The curves: right answers of the validation prompts over updates, tokens and seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from examples.compare.raw import REWARD, RIGHT, Raw
from examples.compare.tables import Estimate, estimate

MAIN = ("sft", "kd", "grpo", "opd", "dgrpo")
AXES = {
    "updates": "updates",
    "completion_tokens": "completion tokens trained on (thousands)",
    "seconds": "seconds of one core, cold start included",
}
# One panel each: title, methods.
QUESTIONS = {
    "weight of the divergence": ("grpo", "dgrpo-beta-0_1", "dgrpo", "dgrpo-beta-1_0", "opd"),
    "over the vocabulary or from the sampled token": (
        *("dgrpo", "dgrpo-sampled", "opd", "opd-sampled"),
    ),
    "stronger teacher or the policy on the evidence": (
        *("dgrpo", "dgrpo-self", "opd", "opd-self", "grpo"),
    ),
    "without the cold start": tuple(f"{name}-no-cold" for name in MAIN),
    "what SFT is given": ("sft", "sft-long", "sft-right", "sft-gold", "dgrpo"),
    "four times the prompts": ("sft", "sft-4x", "dgrpo", "dgrpo-4x"),
}


def draw(raw: Raw, results: Path) -> None:
    """Writes methods.png and questions.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, 3, sharey=True), AXES.items(), strict=True):
        _panel(raw, axis, MAIN, key)
        axis.set_xlabel(label)
    figure.savefig(results / "methods.png", dpi=110)
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    for axis, (title, names) in zip(
        figure.subplots(2, 3, sharey=True).flat, QUESTIONS.items(), strict=True
    ):
        axis.set_title(title, fontsize="medium")
        _panel(raw, axis, names, "updates")
        axis.set_xlabel(AXES["updates"])
    figure.savefig(results / "questions.png", dpi=110)


def curve(raw: Raw, method: str, key: str) -> tuple[list[float], list[Estimate]]:
    """Where on the axis a method was evaluated, and the share of right answers there.

    `key` is "updates", "completion_tokens" or "seconds", each with the cold start's own part where
    the method began after it; medians over the seeds, as another program may slow one run down.
    """
    runs = [raw.metrics[f"{method}/seed-{seed}"] for seed in raw.seeds]
    before = 0.0
    if not method.endswith("-no-cold"):
        colds = [raw.metrics[f"cold/seed-{seed}"][-1] for seed in raw.seeds]
        before = float(np.median([_place(end, key) for end in colds]))
    places, found = [], []
    for lines in zip(*([line for line in run if REWARD in line] for run in runs), strict=True):
        places.append(before + float(np.median([_place(line, key) for line in lines])))
        scores = np.array([[int(c) for c in line[RIGHT]] for line in lines], float)
        found.append(estimate(scores, raw.validation, draws=2000))
    return places, found


def _place(line: dict[str, Any], key: str) -> float:
    if key == "updates":
        return line["step"]
    return line[key] / 1000 if key == "completion_tokens" else line[key]


def _panel(raw: Raw, axis: Any, methods: tuple[str, ...], key: str) -> None:
    names = list(dict.fromkeys([*MAIN, *raw.methods]))
    for method in methods:
        if method not in raw.methods:
            continue
        # A main method has the same colour everywhere; the others of a panel take the rest.
        own = MAIN.index(method) if method in MAIN else len(MAIN) + names.index(method) % 5
        places, found = curve(raw, method, key)
        mean, low, high = (100 * np.array([getattr(e, f) for e in found]) for f in Estimate._fields)
        axis.plot(places, mean, color=f"C{own}", label=method, marker=".", linewidth=1.4)
        axis.fill_between(places, low, high, color=f"C{own}", alpha=0.12, linewidth=0)
    axis.axhline(100 * raw.about["chance"], color="grey", linestyle=":", linewidth=1)
    axis.set_ylabel("validation prompts right (%)")
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize="x-small", frameon=False)
