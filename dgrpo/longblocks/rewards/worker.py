"""The process that calls rewards: JSON lines in, JSON lines out.

It is started by its path and imports the standard library, the rewards asked for and NumPy (to seed
it), but neither torch nor the host's main module. It gets the rewards first and answers when they
are imported. Then, any number of times, `{"data": ..., "seed": ...}` (no reply) and:

    {"call": i, "row": r}  -> {"values": {part: [...]}, "errors": [[row, text], ...]}
                              or {"error": text}: the call as a whole failed; with "wrong": true
                              for what is no list of n numbers. r null: all rows

What rewards print goes to the standard error of the host. The process ends with its host.
"""

import importlib
import importlib.util
import inspect
import json
import math
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HOME = "dgrpo.rewards"  # as rows of data name it
_SHOWN = 300  # characters of a wrong value in a message


class WrongResult(Exception):
    """A reward returned something else than one value per sample."""


def load(path: str) -> Callable:
    """The function that a path names.

    Args:
        path: "name" of `dgrpo.rewards`, "package.module:name" (installed, or in the current folder)
            or "folder/file.py:name".

    Raises:
        ValueError: no such module, file or function; an error during its import.
    """
    where, _, name = path.rpartition(":")
    where = where or HOME
    try:
        if where.endswith(".py"):
            module = _from_file(Path(where))
        else:
            if os.getcwd() not in sys.path:  # absent where the program is an installed command
                sys.path.append(os.getcwd())
            module = importlib.import_module(where)
    except Exception as error:
        text = "" if _absent(error, where) else "\n" + traceback.format_exc(limit=-3)
        raise ValueError(f"reward {path!r}: importing {where} failed: {error}{text}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, f in vars(module).items() if inspect.isfunction(f) and n[0] != "_"]
        known = sorted(getattr(module, "__all__", known))
        raise ValueError(
            f"reward {path!r}: {where} has no function {name!r}, expected one of {known}"
        )
    return function


def invoke(function: Callable, options: dict, data: dict, row: int | None = None) -> dict:
    """Call a reward on a row (None: all): `{"values": ..., "errors": ...}`, JSON-able.

    Args:
        data: a list per column, "prompts" and "completions" among them.

    Raises:
        WrongResult: a result that is not one value per sample.
        Exception: whatever the reward raises.
    """
    given = {k: list(values) if row is None else [values[row]] for k, values in data.items()}
    prompts, completions = given.pop("prompts"), given.pop("completions")
    n = len(completions)  # before a reward changes the list
    found = columns_of(function(prompts, completions, **{**given, **options}), n)
    values = {name: [_number(value) for value in part] for name, part in found.items()}
    rows = range(n) if row is None else [row]
    scores = zip(rows, values["reward"], found["reward"], strict=True)
    errors = [[r, f"got {_shown(x)}, expected a number"] for r, y, x in scores if y is None]
    return {"values": values, "errors": errors}


def answer(function: Callable, options: dict, data: dict, row: int | None) -> dict:
    """The reply to one call: that of `invoke`, or the error in one line with its place."""
    try:
        return invoke(function, options, data, row)
    except WrongResult as error:
        return {"error": str(error), "wrong": True}
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}{place}"}


def columns_of(result: Any, n: int) -> dict[str, list]:
    """What a reward returned for n completions as {part: n values}, "reward" among them.

    Raises `WrongResult` where it is neither n values nor a dict of them.
    """
    parts = dict(result) if isinstance(result, dict) else {"reward": result}
    if "reward" not in parts:
        names = sorted(map(str, parts))
        raise WrongResult(f'got a dict of {names}, expected the key "reward" in it')
    columns = {}
    for name, part in parts.items():
        part = part.tolist() if hasattr(part, "tolist") else part
        where = "" if name == "reward" else f"part {name!r}: "
        if not isinstance(part, list | tuple):
            wanted = f"expected a list of {n} numbers, one per completion"
            raise WrongResult(f"{where}got {_shown(part)}, {wanted}")
        if len(part) != n:
            raise WrongResult(f"{where}got {len(part)} values for {n} completions")
        columns[str(name)] = list(part)
    return columns


def pack(values: Sequence) -> dict:
    """A column as its different objects and the place of each row's: a group shares one object."""
    different = {id(value): value for value in values}
    places = {key: place for place, key in enumerate(different)}
    return {"values": list(different.values()), "index": [places[id(value)] for value in values]}


def unpack(column: dict) -> list:
    """The column that `pack` packed."""
    return [column["values"][i] for i in column["index"]]


def _number(value: Any) -> float | None:
    try:
        number = float(value) if not isinstance(value, str) else math.nan
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _shown(value: Any) -> str:
    """A value for a message, on one line and not too long."""
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return str(value)
    kind = "text" if isinstance(value, str) else type(value).__name__
    text = repr(value)
    return f"the {kind} {text if len(text) <= _SHOWN else text[:_SHOWN] + '...'}"


def _absent(error: Exception, where: str) -> bool:
    """Whether the module or file itself does not exist, so that no traceback is needed."""
    if where.endswith(".py"):
        return isinstance(error, OSError) and Path(error.filename or "") == Path(where).resolve()
    return isinstance(error, ModuleNotFoundError) and f"{where}.".startswith(f"{error.name}.")


def _from_file(path: Path):
    spec = importlib.util.spec_from_file_location(f"_reward_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def seed(number: int | None) -> None:
    """Seed Python's generator and NumPy's, which rewards may draw from; None leaves them."""
    if number is None:
        return
    random.seed(number)
    if find_spec("numpy"):
        import numpy

        numpy.random.seed(number % 2**32)


def _watch(parent: int) -> None:
    """End with the host, even while a reward hangs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    """Serve one host until it closes the pipe."""
    source = os.fdopen(os.dup(0), encoding="utf-8")
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()

    def reply(message: dict) -> None:
        sink.write(json.dumps(message) + "\n")
        sink.flush()

    start = json.loads(source.readline())
    sys.path[:] = start["sys_path"]
    seed(start["seed"])
    try:
        functions = [(load(r["path"]), r["options"]) for r in start["rewards"]]
    except ValueError as error:
        reply({"error": str(error)})
        return
    reply({"ready": True})
    data: dict = {}
    for line in source:
        request = json.loads(line)
        if "data" in request:
            seed(request["seed"])
            data = {name: unpack(column) for name, column in request["data"].items()}
            continue
        reply(answer(*functions[request["call"]], data, request["row"]))


if __name__ == "__main__":
    main()
