"""The head of the page: a run's settings, and where its metrics started and ended."""

from __future__ import annotations

import datetime
import math
from typing import Any, NamedTuple

import yaml

from dgrpo.trainer.config import PRESETS, describe
from dgrpo.trainer.report.panels import FIRST, points
from dgrpo.trainer.report.read import Stage

# The first three of these that a run has tell how it went.
OUTCOMES = ("reward", "evaluation/reward", "divergence", "token_accuracy", "loss")
# Told by `facts`, or without influence on the result.
_ELSEWHERE = {"out", "resume", "steps", "model.name", "teacher.name", "method.preset"}
_ASIDE = ("log.", "checkpoint.")
_ALWAYS = {"optimizer.lr", "batch.prompts"}
_LONGEST = 400
_DEFAULTS = {described.name: described.default for described in describe()}

Settings = list[tuple[str, str]]


class Change(NamedTuple):
    """Start and end of a metric."""

    title: str
    start: float
    end: float
    over: int  # start and end are each the mean of this many recorded values


def changes(stage: Stage) -> list[Change]:
    """Start and end of the metrics that tell how the run went; held-out scores are not averaged."""
    found = []
    for name in [name for name in OUTCOMES if name in stage.series][:3]:
        _, values = points(stage.steps, stage.series[name])
        over = 1 if name.startswith("evaluation/") else min(10, max(1, len(values) // 10))
        start, end = math.fsum(values[:over]) / over, math.fsum(values[-over:]) / over
        found.append(Change(FIRST[name], start, end, over))
    return found


def facts(stage: Stage) -> Settings:
    """Method, model, teacher, steps and time, as far as the run's files tell them."""
    values = _flat(stage.settings)
    total, last = values.get("steps"), stage.steps[-1] if stage.steps else 0
    steps = f"{last} of {total}" if total else f"{last}"
    found = [
        ("method", _text(values.get("method.preset") or "")),
        ("model", _model(values)),
        ("teacher", _teacher(values)),
        ("steps", f"{steps}, {'finished' if stage.finished else 'not finished'}"),
    ]
    times = []
    for name, what in (("time/step", "training"), ("time/evaluation", "evaluation")):
        seconds = math.fsum(value or 0.0 for value in stage.series.get(name, ()))
        if seconds:
            times.append(f"{datetime.timedelta(seconds=round(seconds))} {what}")
    return [(name, text) for name, text in [*found, ("time", ", ".join(times))] if text]


def _model(values: dict[str, Any]) -> str:
    name, config = values.get("model.name"), values.get("model.config")
    if name is None and isinstance(config, dict):
        name = f"{config.get('model_type')} from random weights"
    rank = values.get("model.lora.rank")
    return f"{name or ''}" + (f", LoRA of rank {rank}" if rank else "")


def _teacher(values: dict[str, Any]) -> str:
    kind = values.get("method.teacher")
    if kind == "none" or values.get("method.teacher_coef") == 0:
        return ""
    if kind == "self":
        return f"the policy itself, shown: {values.get('method.teacher_context')}"
    return f"{values.get('teacher.name') or ''}" + (" (endpoint)" if kind == "served" else "")


def settings(stages: list[Stage]) -> tuple[Settings, list[Settings]]:
    """The settings that all runs share, and each run's own.

    Of those that differ from their default, from what the run's method sets, or between the runs.
    """
    known = [stage for stage in stages if stage.settings]
    flat = [_flat(stage.settings) for stage in known]
    pairs = [(values, _defaults(values.get("method.preset"))) for values in flat]
    names = dict.fromkeys(
        name
        for values, default in pairs
        for name, value in values.items()
        if (name in _ALWAYS or value != default.get(name, ...))
        and name not in _ELSEWHERE
        and not name.startswith(_ASIDE)
    )
    common: Settings = []
    own: dict[int, Settings] = {id(stage): [] for stage in stages}
    for name in names:
        texts = [_text(_set(values.get(name), name, default)) for values, default in pairs]
        if len(set(texts)) == 1:
            common.append((name, texts[0]))
        else:
            for stage, text in zip(known, texts, strict=True):
                own[id(stage)].append((name, text))
    return common, [own[id(stage)] for stage in stages]


def _defaults(preset: Any) -> dict[str, Any]:
    return _DEFAULTS | _flat({"method": PRESETS.get(str(preset), {})})


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{dotted name: value}; what has no settings below it, such as a model's `config`, is whole."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        inner = isinstance(value, dict) and any(n.startswith(f"{name}.") for n in _DEFAULTS)
        flat |= _flat(value, f"{name}.") if inner else {name: value}
    return flat


def _set(value: Any, name: str, defaults: dict[str, Any]) -> Any:
    """A value; of a list of groups, such as the sources, only what was set of each."""
    if not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        return value
    return [
        {key: own for key, own in item.items() if own != defaults.get(f"{name}.{key}", ...)}
        for item in value
    ]


def _text(value: Any) -> str:
    """The value on one line of YAML."""
    text = value
    if not isinstance(value, str):
        text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False)
        text = text.removesuffix("...\n").strip()
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
