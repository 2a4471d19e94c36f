"""`make train`: from nothing to the table; interrupted, resumed, and run once more."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dgrpo.longblocks.evaluation import paired_bootstrap
from examples import tiny

ROOT = Path(__file__).parents[2]
SUPERVISED = [*(f"teacher-{i}" for i in range(1, 6)), *(f"cold-{i}" for i in range(1, 5))]
LEAST = [
    *(f"stages.{name}.steps={40 if name == 'teacher-1' else 1}" for name in SUPERVISED),
    *(f"stages.{name}.batch.prompts=2" for name in SUPERVISED),
    "stages.dgrpo.steps=2",
    "stages.dgrpo.batch.prompts=2",
    "evaluate.count=8",
]


def interrupt_once_there(path: Path) -> threading.Thread:
    """Sends this process Ctrl-C as soon as the file at `path` has a line."""

    def wait() -> None:
        while not (path.exists() and path.stat().st_size):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_an_interrupted_run_goes_on_and_a_finished_one_prints_its_table(tmp_path, capfd):
    out = tmp_path / "tiny"
    thread = interrupt_once_there(out / "teacher-1" / "metrics.jsonl")
    status = tiny.main(["--out", str(out), *LEAST])
    thread.join()
    text = capfd.readouterr().out
    assert status == 130 and "the same command goes on" in text, text
    assert not (out / "teacher-1" / "done.yaml").exists()

    assert tiny.main(["--out", str(out), *LEAST]) == 0
    text = capfd.readouterr().out
    assert "going on from the checkpoint of step" in text
    assert "8 held-out prompts of 2 documents" in text and "cold start" in text
    assert all((out / "dgrpo" / name).exists() for name in ("curves.png", "report.html"))
    before = (out / "dgrpo" / "metrics.jsonl").read_text()

    assert tiny.main(["--out", str(out), *LEAST]) == 0
    again = capfd.readouterr().out
    assert f"to start afresh: rm -r {out}" in again
    assert "gain over the cold start" in again and "step 1" not in again
    assert (out / "dgrpo" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_gives_its_status(tmp_path, number, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "prepare", lambda *_: os.kill(os.getpid(), number))
    assert tiny.main(["--out", str(tmp_path)]) == 128 + number
    assert "the same command goes on" in capsys.readouterr().out


def test_bad_settings_are_named(tmp_path, capsys):
    assert tiny.main(["--out", str(tmp_path), "stages.dgrpo.stepz=3"]) == 2
    assert "did you mean steps?" in capsys.readouterr().err


def write_scores(folder: Path, step: int, rewards: list[float]) -> None:
    """An evaluation file of two queries a document."""
    path = folder / "evaluation" / f"step-{step:08d}-00000.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": f"doc-{i // 2}-{i % 2}", "reward": r} for i, r in enumerate(rewards)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_table_pairs_prompts_and_resamples_documents(tmp_path):
    write_scores(tmp_path / "dgrpo", 0, [1, 0] * 20)
    write_scores(tmp_path / "dgrpo", 9, [1, 1] * 20)
    write_scores(tmp_path / "teacher-5", 0, [1, 1] * 20)
    write_scores(tmp_path / "grpo", 0, [1, 0] * 20)
    write_scores(tmp_path / "grpo", 9, [1, None] * 20)  # a failed reward counts as wrong
    lines = tiny.table(tmp_path, ["dgrpo", "grpo"]).splitlines()
    assert "40 held-out prompts of 20 documents" in lines[0]
    assert lines[2].split() == ["cold", "start", "50.0", "[50.0,", "50.0]"]
    assert lines[3].split()[0] == "teacher"
    assert lines[4].endswith("+50.0  [+50.0, +50.0]")  # every document gains the same
    assert "+0.0  [+0.0, +0.0]" in lines[5] and lines[5].endswith("+50.0  [+50.0, +50.0]")


@pytest.mark.slow
def test_the_recipe_learns_in_minutes(tmp_path):
    began = time.monotonic()
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "examples/tiny.py", "--out", str(tmp_path)]  # as make train has it
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    before, after = tiny.scores(tmp_path / "dgrpo")
    documents = [name.rpartition("-")[0] for name in before]
    gain = paired_bootstrap([after[name] for name in before], list(before.values()), documents)
    minutes = (time.monotonic() - began) / 60
    assert len(before) >= 200
    assert gain.low > 0 and gain.mean > 0.1, f"{gain} after {minutes:.1f} minutes"
