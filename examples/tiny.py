"""The whole recipe from scratch on two CPU cores: `make train`, or

    python examples/tiny.py                 # runs/tiny: about four minutes
    python examples/tiny.py --arms          # then beta = 0 and A = 0 from the same cold start
    python examples/tiny.py --out DIR stages.dgrpo.steps=100     # settings over tiny.yaml

The settings are in tiny.yaml; training is `dgrpo.trainer` stage by stage. What is added here: the
tokenizer, two processes for the two models that do not depend on each other, and the table. An
interrupted run goes on with the same command; stages that are finished are not run again.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dgrpo.longblocks.evaluation import paired_bootstrap
from dgrpo.longblocks.evaluation.intervals import interval
from dgrpo.longblocks.tasks import train_tokenizer
from dgrpo.trainer import finished, train_stages
from dgrpo.trainer.config import RunSettings, load
from dgrpo.trainer.report import write_report
from dgrpo.trainer.signals import ENDING, Interrupted, listening

SETTINGS = Path(__file__).with_name("tiny.yaml")
BRANCHES = ("teacher", "cold")  # stages named so, and a number, run side by side
TEACHER, MAIN, ARMS = "teacher-5", "dgrpo", ("grpo", "distill")
STOPPED = 130  # exit status of a process of `side_by_side` that a signal stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not finished, prints the table; 0, or 128 and the number of a signal."""
    with listening() as asked:
        try:
            status = recipe(argv)
        except Interrupted:
            status = STOPPED
        if status == STOPPED:
            print("\nstopped; the same command goes on from here")
            return 128 + (asked.number or signal.SIGINT)
        return status


def recipe(argv: Sequence[str] | None) -> int:
    """What `main` does: 0, 2 for wrong settings, or STOPPED."""
    parser = argparse.ArgumentParser(description="The recipe with tiny models on a CPU.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over tiny.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder (runs/tiny)")
    parser.add_argument("--arms", action="store_true", help="also run beta = 0 and A = 0")
    options = parser.parse_args(argv)
    began, out = time.monotonic(), options.out
    try:
        stages = prepare(out, options.overrides)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    branches = {b: [n for n in stages if n.startswith(f"{b}-")] for b in BRANCHES}
    wanted = [branches, {MAIN: [MAIN]}, {arm: [arm] for arm in ARMS} if options.arms else {}]
    left = [
        n for part in wanted for names in part.values() for n in names if not finished(stages[n])
    ]
    if not all(run(out, options.overrides, stages, part) for part in wanted):
        return STOPPED
    print(f"\n{table(out, [n for n in (MAIN, *ARMS) if finished(stages[n])])}")
    report = write_report(out / MAIN)
    print(f"\nplot:   {report.curves}\nreport: {report.page}")
    if left:
        print(f"done in {(time.monotonic() - began) / 60:.1f} minutes")
    else:
        print(f"Everything was finished before; to start afresh: rm -r {shlex.quote(str(out))}")
    return 0


def prepare(out: Path, overrides: Sequence[str]) -> dict[str, RunSettings]:
    """The settings of each stage below `out`, where the tokenizer and they are written first."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / SETTINGS.name
    file.write_text(SETTINGS.read_text().replace("runs/tiny", out.as_posix()))
    stages = load(file, overrides)
    if not (out / "tokenizer").exists():
        print("== tokenizer from the standard library's sources", flush=True)
        train_tokenizer().save_pretrained(out / "tokenizer.tmp")
        os.rename(out / "tokenizer.tmp", out / "tokenizer")
    return stages


def run(
    out: Path, overrides: Sequence[str], stages: dict[str, RunSettings], parts: dict[str, list[str]]
) -> bool:
    """Trains the stages of each part, several parts in a process each; False where stopped."""
    parts = {p: names for p, names in parts.items() if not all(finished(stages[n]) for n in names)}
    if parts:
        print(f"\n== {' and '.join(parts)}", flush=True)
    if len(parts) > 1:
        return side_by_side(out, overrides, parts)
    torch.set_num_threads(1)
    chosen = {name: stages[name] for names in parts.values() for name in names}
    return not any(outcome.interrupted for outcome in train_stages(chosen).values())


def side_by_side(out: Path, overrides: Sequence[str], parts: dict[str, list[str]]) -> bool:
    """Trains each part in a process with one thread; False where a signal ended one."""
    context = multiprocessing.get_context("spawn")
    children = [
        context.Process(target=branch, args=(out, overrides, label, names))
        for label, names in parts.items()
    ]
    try:
        for child in children:
            child.start()
        for child in children:
            child.join()
    except Interrupted:
        started = [child for child in children if child.pid is not None]
        for child in started:
            child.terminate()
        for child in started:
            child.join()
        return False
    codes = {child.exitcode for child in children}
    if codes - {0, STOPPED, *(-number for number in ENDING)}:
        raise SystemExit(f"error: a stage failed, see above (exit statuses {sorted(codes)})")
    return codes == {0}


def branch(out: Path, overrides: Sequence[str], label: str, names: Sequence[str]) -> None:
    """What a process of `side_by_side` runs."""
    sys.stdout = Relay(sys.stdout, label)
    torch.set_num_threads(1)
    stages = load(out / SETTINGS.name, overrides)
    try:
        for name in names:
            if not finished(stages[name]):
                print(f"-- {name}")
            outcome = train_stages({name: stages[name]})[name]
            if outcome.status == "finished":
                print(f"-- {name} finished at step {outcome.step}")
            if outcome.interrupted:
                sys.exit(STOPPED)
    except KeyboardInterrupt:
        sys.exit(STOPPED)


class Relay(io.TextIOBase):
    """Lines of one process with its name in front; of the steps the first and every 25th."""

    def __init__(self, stream: io.TextIOBase, name: str):
        self.stream, self.name, self.line = stream, name, ""

    def write(self, text: str) -> int:
        """Writes the lines that are complete."""
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            step = re.match(r"step (\d+)", line)
            if step is None or int(step[1]) % 25 == 0 or step[1] == "1":
                self.stream.write(f"{self.name:8}{line}\n")
        self.stream.flush()
        return len(text)


def scores(folder: Path) -> list[dict[str, dict]]:
    """The held-out prompts by id with their rewards, before the first step and after the last."""
    files = sorted((folder / "evaluation").glob("step-*.jsonl"))
    found = [[json.loads(line) for line in f.read_text().splitlines()] for f in files]
    return [{row["id"]: row["reward"] or 0.0 for row in rows} for rows in (found[0], found[-1])]


def table(out: Path, arms: Sequence[str]) -> str:
    """Share of right answers after the cold start and after each arm, with the paired gains.

    All on the same prompts; documents, which have several prompts each, are what is resampled.
    """
    before, _ = scores(out / MAIN)
    documents = [name.rpartition("-")[0] for name in before]
    results = {"cold start": list(before.values())}
    for name in (TEACHER, *arms):
        after = scores(out / name)[1]
        results["teacher" if name == TEACHER else name] = [after[key] for key in before]

    def show(values: Sequence[float], sign: str = "") -> str:
        mean, low, high = (f"{100 * v:{sign}.1f}" for v in values[:3])
        return f"{mean:>6}  [{low}, {high}]"

    lead = f"{arms[0]}'s lead" if arms[1:] else ""
    lines = [
        f"{len(before)} held-out prompts of {len(set(documents))} documents, "
        "% right [95 % interval]; a number of the document at random: 25",
        f"{'':12}{'right':<24}{'gain over the cold start':<28}{lead}".rstrip(),
    ]
    for name, values in results.items():
        cells = [show(interval(values, documents))]
        if name in arms:
            gain = paired_bootstrap(values, results["cold start"], documents)
            cells.append(show(gain, "+"))
        if name in arms[1:]:
            cells.append(show(paired_bootstrap(results[arms[0]], values, documents), "+"))
        line = "".join(f"{c:<{w}}" for c, w in zip(cells, (24, 28, 0), strict=False))
        lines.append(f"{name:12}{line}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
