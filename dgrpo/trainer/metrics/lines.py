"""`metrics.jsonl`: one JSON object a step, appended; cut back when a run resumes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path


def plain(value: object) -> object:
    """A metric as a JSON value; what is not finite is null, as JSON has no NaN."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    number = float(value)  # type: ignore[arg-type]  # NumPy's and torch's scalars too
    return number if math.isfinite(number) else None


def cut(path: Path, step: int) -> int:
    """Keeps the lines up to `step`, and no unfinished last one; atomic. Returns how many went."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    kept = [line for line in lines if line.endswith(b"\n") and _step(line) <= step]
    if len(kept) == len(lines):
        return 0
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return len(lines) - len(kept)


def _step(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
