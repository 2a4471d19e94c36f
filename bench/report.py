"""What a bench leaves behind: a table, and JSON with machine and command."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.machine import machine

RESULTS = Path(__file__).parent / "results"


def output_folder() -> Path:
    """$OUT where it is set, else bench/results."""
    return Path(os.environ.get("OUT") or RESULTS)


def console() -> Console:
    """A terminal wide enough for the tables, also where there is none."""
    width = Console().width
    return Console(width=max(width, 132), highlight=False)


def human(count: float | None) -> str:
    """Bytes in MiB or GiB."""
    if count is None:
        return ""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return "" if share is None else f"{100 * share:.0f} %"


def scientific(value: float | None) -> str:
    """An error with two digits."""
    return "" if value is None else f"{value:.1e}"


COLUMNS = {
    "ms": ("ms", lambda row: "" if row["ms"] is None else f"{row['ms']:.4g}"),
    "floor": ("of floor", lambda row: percent(row["floor_share"])),
    "peak": ("peak beyond in/out", lambda row: human(row["peak_bytes"])),
    "hidden": ("err dHidden", lambda row: scientific(row["error_hidden"])),
    "weight": ("err dW", lambda row: scientific(row["error_weight"])),
    "loss": ("err loss", lambda row: scientific(row["error_loss"])),
}


def print_rows(title: str, rows: Sequence[dict], columns: Iterable[str], out: Console) -> None:
    """One table of providers. rows: dictionaries of `harness.Row`. An empty column is left out."""
    columns = [name for name in columns if any(COLUMNS[name][1](row) for row in rows)]
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("provider", no_wrap=True)
    table.add_column("terms", no_wrap=True)
    for name in columns:
        table.add_column(COLUMNS[name][0], justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for row in rows:
        style = "bold" if row["ours"] else "dim" if row["absent"] else None
        cells = [COLUMNS[name][1](row) for name in columns]
        table.add_row(row["provider"], row["terms"], *cells, row["absent"], style=style)
    out.print(table)
    out.print()


def save(name: str, size: str, body: dict) -> Path:
    """Write `{name}-{size}.json`, machine and command included, and return its path."""
    folder = output_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{size}.json"
    report = {"bench": name, "size": size, "machine": machine(), **body}
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def load(name: str, size: str) -> dict:
    """The saved report of a bench; empty where there is none."""
    path = output_folder() / f"{name}-{size}.json"
    return json.loads(path.read_text()) if path.exists() else {}
