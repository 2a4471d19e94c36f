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
    over: int
    """Start and end are each the mean of this many recorded values."""


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
    found = []
    if stage.settings:
        found += [
            ("method", _text(_get(stage.settings, "method.preset"))),
            ("model", _model(stage.settings)),
            ("teacher", _teacher(stage.settings)),
        ]
    total = _get(stage.settings, "steps")
    steps = f"{stage.steps[-1] if stage.steps else 0}" + (f" of {total}" if total else "")
    found.append(("steps", f"{steps}, {'finished' if stage.finished else 'not finished'}"))
    training, evaluation = (
        math.fsum(value for value in stage.series.get(name, ()) if value is not None)
        for name in ("time/step", "time/evaluation")
    )
    if training:
        time = f"{duration(training)} training"
        time += f", {duration(evaluation)} evaluation" if evaluation else ""
        found.append(("time", time))
    return [(name, text) for name, text in found if text]


def _model(settings: dict) -> str:
    name, config = _get(settings, "model.name"), _get(settings, "model.config")
    if name is None and isinstance(config, dict):
        name = f"{config.get('model_type')} from random weights"
    rank = _get(settings, "model.lora.rank")
    return f"{name or ''}" + (f", LoRA of rank {rank}" if rank else "")


def _teacher(settings: dict) -> str:
    kind = _get(settings, "method.teacher")
    if kind == "none" or _get(settings, "method.teacher_coef") == 0:
        return ""
    if kind == "self":
        return f"the policy itself, shown: {_get(settings, 'method.teacher_context')}"
    return f"{_get(settings, 'teacher.name') or ''}" + (" (endpoint)" if kind == "served" else "")


def duration(seconds: float) -> str:
    """`8.5 s`, `0:04:05`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    return str(datetime.timedelta(seconds=round(seconds)))


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
        if (name in _ALWAYS or name not in default or value != default[name])
        and name not in _ELSEWHERE
        and not name.startswith(_ASIDE)
    )
    common: Settings = []
    own: dict[int, Settings] = {id(stage): [] for stage in stages}
    for name in names:
        texts = [_text(_without_defaults(_value(name, *pair), name, pair[1])) for pair in pairs]
        if len(set(texts)) == 1:
            common.append((name, texts[0]))
        else:
            for stage, text in zip(known, texts, strict=True):
                own[id(stage)].append((name, text))
    return common, [own[id(stage)] for stage in stages]


def _value(name: str, values: dict[str, Any], defaults: dict[str, Any]) -> Any:
    """The run's value of a setting, else its default; None in a group that is off."""
    parts = name.split(".")
    off = any(".".join(parts[:i]) in values for i in range(1, len(parts)))
    return values.get(name, None if off else defaults.get(name))


def _defaults(preset: Any) -> dict[str, Any]:
    chosen = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    return _DEFAULTS | _flat({"method": chosen})


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{dotted name: value}; what has no settings below it, such as a model's `config`, is whole."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        inner = isinstance(value, dict) and any(n.startswith(f"{name}.") for n in _DEFAULTS)
        flat |= _flat(value, f"{name}.") if inner else {name: value}
    return flat


def _without_defaults(value: Any, name: str, defaults: dict[str, Any]) -> Any:
    """A list of groups, such as the sources, with what was set of each."""
    if not isinstance(value, list):
        return value
    return [
        {k: v for k, v in item.items() if defaults.get(f"{name}.{k}", ...) != v}
        if isinstance(item, dict)
        else item
        for item in value
    ]


def _get(tree: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _text(value: Any) -> str:
    """The value on one line of YAML."""
    text = value
    if not isinstance(value, str):
        text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False)
        text = text.removesuffix("...\n").strip()
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
