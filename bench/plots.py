"""Draws a report of `bench.report` as a PNG.

python -m bench.plots FILE.json …      draw reports that were made on another machine
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import NullFormatter  # noqa: E402

OURS, RIVAL = "#1f6f8b", "#b8b8b8"
BOTH = "policy+kl"


def draw(report: dict, path: Path) -> Path:
    """Write the plot that belongs to `report["bench"]` to `path`."""
    DRAWINGS[report["bench"]](report)
    plt.savefig(path, dpi=130, bbox_inches="tight")
    plt.close("all")
    return path


def _shapes(rows: list[dict]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((row["shape"], row["tokens"]) for row in rows))


def speed(report: dict) -> None:
    """Milliseconds of the providers that compute both terms, the floor as a line."""
    rows = report["rows"]
    shapes = _shapes(rows)
    _, axes = plt.subplots(1, len(shapes), figsize=(2 + 5.5 * len(shapes), 4), squeeze=False)
    for axis, (shape, tokens) in zip(axes[0], shapes, strict=True):
        here = [r for r in rows if (r["shape"], r["tokens"]) == (shape, tokens)]
        here = [r for r in here if r["terms"] == BOTH and r["ms"] is not None]
        here.sort(key=lambda r: r["ms"])
        colours = [OURS if r["ours"] else RIVAL for r in here]
        axis.barh([r["provider"] for r in here], [r["ms"] for r in here], color=colours)
        axis.invert_yaxis()
        axis.set(xlabel="ms, forward and backward", title=f"{shape}, N = {tokens}")
        axis.spines[["top", "right"]].set_visible(False)
        if here:
            axis.axvline(here[0]["floor_ms"], color="black", linestyle=":", linewidth=1)
            axis.text(here[0]["floor_ms"], -0.6, " four GEMMs alone", fontsize=7, va="bottom")
    plt.tight_layout()


def memory(report: dict) -> None:
    """Peak bytes over the number of tokens, one line per provider."""
    rows = [r for r in report["rows"] if r["terms"] == BOTH and r["peak_bytes"] is not None]
    names = list(dict.fromkeys(r["shape"] for r in rows))
    _, axes = plt.subplots(
        1, max(1, len(names)), figsize=(6.5 * max(1, len(names)), 4), squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=False):
        here = [r for r in rows if r["shape"] == name]
        for provider in dict.fromkeys(r["provider"] for r in here):
            line = sorted((r["tokens"], r["peak_bytes"]) for r in here if r["provider"] == provider)
            ours = any(r["ours"] for r in here if r["provider"] == provider)
            axis.plot(
                [n for n, _ in line],
                [peak / 2**20 for _, peak in line],
                marker="o",
                linewidth=2.2 if ours else 1,
                linestyle="-" if ours else "--",
                label=provider,
            )
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=name)
        axis.set_xscale("log", base=2)
        axis.set_ylabel("peak beyond inputs and gradients, MiB")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def precision(report: dict) -> None:
    """The larger error of the two gradients, a dot a provider, on a log scale."""
    rows = [r for r in report["rows"] if r["error_hidden"] is not None]
    shapes = _shapes(report["rows"])
    names = list(dict.fromkeys((r["terms"], r["provider"], r["ours"]) for r in rows))
    names.sort(key=lambda name: (name[0] != BOTH, name[0]))
    size = (3 + 2.8 * len(shapes), 1 + 0.26 * len(names))
    _, axes = plt.subplots(1, len(shapes), figsize=size, squeeze=False, sharey=True)
    for axis, (shape, tokens) in zip(axes[0], shapes, strict=True):
        for place, (terms, provider, ours) in enumerate(names):
            for r in rows:
                if (r["shape"], r["tokens"], r["terms"]) == (shape, tokens, terms):
                    if r["provider"] == provider:
                        error = max(r["error_hidden"], r["error_weight"] or 0.0)
                        axis.plot(error, place, "o", color=OURS if ours else "dimgrey")
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.set_xlim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="both", color="#e5e5e5")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"{shape}, N = {tokens}", fontsize=9)
        axis.set_xlabel("relative error to fp64")
    axes[0][0].set_yticks(range(len(names)), [f"{name} ({terms})" for terms, name, _ in names])
    axes[0][0].invert_yaxis()
    plt.tight_layout()


DRAWINGS = {"loss_speed": speed, "loss_memory": memory, "loss_precision": precision}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(draw(json.loads(Path(name).read_text()), Path(name).with_suffix(".png")))
