"""What does the README's table of costs say? Markdown from the saved reports, to be pasted.

    python -m bench.loss_speed && python -m bench.loss_memory && python -m bench.loss_precision
    python -m bench.readme              # of the CPU sizes; or of --size gpu

One table for the two terms together, one for single terms. A row needs a time; "of floor" is of the
floor measured in turns with that row.
"""

from __future__ import annotations

import argparse

from bench.machine import describe
from bench.reference import BOTH
from bench.report import human, load, percent

NEAR = "KL 0.01"  # the teacher of the precision column, in the shape's name


def columns(reports: dict[str, dict]) -> dict[str, dict[str, str]]:
    """Cells by heading, then by provider."""
    found: dict[str, dict[str, str]] = {}
    for row in reports["loss_speed"]["rows"]:
        name, tokens = row["shape"].replace(" /", "/"), row["tokens"]
        if row["ms"] is not None:
            found.setdefault(f"ms, {name}, N = {tokens}", {})[row["provider"]] = f"{row['ms']:.0f}"
            share = percent(row["floor_share"])
            found.setdefault(f"of floor, {name}, N = {tokens}", {})[row["provider"]] = share
    peaks = reports.get("loss_memory", {}).get("rows", [])
    counts = sorted({row["tokens"] for row in peaks})
    for tokens in dict.fromkeys(counts[:1] + counts[-1:]):
        here = {r["provider"]: human(r["peak_bytes"]) for r in peaks if r["tokens"] == tokens}
        found[f"peak, N = {tokens}"] = here
    errors = [r for r in reports.get("loss_precision", {}).get("rows", []) if r["error_hidden"]]
    near = [row for row in errors if row["shape"].endswith(NEAR)]
    found["error"] = {row["provider"]: f"{100 * row['error_hidden']:.2g} %" for row in near}
    return found


def table(providers: list[str], cells: dict[str, dict[str, str]]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| | " + " | ".join(cells) + " |", "|---" * (len(cells) + 1) + "|"]
    for name in providers:
        row = [cells[heading].get(name, "") for heading in cells]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return lines


def floors(rows: list[dict], cells: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """The same cells with a row for the four products alone, as measured beside the contract."""
    name = "four matrix products alone"
    for row in rows:
        heading = f"ms, {row['shape'].replace(' /', '/')}, N = {row['tokens']}"
        if row["ours"] and row["terms"] == BOTH and row["floor_ms"] is not None:
            cells[heading].setdefault(name, f"{row['floor_ms']:.0f}")
    return cells


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="cpu", choices=("tiny", "cpu", "gpu"))
    size = parser.parse_args(argv).size
    names = ("loss_speed", "loss_memory", "loss_precision")
    reports = {name: report for name in names if (report := load(name, size))}
    if "loss_speed" not in reports:
        raise SystemExit(f"loss_speed-{size}.json: not there; run python -m bench.loss_speed")
    rows = reports["loss_speed"]["rows"]
    cells = floors(rows, columns(reports))
    timed = [row for row in rows if row["ms"] is not None]
    timed.sort(key=lambda row: not row["ours"])
    both = dict.fromkeys(row["provider"] for row in timed if row["terms"] == BOTH)
    single = dict.fromkeys(row["provider"] for row in timed if row["terms"] != BOTH)
    print("\n".join(table(["four matrix products alone", *both], cells)))
    print("\n" + "\n".join(table(list(single), cells)))
    print("\n" + describe(reports["loss_speed"]["machine"]))


if __name__ == "__main__":
    main()
