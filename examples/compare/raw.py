"""The raw results in a few compact files: written from the runs' folders, read by the report.

`metrics.jsonl.gz` has a line for each line of a run's metrics.jsonl, with the run's name, numbers
to five digits, and two sums from the first step on: `completion_tokens` (of completions trained on,
sampled or given) and `seconds` (of training, without evaluation). `scores.json` has each model's
right (1) and wrong (0) answers to the test prompts as a string. `about.json` says what ran.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import machine
from dgrpo.trainer.config import RunSettings
from examples.compare.plan import Plan
from examples.compare.work import SCORES

REWARD = "evaluation/reward"
RIGHT = "evaluation/right"  # the validation prompts in their order, as in scores.json
METRICS, ALL_SCORES, ABOUT = "metrics.jsonl.gz", "scores.json", "about.json"
# All others follow from the settings or from these.
KEPT = set(
    "step loss grad_norm lr skipped nll token_accuracy entropy divergence ratio clipped "
    "sampler_mismatch completion_length reward advantage truncated tokens memory/peak_gib "
    "time/step time/evaluation time/rollout time/teacher time/train".split()
) | {REWARD}


@dataclass(frozen=True)
class Raw:
    """What the files hold.

    Attributes:
        about: machine, versions, command, settings of the comparison, chosen and tried rates.
        metrics: the lines of each run, by its name such as "dgrpo/seed-1".
        scores: {"greedy": "0110...", "sampled": ...} of each model, by its run's name.
        documents: the document of each test prompt.
        validation: the document of each validation prompt.
    """

    about: dict[str, Any]
    metrics: dict[str, list[dict[str, Any]]]
    scores: dict[str, dict[str, str]]
    documents: list[int]
    validation: list[int]

    @property
    def seeds(self) -> list[int]:
        """The seeds of every method."""
        return self.about["compare"]["seeds"]

    @property
    def methods(self) -> list[str]:
        """The methods in the order of their file."""
        return self.about["methods"]


def metrics(stage: RunSettings) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    text = (Path(stage.out) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def collect(plan: Plan, rates: Mapping[str, float], results: Path) -> None:
    """Writes the three files from the runs of a plan."""
    results.mkdir(parents=True, exist_ok=True)
    lines, scores = [], {}
    documents: list[str] = []
    validation: list[str] = []
    for name, stage in _runs(plan, rates):
        lines += [json.dumps({"run": name, **line}) for line in _lines(stage, validation)]
        path = Path(stage.out) / SCORES
        if path.exists():
            found = json.loads(path.read_text())
            documents = found.pop("documents")
            scores[name] = found
    with gzip.GzipFile(results / METRICS, "wb", mtime=0) as file:
        file.write("".join(line + "\n" for line in lines).encode())
    ends = {"documents": _numbers(documents), "validation": _numbers(validation), "right": scores}
    (results / ALL_SCORES).write_text(json.dumps(ends, indent=0))
    answers = (plan.out / "answers.jsonl").read_text().splitlines()
    right = [json.loads(line)["right"] for line in answers]
    about = {
        "compare": plan.compare.model_dump(),
        "methods": plan.methods,
        "shared": {name: stages[-1] for name, stages in plan.shared.items()},
        "rates": json.loads((plan.out / "rates.json").read_text()),
        "teacher_answers_right": sum(right) / len(right),
        "chance": 1 / plan.task["chains"],
        "machine": machine(),
    }
    (results / ABOUT).write_text(json.dumps(about, indent=1) + "\n")


def read(results: Path) -> Raw:
    """What `collect` wrote.

    Raises:
        FileNotFoundError: there are no results in the folder.
    """
    about = json.loads((results / ABOUT).read_text())
    ends = json.loads((results / ALL_SCORES).read_text())
    found: dict[str, list[dict[str, Any]]] = {}
    with gzip.open(results / METRICS, "rt") as file:
        for text in file:
            line = json.loads(text)
            found.setdefault(line.pop("run"), []).append(line)
    return Raw(about, found, ends["right"], ends["documents"], ends["validation"])


def _runs(plan: Plan, rates: Mapping[str, float]) -> Iterator[tuple[str, RunSettings]]:
    """Every run with its name."""
    for stages in plan.shared.values():
        for name in stages:
            yield name, plan.stages[name]
    for seed in [plan.compare.rate_seed, *plan.compare.seeds]:
        yield f"cold/seed-{seed}", plan.cold(seed)
    for (name, rate), stage in plan.candidates().items():
        yield f"{name}/rate-{rate:g}", stage
    for method in plan.methods:
        for seed in plan.compare.seeds:
            yield f"{method}/seed-{seed}", plan.run(method, seed, rates)


def _lines(stage: RunSettings, validation: list[str]) -> Iterator[dict[str, Any]]:
    """The compact lines of one run; fills `validation` with the prompts' documents."""
    sampled, batch = stage.method.sequences == "rollout", stage.batch
    completions = batch.prompts * (stage.rollout.group_size if sampled else 1) / batch.updates
    tokens = seconds = between = 0.0
    for line in metrics(stage):
        # An evaluation lies between two steps and is counted with the later one.
        seconds += max(0.0, line.get("time/step", 0.0) - between)
        between = line.get("time/evaluation", 0.0) if line["step"] else 0.0
        tokens += completions * line.get("completion_length", 0.0)
        kept = {key: _short(value) for key, value in line.items() if key in KEPT}
        kept |= {"completion_tokens": round(tokens), "seconds": _short(seconds)}
        if REWARD in line:
            rows = _evaluation(stage, line["step"])
            kept[RIGHT] = "".join(str(int(row["reward"] or 0)) for row in rows)
            validation[:] = [row["id"].rpartition("-")[0] for row in rows]
        yield kept


def _evaluation(stage: RunSettings, step: int) -> list[dict[str, Any]]:
    path = Path(stage.out) / "evaluation" / f"step-{step:08d}-00000.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _numbers(names: list[str]) -> list[int]:
    """Each distinct name's number, in the order of their first place."""
    known: dict[str, int] = {}
    return [known.setdefault(name, len(known)) for name in names]
