"""The page: data, style and script put into one HTML file."""

from __future__ import annotations

import html
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
    names = dict.fromkeys(name for stage in stages for name in stage.series)
    data = {
        "title": title,
        "settings": common,
        "panels": [panel._asdict() for panel in panels(names)],
        "runs": [
            _run(stage, mine, page_bytes // len(stages))
            for stage, mine in zip(stages, own, strict=True)
        ],
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

    One group of every step, at least one in all, then the steps' other groups. Where not even one
    per step fits, the steps are spread evenly; files that nothing is taken from are not read.
    """
    by_step: dict[int, list[Path]] = {}
    for path in paths:
        by_step.setdefault(int(path.name.split("-")[1].split(".")[0]), []).append(path)
    steps = sorted(by_step)
    chosen: list[dict] = []
    others: list[tuple[int, list[dict]]] = []
    used = waiting = seen = unreadable = 0
    for place in spread(len(steps)):
        groups: dict[int, list[dict]] = {}
        for path in by_step[steps[place]]:
            records, bad = read_rollouts(path)
            unreadable += bad
            for record in records:
                groups.setdefault(record["group"], []).append(record)
        sized = [(len(embed(groups[g]).encode()), groups[g]) for g in sorted(groups)]
        if sized and chosen and used + sized[0][0] > limit:
            break
        seen += 1
        for size, group in sized[:1]:
            chosen += group
            used += size
        for size, group in sized[1:]:
            if waiting < limit:
                others.append((size, group))
                waiting += size
    left = 0
    for size, group in others:
        if used + size <= limit:
            chosen += group
            used += size
        else:
            left += len(group)
    notes = [f"rollouts: {unreadable} unreadable"] if unreadable else []
    if seen < len(steps):
        notes.append(f"of {len(steps)} steps with rollouts, {seen} are on this page")
    elif left:
        notes.append(f"{left} rollouts found no room on this page; all are in rollouts/")
    return sorted(chosen, key=lambda r: (r["step"], r["group"], r.get("index", 0))), notes


def spread(count: int) -> list[int]:
    """0 … count - 1, every beginning spread over the whole: last, first, middle, quarters, …"""
    order, parts = [count - 1, 0], 2
    while len(order) < 2 * count + 2:
        order += [round((count - 1) * i / parts) for i in range(1, parts, 2)]
        parts *= 2
    return [place for place in dict.fromkeys([*order, *range(count)]) if 0 <= place < count]
