"""From a YAML file and command-line overrides to the settings of each stage, and back.

A file holds the settings of a run and, optionally, `stages`: a list of settings with a `name`,
each laid over the rest of the file. A stage that names a `method.preset` starts `method` anew.
A stage without a model of its own goes on from the stage before it; "stage:NAME" stands for the
exported model of any earlier one.

Overrides are `dotted.key=value`, the value in YAML: `optimizer.lr=1e-6` holds in all stages that
do not start that group anew, `stages.NAME.optimizer.lr=1e-6` in one.
"""

import copy
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dgrpo.trainer.config.help import explain
from dgrpo.trainer.config.run import EXPORT, RunSettings
from dgrpo.trainer.config.settings import Settings


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: 1e-6 is a float, as it is not in YAML 1.1."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$|^[-+]\.\d+$"),
    list("-+0123456789."),
)


def load(
    path: str | Path | None, overrides: Sequence[str] = (), stage: str | None = None
) -> dict[str, RunSettings]:
    """The settings of each stage, by its name ("" for a file without stages), in order.

    `path` may be None: then all comes from the overrides. `stage` picks one. Raises ValueError
    with one line per wrong setting.
    """
    stages = merge_stages(override({} if path is None else parse_file(path), overrides))
    if stage is not None:
        if list(stages) == [""]:
            where = path or "the command"
            raise ValueError(f"stage: got {stage!r}, but {where} has no stages; leave --stage out")
        if stage not in stages:
            raise ValueError(f"stage: got {stage!r}, expected one of {list(stages)}")
        stages = {stage: stages[stage]}
    return {
        name: validate(values, f"stages.{name}." if name else "") for name, values in stages.items()
    }


def parse_file(path: str | Path) -> dict[str, Any]:
    """The tree of a YAML file; an empty file is an empty tree. ValueError of one line if none."""
    what = f"settings file: got {str(path)!r}"
    hint = "expected keys and values in YAML, such as a file of examples/"
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ValueError(f"{what}, expected an existing file") from None
    except IsADirectoryError:
        raise ValueError(f"{what}, which is a folder, expected a file") from None
    except UnicodeDecodeError as error:
        place = f"byte {error.start}: {error.object[error.start]:#04x}"
        raise ValueError(f"{what}, which is no text in UTF-8 ({place}); {hint}") from None
    except yaml.YAMLError as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{what}, which is not YAML: {text}; {hint}") from None
    if not isinstance(tree, dict | None):
        kind = type(tree).__name__
        raise ValueError(f"{what}, which holds a {kind}, expected keys and values")
    return tree or {}


def override(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tree` with each "dotted.key=value" set, in the base and in the stages that set it too."""
    tree = copy.deepcopy(tree)
    for text in overrides:
        dotted, equals, value = text.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise ValueError(f"override: got {text!r}, expected key=value, e.g. optimizer.lr=1e-6")
        try:
            parsed = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"override: got {text!r}, expected a YAML value: {error}") from None
        stages = tree.get("stages") or []
        if keys[0] == "stages":
            named = [s for s in stages if len(keys) > 2 and s.get("name") == keys[1]]
            if not named:
                raise ValueError(
                    f"override: got {text!r}, expected stages.NAME.key=value with NAME one of "
                    f"{[s.get('name') for s in stages]}"
                )
            _set(named[0], keys[2:], parsed)
            continue
        before = merge_stages(tree)
        for values in [tree, *(own for own in stages if _get(own, keys) is not None)]:
            _set(values, keys, parsed)
        seen = keys == ["out"] or any(_get(own, keys) == parsed for own in before.values())
        if stages and not seen and merge_stages(tree) == before:
            raise ValueError(
                f"override: {text!r} changes no stage, for each starts {keys[0]!r} anew; "
                f"write stages.NAME.{text}"
            )
    return tree


def merge_stages(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The full tree of each stage by its name; {"": tree} for a file without stages."""
    base = {key: value for key, value in tree.items() if key != "stages"}
    stages = tree.get("stages") or []
    if not stages:
        return {"": base}
    if not isinstance(stages, list) or not all(isinstance(s, dict) for s in stages):
        raise ValueError("stages: expected a list of settings, each with a name")
    out = Path(str(base.get("out", RunSettings.model_fields["out"].default)))
    merged: dict[str, dict[str, Any]] = {}
    for index, difference in enumerate(stages):
        difference = copy.deepcopy(difference)
        name = difference.pop("name", None)
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or name in merged:
            raise ValueError(
                f"stages.{index}.name: got {name!r}, expected a name of letters, digits, - "
                "and _ that no other stage has"
            )
        values = copy.deepcopy(base)
        model = difference.get("model") or {}
        if index and not {"name", "config"} & set(model):
            previous = {"name": f"stage:{list(merged)[-1]}", "config": None, "tokenizer": None}
            values["model"] = {**(values.get("model") or {}), **previous, "revision": None}
        elif "name" in model or "config" in model:
            for key in ("name", "config", "tokenizer", "revision"):
                (values.get("model") or {}).pop(key, None)
        if "preset" in (difference.get("method") or {}):
            values.pop("method", None)
        values = _merge(values, difference)
        values["out"] = str(out / name)
        for group, key in product(("model", "teacher"), ("name", "tokenizer")):
            value = (values.get(group) or {}).get(key)
            if isinstance(value, str) and value.startswith("stage:"):
                stage = value.removeprefix("stage:")
                if stage not in merged:
                    raise ValueError(
                        f"{group}.{key}: got {value!r}, expected an earlier stage: {list(merged)}"
                    )
                values[group][key] = str(out / stage / EXPORT)
        merged[name] = values
    return merged


def validate(values: dict[str, Any], prefix: str = "") -> RunSettings:
    """Checked settings; ValueError with a line per wrong one, each under its dotted name."""
    try:
        return RunSettings.model_validate(values)
    except ValidationError as error:
        lines = dict.fromkeys(prefix + explain(problem) for problem in error.errors())
        raise ValueError("\n".join(lines)) from None


def dump(settings: Settings) -> str:
    """Settings as YAML, every value written out; `load` gives them back."""
    return yaml.safe_dump(settings.model_dump(), sort_keys=False, allow_unicode=True)


def _merge(base: dict[str, Any], difference: dict[str, Any]) -> dict[str, Any]:
    """`difference` over `base`, group by group; lists and values are replaced."""
    merged = dict(base)
    for key, value in difference.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "config"
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _set(tree: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[keys[-1]] = value


def _get(tree: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
