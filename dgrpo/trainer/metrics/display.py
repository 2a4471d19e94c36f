"""Progress of a run: a live table on a terminal, one line per step elsewhere."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
from collections import deque
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


class Display:
    """Shows the last steps as a table with the time left; on no terminal, prints lines.

    A terminal or pipe that is closed meanwhile does not end the run. The time left is estimated
    from the steps after the first `done` ones. `live` None: on a terminal, but in no CI log.
    """

    def __init__(self, *, done: int = 0, live: bool | None = None):
        self.first, self.began = done, time.monotonic()
        self._rows: deque[Mapping[str, Any]] = deque(maxlen=_HISTORY)
        self._live: Any = None
        if live is None:
            dumb = os.environ.get("CI") or os.environ.get("TERM") == "dumb"
            live = sys.stdout.isatty() and not dumb
        if live:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(), auto_refresh=False)
            self._live.start()

    def update(self, record: Mapping[str, Any], total: int | None = None) -> None:
        """Shows a step's metrics, of a run of `total` steps; those that it lacks are left out."""
        step = record["step"]
        count, left = f"{step}/{total}" if total else f"{step}", self.time_left(step, total)
        if self._live is None:
            shown = [f"{title} {_cell(record, name, form)}" for name, title, form in _known(record)]
            self.message("  ".join([f"step {count}", *shown, *([f"left {left}"] if left else [])]))
            return
        self._rows.append(record)
        with contextlib.suppress(OSError):
            self._live.update(self._table(f"{count}  {left} left" if left else count), refresh=True)

    def time_left(self, step: int, total: int | None) -> str:
        """An estimate from the steps since the start, h:mm:ss; empty where there is none."""
        done = step - self.first
        if not total or done < 1 or step >= total:
            return ""
        seconds = (time.monotonic() - self.began) / done * (total - step)
        return str(datetime.timedelta(seconds=round(seconds)))

    def _table(self, caption: str) -> Any:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="dim", caption=caption)
        columns = _known(*self._rows)
        for title in ["step", *(title for _, title, _ in columns)]:
            table.add_column(title, justify="right", no_wrap=True)
        for row in self._rows:
            cells = [_cell(row, name, form) for name, _, form in columns]
            table.add_row(str(row["step"]), *cells, style="" if row is self._rows[-1] else "dim")
        return table

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


def _known(*records: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The columns that at least one of these steps has a number for."""
    return [column for column in COLUMNS if any(_cell(r, column[0], "{}") for r in records)]


def _cell(record: Mapping[str, Any], name: str, form: str) -> str:
    value = record.get(name)
    return form.format(value) if isinstance(value, int | float) else ""
