"""A run's files, finished or not: what cannot be read is counted, never fatal."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from dgrpo.trainer.config import parse_file

METRICS = "metrics.jsonl"
ROLLOUTS = "rollouts"
SETTINGS = "settings.yaml"
DONE = "done.yaml"


@dataclass
class Stage:
    """One stage of a run."""

    name: str
    steps: list[int] = field(default_factory=list)
    series: dict[str, list[float | None]] = field(default_factory=dict)
    """Each numeric metric at each of `steps`; None where it has no finite value."""
    rollouts: list[Path] = field(default_factory=list)
    """The files of its rollouts, by step."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, or is not a finite number."""
    settings: dict = field(default_factory=dict)
    """The tree of its settings file; empty where there is none."""
    settings_text: str = ""
    """The settings file as it is."""
    finished: bool = False
    """Whether the run came to its end."""


def read_run(folder: Path) -> list[Stage]:
    """The stages of a run, earliest first. Raises ValueError where the folder holds none."""
    if not folder.is_dir():
        raise ValueError(f"run_dir: got {folder}, which is no folder, expected that of a run")
    folders = [folder] if (folder / METRICS).exists() else []
    inner = [path.parent for path in folder.glob(f"*/{METRICS}")]
    folders += sorted(inner, key=lambda path: ((path / METRICS).stat().st_mtime, path.name))
    if not folders:
        raise ValueError(
            f"run_dir: got {folder}, expected a run's folder: it, or a folder in it, has {METRICS}"
        )
    return [
        _stage(path, path.name if path != folder else folder.resolve().name) for path in folders
    ]


def _stage(folder: Path, name: str) -> Stage:
    stage = Stage(
        name,
        rollouts=sorted((folder / ROLLOUTS).glob("step-*.jsonl.gz")),
        finished=(folder / DONE).exists(),
    )
    _read_settings(stage, folder / SETTINGS)
    records, bad = read_lines((folder / METRICS).read_bytes())
    if bad:
        stage.notes.append(f"{METRICS}: {bad} unreadable line{'s' * (bad > 1)}")
    by_step: dict[int, dict] = {}
    for record in records:
        if isinstance(record.get("step"), int):
            by_step.setdefault(record["step"], {}).update(record)
    stage.steps = sorted(by_step)
    names = {name: None for step in stage.steps for name in by_step[step] if name != "step"}
    lost: dict[str, list[int]] = {}
    for metric in names:
        values = [_finite(by_step[step].get(metric)) for step in stage.steps]
        if any(value is not None for value in values):
            stage.series[metric] = values
        if steps := [step for step in stage.steps if _is_lost(by_step[step].get(metric, 0))]:
            lost[metric] = steps
    if lost:
        shown = [f"{metric} at {_count(steps)}" for metric, steps in lost.items()]
        more = f" and {len(shown) - 4} more metrics" if len(shown) > 4 else ""
        stage.notes.append(f"not finite: {', '.join(shown[:4])}{more}")
    return stage


def _read_settings(stage: Stage, path: Path) -> None:
    if not path.exists():
        return
    try:
        stage.settings, stage.settings_text = parse_file(path), path.read_text()
    except (ValueError, OSError):
        stage.notes.append(f"{SETTINGS}: unreadable")


def _count(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps from {steps[0]} on"


def _is_lost(value: object) -> bool:
    """Whether a metric was logged at a step, but as no finite number: the log writes null."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _finite(value: object) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def read_lines(data: bytes) -> tuple[list[dict], int]:
    """The JSON objects of a file of lines, and how many lines are none, such as a last half."""
    records, bad = [], 0
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line.strip():
            bad += 1
    return records, bad


def read_rollouts(path: Path) -> tuple[list[dict], int]:
    """The rollouts of one file, of one cut off those before; and how many are unreadable."""
    unpack = zlib.decompressobj(zlib.MAX_WBITS | 16)
    data, cut = b"", 0
    try:
        data = gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error, OSError):
        cut = 1
        try:
            data = unpack.decompress(path.read_bytes())
        except (zlib.error, OSError):
            data = b""
        data = data[: data.rfind(b"\n") + 1]
    records, bad = read_lines(data)
    whole = [record for record in records if _is_rollout(record)]
    return whole, bad + cut + len(records) - len(whole)


def _is_rollout(record: dict) -> bool:
    text = record.get("text")
    pieces = isinstance(text, list) and all(isinstance(piece, str) for piece in text)
    return pieces and all(isinstance(record.get(key), int) for key in ("step", "group"))
