"""What the reports in a folder say about the contracts, as one short table.

python -m bench.summary [FOLDER]       $OUT, else bench/results
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.table import Table

from bench.machine import describe
from bench.report import console, human, output_folder, percent

BOTH = "policy+kl"


def load(folder: Path) -> dict[str, dict]:
    """The newest report of every bench in `folder`, by the bench's name."""
    found: dict[str, dict] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
        report = json.loads(path.read_text())
        if "bench" in report:
            found[report["bench"]] = report
    return found


def by_shape(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of both terms, grouped by shape and number of tokens."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["terms"] == BOTH:
            found.setdefault(f"{row['shape']}, N={row['tokens']}", []).append(row)
    return found


def least(rows: list[dict], key: str, *, ours: bool = False) -> dict | None:
    """The row with the least `key` on one side of the comparison."""
    here = [row for row in rows if row["ours"] == ours and row[key] is not None]
    return min(here, key=lambda row: row[key], default=None)


def speed(report: dict) -> list[tuple[str, str]]:
    """Share of the floor, and how much faster than whole logits and than the fastest pair."""
    lines = []
    for shape, rows in by_shape(report["rows"]).items():
        lines.append((shape, ""))
        whole = [row for row in rows if row["provider"].startswith("full logits")]
        rivals = least(whole, "ms"), least([row for row in rows if row not in whole], "ms")
        for row in rows:
            if row["ours"] and row["ms"] is not None:
                text = f"{row['ms']:.4g} ms, {percent(row['floor_share'])} of floor"
                for rival in filter(None, rivals):
                    text += f"; {rival['ms'] / row['ms']:.2f}x {rival['provider']}"
                lines.append(("  " + row["provider"], text))
    return lines


def memory(report: dict) -> list[tuple[str, str]]:
    """Peak bytes of ours and of the leanest rival."""
    lines = []
    for shape, rows in by_shape(report["rows"]).items():
        ours = least(rows, "peak_bytes", ours=True)
        rival = least(rows, "peak_bytes")
        text = human(ours["peak_bytes"]) if ours else "not measured"
        if rival:
            text += f"; {rival['provider']} {human(rival['peak_bytes'])}"
        lines.append((f"{shape}: peak beyond in/out", text))
    return lines


def precision(report: dict) -> list[tuple[str, str]]:
    """The worst error among our modes, and the best rival's."""
    lines = []
    for shape, rows in by_shape(report["rows"]).items():
        errors = [(max(r["error_hidden"], r["error_weight"]), r) for r in rows if r["error_weight"]]
        ours = [error for error, row in errors if row["ours"]]
        rival = min(((e, r["provider"]) for e, r in errors if not r["ours"]), default=None)
        text = f"ours at worst {max(ours):.1e}" if ours else "ours not measured"
        if rival:
            text += f"; best rival {rival[0]:.1e} ({rival[1]})"
        lines.append((f"{shape}: gradient error", text))
    return lines


def ceilings(report: dict) -> list[tuple[str, str]]:
    """The copy, and the fastest product for each output."""
    lines = [("copy, read and written", f"{report['copy_bytes_per_s'] / 1e12:.3g} TB/s")]
    for output in dict.fromkeys(row["output"] for row in report["rows"]):
        here = [r for r in report["rows"] if r["output"] == output and "tflops" in r]
        if here:
            best = max(here, key=lambda row: row["tflops"])
            text = f"{best['tflops']:.4g} TFLOP/s ({best['product']}, M = {best['M']})"
            lines.append((f"fastest product, {output} output", text))
    return lines


def parts(report: dict) -> list[tuple[str, str]]:
    """Each part's time and share of its own floor."""
    lines = [
        (row["part"], f"{row['ms']:.4g} ms, {percent(row['floor_ms'] / row['ms'])} of its floor")
        for row in report["rows"]
    ]
    total = sum(row["ms"] for row in report["rows"])
    return [*lines, ("sum of parts; step", f"{total:.4g} ms; {report['step_ms']:.4g} ms")]


def step(report: dict) -> list[tuple[str, str]]:
    """Seconds of a whole training step."""
    return [
        (row["provider"], row.get("absent") or f"{row['seconds']:.3g} s a step")
        for row in report["rows"]
    ]


SECTIONS = {
    "ceilings": ceilings,
    "parts": parts,
    "loss_speed": speed,
    "loss_memory": memory,
    "loss_precision": precision,
    "step": step,
}


def main() -> None:
    """Print the table of the folder named on the command line."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else output_folder()
    reports = load(folder)
    out = console()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column("what", no_wrap=True)
    table.add_column("found")
    for name, lines in SECTIONS.items():
        if name in reports:
            table.add_row(f"[bold]{name}[/bold]", "")
            for line in lines(reports[name]):
                table.add_row("  " + line[0], line[1])
    out.print(table)
    for report in list(reports.values())[-1:]:
        out.print(f"[dim]{describe(report['machine'])}[/dim]")


if __name__ == "__main__":
    main()
