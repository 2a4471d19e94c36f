"""The page: data, style and script put into one HTML file."""

from __future__ import annotations

import html
import itertools
import json
import re
from importlib.resources import files as resources
from pathlib import Path

from dgrpo.trainer.report.panels import ceiling, panels, points, smooth
from dgrpo.trainer.report.read import Stage, read_rollouts
from dgrpo.trainer.report.summary import Settings, changes, facts, settings

_MOST_POINTS = 1500
SCRIPTS = ("elements.js", "overview.js", "charts.js", "list.js", "reader.js", "page.js")


def embed(value: object) -> str:
    """JSON that can stand in a script element: no `<` is left to end it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def make_page(title: str, stages: list[Stage], page_bytes: int) -> str:
    """The HTML text, with about `page_bytes` of rollouts; the page says how many it lacks."""
    common, own = settings(stages)
    limit = page_bytes // len(stages)
    names = dict.fromkeys(name for stage in stages for name in stage.series)
    data = {
        "title": title,
        "settings": common,
        "panels": [panel._asdict() for panel in panels(names)],
        "runs": [_run(stage, mine, limit) for stage, mine in zip(stages, own, strict=True)],
    }
    parts = {
        "TITLE": html.escape(title),
        "STYLE": _resource("page.css"),
        "SCRIPT": "".join(_resource(name) for name in SCRIPTS),
        "DATA": embed(data),
    }
    # One pass: what is put in is not searched again.
    return re.sub(r"@@([A-Z]+)@@", lambda match: parts[match.group(1)], _resource("page.html"))


def _resource(name: str) -> str:
    return resources("dgrpo.trainer.report").joinpath(name).read_text(encoding="utf-8")


def _run(stage: Stage, own: Settings, limit: int) -> dict:
    chosen, notes = choose(stage.rollouts, limit)
    return {
        "name": stage.name,
        "notes": stage.notes + notes,
        "facts": facts(stage),
        "changes": [change._asdict() for change in changes(stage)],
        "own": own,
        "file": stage.settings_text,
        "series": {name: _line(stage, name) for name in stage.series},
        "rollouts": chosen,
        "shown": stage.shown,
    }


def _line(stage: Stage, name: str) -> dict:
    steps, values = points(stage.steps, stage.series[name])
    top, last = ceiling(name, values), len(steps) - 1
    mean = smooth(values, top)
    kept = [*range(0, last, -(-len(steps) // _MOST_POINTS)), last]
    return {
        "steps": [steps[i] for i in kept],
        "values": [float(f"{values[i]:.5g}") for i in kept],
        "mean": [float(f"{mean[i]:.5g}") for i in kept] if mean else None,
        "top": top,
    }


def choose(paths: list[Path], limit: int) -> tuple[list[dict], list[str]]:
    """Rollouts of about `limit` bytes, by step, group and index; and notes on those left out.

    Whole steps, at least one; where not all fit, they are spread evenly and the rest is not read.
    """
    steps = [list(group) for _, group in itertools.groupby(paths, lambda p: p.name.split("-")[1])]
    chosen: list[dict] = []
    used = seen = unreadable = 0
    for place in spread(len(steps)):
        read = [read_rollouts(path) for path in steps[place]]
        records = [record for found, _ in read for record in found]
        used += len(embed(records).encode())
        if chosen and used > limit:
            break
        chosen += records
        seen += 1
        unreadable += sum(bad for _, bad in read)
    notes = [f"rollouts: {unreadable} unreadable"] if unreadable else []
    if seen < len(steps):
        notes.append(f"of {len(steps)} steps with rollouts, {seen} are on this page")
    return sorted(chosen, key=lambda r: (r["step"], r["group"], r.get("index", 0))), notes


def spread(count: int) -> list[int]:
    """0 … count - 1, every beginning spread over the whole: the last, halves back, quarters, …"""
    strides = [2**power for power in reversed(range(count.bit_length()))]
    return list(dict.fromkeys(i for stride in strides for i in range(count - 1, -1, -stride)))
