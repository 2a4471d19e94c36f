"""A report that is saved as soon as something is measured, and that a later run completes.

A row is final when it holds numbers or a reason that will not change. One that ran out of time
says so (`NOT_REACHED`) and is measured by the next run with `--resume` on the same machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from rich.console import Console

from bench.harness import NOT_REACHED, Row
from bench.machine import describe, machine
from bench.provider import Provider
from bench.report import load, save
from bench.sizes import Shape

UNFINISHED = 75  # exit status: run again with --resume (EX_TEMPFAIL of sysexits.h)


def saved(name: str, size: str) -> dict:
    """The report that an earlier run left for this bench, if it was made on such a machine."""
    report = load(name, size)
    here, there = machine(), report.get("machine", {})
    alike = all(here.get(key) == there.get(key) for key in ("gpu", "cpu", "versions"))
    return report if alike else {}


class Report:
    """Rows of one bench, by shape and provider."""

    def __init__(self, name: str, size: str, *, resume: bool):
        self.name, self.size = name, size
        self.rows: list[dict] = saved(name, size).get("rows", []) if resume else []

    def missing(self, providers: Iterable[Provider], shape: Shape) -> list[Provider]:
        """Those without a final row for this shape."""
        final = {row["provider"] for row in self.at(shape) if not _unreached(row)}
        return [provider for provider in providers if provider.name not in final]

    def at(self, shape: Shape) -> list[dict]:
        """The rows of one shape."""
        return [row for row in self.rows if _key(row) == (shape.name, shape.tokens)]

    def add(self, rows: Sequence[Row]) -> None:
        """Take rows in, in the place of earlier ones, and save."""
        new = {(*_key(row), row["provider"]): row for row in (row.as_json() for row in rows)}
        kept = [row for row in self.rows if (*_key(row), row["provider"]) not in new]
        together = [*kept, *new.values()]
        shapes = list(dict.fromkeys(map(_key, together)))
        self.rows = sorted(together, key=lambda row: shapes.index(_key(row)))
        save(self.name, self.size, {"rows": self.rows})

    def finish(self, out: Console, *, plot: bool) -> int:
        """Draw the rows, say where they are and on what they were measured.

        Returns:
            The exit status: 0, or `UNFINISHED` where rows ran out of time.
        """
        path = save(self.name, self.size, {"rows": self.rows})
        report = json.loads(path.read_text())
        written = [path.name]
        if plot:
            from bench.plots import draw

            written.append(draw(report, path.with_suffix(".png")).name)
        out.print(f"[dim]{describe(report['machine'])}; wrote {', '.join(written)}[/dim]")
        return UNFINISHED if any(map(_unreached, self.rows)) else 0


def _key(row: dict) -> tuple[str, int]:
    return row["shape"], row["tokens"]


def _unreached(row: dict) -> bool:
    return row["absent"].startswith(NOT_REACHED)
