"""What the settings say of themselves: the lines of `--help`, and what was wrong with a value."""

import difflib
import re
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, get_args, get_origin

from pydantic_core import PydanticUndefined

from dgrpo.trainer.config.method import PRESETS
from dgrpo.trainer.config.run import RunSettings
from dgrpo.trainer.config.settings import Settings


class Described(NamedTuple):
    """One setting: dotted name, type, default (None, or "required") and its one-line help."""

    name: str
    kind: str
    default: Any
    help: str


def describe(settings: type[Settings] = RunSettings, prefix: str = "") -> Iterator[Described]:
    """Every setting, in order; a group's own settings in its place."""
    for name, field in settings.model_fields.items():
        group = _group(field.annotation)
        if group is not field.annotation:
            default = field.get_default(call_default_factory=True)
            default = "required" if default is PydanticUndefined else default
            yield Described(f"{prefix}{name}", _kind(field.annotation), default, field.description)
        if group is not None:
            yield from describe(group, f"{prefix}{name}.")


def settings_help() -> str:
    """All settings with type, default and meaning, and the presets."""
    lines = ["settings (group.name=value, values in YAML):"]
    group = ""
    for name, kind, default, text in describe():
        head = name.rpartition(".")[0]
        if head != group:
            group = head
            lines.append("")
        shown = "null" if default is None else repr(default)
        shown = default if default == "required" else shown
        if len(shown) > 40:
            shown = shown[:37] + "..."
        lines.append(f"  {name}  ({kind}, {shown})")
        lines.append(textwrap.indent(textwrap.fill(text or "", 90), " " * 8))
    lines += ["", "method.preset sets, where not overridden:"]
    for name, values in PRESETS.items():
        shown = ", ".join(f"{key}={value}" for key, value in values.items()) or "the defaults above"
        lines.append(textwrap.indent(textwrap.fill(f"{name}: {shown}", 90), " " * 4))
    return "\n".join(lines)


def explain(problem: Any) -> str:
    """One line for one error of pydantic: "setting: got X, expected Y"."""
    place = [str(part) for part in problem["loc"]]
    inside = [part for part in place if not re.match(r"(float|int|str|Schedule|list)\b", part)]
    dotted = ".".join(inside)
    if problem["type"] == "extra_forbidden":
        return f"{dotted}: unknown setting{_nearest(dotted)}"
    if problem["type"] == "value_error":  # of a validator of ours: names a field of its group
        return f"{dotted}.{problem['ctx']['error']}".removeprefix(".")
    if problem["type"] == "missing":
        return f"{dotted}: missing, expected a value"
    expected = re.sub(r"^(Input|List) should (be )?", "", problem["msg"])
    return f"{dotted}: got {problem['input']!r}, expected {expected}"


def _group(annotation: Any) -> type[Settings] | None:
    """The settings class in an annotation: Lora in `Lora | None`, Reward in `list[Reward]`."""
    options = [annotation, *get_args(annotation)]
    found = [o for o in options if isinstance(o, type) and issubclass(o, Settings)]
    return found[0] if found else None


def _kind(annotation: Any) -> str:
    """A type as a reader of YAML wants it: "int", "sft|kd", "float|null"."""
    inner, origin = get_args(annotation), get_origin(annotation)
    if annotation is type(None):
        return "null"
    if not inner:
        return getattr(annotation, "__name__", str(annotation))
    if origin is Annotated:  # the type and its bounds
        return _kind(inner[0])
    kinds = [_kind(a) for a in inner]
    return f"{origin.__name__}[{', '.join(kinds)}]" if origin in (list, dict) else "|".join(kinds)


def _nearest(dotted: str) -> str:
    """ ", did you mean …?" for an unknown setting, or nothing."""
    names = {described.name for described in describe()}
    names |= {name.rpartition(".")[0] for name in names} - {""}
    tail = dotted.rpartition(".")[2]
    tails = {name.rpartition(".")[2]: name for name in sorted(names, key=len, reverse=True)}
    near = difflib.get_close_matches(dotted, names, n=1, cutoff=0.75)
    found = [tails[tail]] if tail in tails else near
    found = found or [tails[t] for t in difflib.get_close_matches(tail, tails, n=1)]
    return f", did you mean {found[0]}?" if found else ""
