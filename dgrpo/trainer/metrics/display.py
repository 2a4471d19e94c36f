"""Progress of a run: a live table on a terminal, one line per step elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

# metric, title, format
COLUMNS = (
    ("loss", "loss", "{:.4g}"),
    ("reward", "reward", "{:.3f}"),
    ("divergence", "KL", "{:.4f}"),
    ("clipped", "clipped", "{:.2%}"),
    ("entropy", "entropy", "{:.3f}"),
    ("grad_norm", "grad norm", "{:.3g}"),
    ("lr", "lr", "{:.2e}"),
    ("time/tokens_per_second", "tokens/s", "{:,.0f}"),
    ("memory/peak_gib", "memory", "{:.1f} GiB"),
)
_HISTORY = 8


def is_terminal() -> bool:
    """Whether the output is a terminal that can be redrawn, and no CI log."""
    return sys.stdout.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"


def duration(seconds: float) -> str:
    """`1:02:03`, `4:05`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Display:
    """Shows the last steps as a table above a bar with the time left; on no terminal, prints lines.

    A terminal or pipe that is closed meanwhile does not end the run. The time left is estimated
    from the steps after the first `done` ones.
    """

    def __init__(self, total: int | None, *, done: int = 0, live: bool | None = None):
        self.total, self.first = total, done
        self.began = time.monotonic()
        self.rows: list[list[str]] = []
        self.titles: list[str] = []
        self._live: Any = None
        if is_terminal() if live is None else live:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(), auto_refresh=False)
            self._live.start()

    def update(self, record: Mapping[str, Any]) -> None:
        """Shows a step's metrics; those that it does not have are left out."""
        shown = [
            (title, form.format(record[name]))
            for name, title, form in COLUMNS
            if isinstance(record.get(name), int | float)
        ]
        step = record["step"]
        left = self.time_left(step)
        if self._live is None:
            count = f"step {step}/{self.total}" if self.total else f"step {step}"
            parts = [f"{title} {text}" for title, text in [*shown, ("left", left)] if text]
            self.message("  ".join([count, *parts]))
            return
        titles = ["step", *(title for title, _ in shown)]
        if titles != self.titles:
            self.rows, self.titles = [], titles
        self.rows = [*self.rows, [str(step), *(text for _, text in shown)]][-_HISTORY:]
        with contextlib.suppress(OSError):
            self._live.update(self._table(step, left), refresh=True)

    def time_left(self, step: int) -> str:
        """An estimate from the steps since the start; empty where there is none."""
        done = step - self.first
        if not self.total or done < 1 or step >= self.total:
            return ""
        return duration((time.monotonic() - self.began) / done * (self.total - step))

    def _table(self, step: int, left: str) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in self.titles:
            table.add_column(title, justify="right", no_wrap=True)
        for i, row in enumerate(self.rows):
            table.add_row(*row, style="" if i == len(self.rows) - 1 else "dim")
        if not self.total:
            return table
        line = Table.grid(padding=(0, 1))
        note = f"{step}/{self.total}" + (f"  {left} left" if left else "")
        line.add_row(ProgressBar(total=self.total, completed=step, width=40), Text(note))
        return Group(table, line)

    def message(self, text: str) -> None:
        """Prints a line above the table."""
        with contextlib.suppress(OSError):
            if self._live is None:
                print(text, flush=True)
            else:
                self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leaves the last table on the screen."""
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError):
                live.stop()
