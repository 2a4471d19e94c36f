"""Reading a run's files, finished or not: what is unreadable is counted and noted."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from dgrpo.trainer.config import parse_file
from dgrpo.trainer.config.run import DONE, METRICS, ROLLOUTS, SETTINGS


@dataclass
class Stage:
    """One stage of a run."""

    name: str
    rollouts: list[Path]  # the files of its rollouts, by step
    finished: bool  # the run finished
    steps: list[int] = field(default_factory=list)
    # Each numeric metric at each of `steps`; None where it has no finite value.
    series: dict[str, list[float | None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what is not readable, or no finite number
    settings: dict = field(default_factory=dict)  # tree of its settings file; empty without one
    settings_text: str = ""  # the settings file as it is
    shown: bool = False  # in the charts at first


def read_run(folder: Path) -> list[Stage]:
    """The stages of a run, earliest first.

    Raises:
        ValueError: the folder holds none.
    """
    if not folder.is_dir():
        raise ValueError(f"run_dir: got {folder}, which is no folder, expected that of a run")
    folders = [folder] if (folder / METRICS).exists() else []
    inner = [path.parent for path in folder.glob(f"*/{METRICS}")]
    folders += sorted(inner, key=lambda path: ((path / METRICS).stat().st_mtime, path.name))
    if not folders:
        raise ValueError(
            f"run_dir: got {folder}, expected a run's folder: it, or a folder in it, has {METRICS}"
        )
    return [_stage(path) for path in folders]


def _stage(folder: Path) -> Stage:
    rollouts = sorted((folder / ROLLOUTS).glob("step-*.jsonl.gz"))
    stage = Stage(folder.name, rollouts, (folder / DONE).exists())
    path = folder / SETTINGS
    try:
        if path.exists():
            stage.settings, stage.settings_text = parse_file(path), path.read_text()
    except (ValueError, OSError):
        stage.notes.append(f"{SETTINGS}: unreadable")
    records, bad = read_lines((folder / METRICS).read_bytes())
    if bad:
        stage.notes.append(f"{METRICS}: {bad} unreadable line{'s' * (bad > 1)}")
    by_step: dict[int, dict] = {}
    for record in records:
        if isinstance(step := record.pop("step", None), int):
            by_step.setdefault(step, {}).update(record)
    stage.steps = sorted(by_step)
    lost = []
    for metric in dict.fromkeys(metric for step in stage.steps for metric in by_step[step]):
        values = [by_step[step].get(metric, "") for step in stage.steps]
        finite = [_finite(value) for value in values]
        if any(value is not None for value in finite):
            stage.series[metric] = finite
        steps = [step for step, value in zip(stage.steps, values, strict=True) if value is None]
        if steps:
            at = f"{len(steps)} steps from {steps[0]} on" if steps[1:] else f"step {steps[0]}"
            lost.append(f"{metric} at {at}")
    if lost:
        more = f" and {len(lost) - 4} more metrics" if len(lost) > 4 else ""
        stage.notes.append(f"not finite: {', '.join(lost[:4])}{more}")
    return stage


def _finite(value: object) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def read_lines(data: bytes) -> tuple[list[dict], int]:
    """The JSON objects of a file of lines, NaN as None, and how many other lines there are."""
    records, bad = [], 0
    for line in data.splitlines():
        try:
            record = json.loads(line, parse_constant=lambda _: None)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line.strip():
            bad += 1
    return records, bad


def read_rollouts(path: Path) -> tuple[list[dict], int]:
    """The rollouts of one file, up to where it is cut off; and how many are unreadable."""
    lines: list[bytes] = []
    cut = 0
    try:
        with gzip.open(path) as file:
            lines.extend(file)  # keeps what came before an error
    except (EOFError, zlib.error, OSError):
        cut = 1
    records, bad = read_lines(b"".join(lines))
    whole = [record for record in records if _is_rollout(record)]
    return whole, bad + cut + len(records) - len(whole)


def _is_rollout(record: dict) -> bool:
    text = record.get("text")
    pieces = isinstance(text, list) and all(isinstance(piece, str) for piece in text)
    return pieces and all(isinstance(record.get(key), int) for key in ("step", "group"))
