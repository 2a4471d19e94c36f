"""The comparison of whole steps runs, and says what each trainer did."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_tiny_steps_of_all_trainers(tmp_path):
    command = [sys.executable, "-m", "bench.step", "--size", "tiny", "--steps", "1"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHONPATH": paths}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run(command, check=True, env=environment, cwd=ROOT, timeout=300)
    rows = json.loads((tmp_path / "step-tiny.json").read_text())["rows"]
    assert len(rows) == 3 and not any("absent" in row for row in rows)
    for row in rows:
        verbs = sum(row[verb] for verb in ("rollout", "score", "teacher", "train"))
        assert 0.5 * row["seconds"] < verbs <= 1.01 * row["seconds"]
        assert row["peak_bytes"] > row["step_bytes"] >= 0
    tokens = [row["tokens"] for row in rows]
    assert max(tokens) < 1.15 * min(tokens)  # the same work
