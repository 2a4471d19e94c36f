"""How long does a whole training step take, and where does its time go, beside TRL's GRPOTrainer?

python -m bench.step [--size tiny|cpu|gpu] [--steps 3] [--resume]

Rollouts, scoring (rewards, log-probabilities), the teacher's pass, and training (forward, backward,
optimiser), with the same model, prompts, lengths and group size: see bench/step_run.py. TRL has no
step with a teacher's full KL in it; dGRPO's row shows what that adds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.table import Table

from bench.machine import describe
from bench.report import console, human, percent, save
from bench.resume import saved
from bench.step_run import SIZES, VERBS, make_model, make_rows

PROVIDERS = {
    "ours: GRPO": "grpo",
    "TRL 1.16: GRPO": "trl",
    "ours: dGRPO": "dgrpo",
}


def run(provider: str, size: str, steps: int, folder: Path, seconds: float) -> dict:
    """One provider in a process of its own; `absent` says why it gave nothing."""
    command = [sys.executable, "-m", "bench.step_run", provider, size, str(steps), str(folder)]
    root = Path(__file__).parent.parent
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=seconds, cwd=root
        )
    except subprocess.TimeoutExpired:
        return {"absent": f"not done within {seconds:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"absent": lines[-1][:160] if lines else f"status {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(title: str, rows: list[dict]) -> Table:
    """Time, share of each verb, speed and memory."""
    found = Table(title=title, title_justify="left", box=None, pad_edge=False)
    found.add_column("trainer", no_wrap=True)
    for name in ("s/step", "tokens/s", *VERBS, "peak", "beyond before"):
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("note", overflow="fold")
    for row in rows:
        if row.get("absent"):
            found.add_row(row["provider"], *[""] * (len(VERBS) + 4), row["absent"], style="dim")
            continue
        found.add_row(
            row["provider"],
            f"{row['seconds']:.3g}",
            f"{row['tokens'] / row['seconds']:,.0f}",
            *[percent(row[verb] / row["seconds"]) for verb in VERBS],
            human(row["peak_bytes"]),
            human(row["step_bytes"]),
            "",
            style="bold" if row["provider"].startswith("ours") else None,
        )
    return found


def main() -> None:
    """Run every provider in turn, write step-SIZE.json after each, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "gpu" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--size", choices=sorted(SIZES), default=default, help=f"({default})")
    parser.add_argument("--steps", type=int, default=3, help="steps measured (3)")
    parser.add_argument("--seconds", type=float, default=300.0, help="for one trainer (300)")
    parser.add_argument(
        "--resume", action="store_true", help="run only the trainers that the saved report lacks"
    )
    options = parser.parse_args()
    size = SIZES[options.size]
    before = saved("step", options.size) if options.resume else {}
    same = before.get("steps") == options.steps
    rows = [row for row in before.get("rows", []) if same and not row.get("absent")]
    done = {row["provider"] for row in rows}
    out = console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(size, folder / "model")
        make_model(size, folder / "teacher", width=size.teacher, seed=1)
        make_rows(size, folder, count=size.prompts * (options.steps + 1))
        for label, provider in PROVIDERS.items():
            if label not in done:
                found = run(provider, options.size, options.steps, folder, options.seconds)
                rows.append({"provider": label, **found})
                save("step", options.size, {"steps": options.steps, "rows": rows})
    out.print(table(f"One training step: {size.as_text()}", rows))
    path = save("step", options.size, {"steps": options.steps, "rows": rows})
    report = json.loads(path.read_text())
    out.print(f"[dim]{describe(report['machine'])}; wrote {path.name}[/dim]")


if __name__ == "__main__":
    main()
