"""The process that calls rewards: JSON in, JSON out. It imports neither torch nor the host's main.

It gets the rewards and replies when they are imported; then `{"data": ..., "seed": ...}` without a
reply and `{"call": i, "row": r}` (null: all rows), any number of times, with the reply of `answer`.
"""

import json
import math
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HOME = "dgrpo.rewards"  # as rows of data name it
_SHOWN = 300  # characters of a wrong value in a message


class WrongResult(Exception):
    """A reward returned something else than one value per sample."""


def invoke(function: Callable, options: dict, data: dict, row: int | None = None) -> dict:
    """Call a reward on a row (None: all) of `data`: a list per column, prompts and completions too.

    Returns `{"values": {part: [...]}, "errors": [[row, text], ...]}`. Raises `WrongResult`, and
    whatever the reward raises.
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
    """The result of `invoke`, or `{"error": text}`, with "wrong" where it is no list of numbers."""
    try:
        return invoke(function, options, data, row)
    except WrongResult as error:
        return {"error": str(error), "wrong": True}
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}{place}"}


def columns_of(result: Any, n: int) -> dict[str, list]:
    """What a reward returned as {part: n values}, "reward" among them; else `WrongResult`."""
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
    pipe = Connection(int(sys.argv[1]))
    os.set_inheritable(pipe.fileno(), False)
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()

    def reply(message: dict) -> None:
        pipe.send_bytes(json.dumps(message).encode())

    start = json.loads(pipe.recv_bytes())
    sys.path[:] = start["sys_path"]
    seed(start["seed"])
    try:
        from dgrpo.extras import load_function  # found on the host's path

        functions = [
            (load_function("rewards", r["path"], HOME), r["options"]) for r in start["rewards"]
        ]
    except ValueError as error:
        reply({"error": str(error)})
        return
    reply({"ready": True})
    data: dict = {}
    while True:
        request = json.loads(pipe.recv_bytes())
        if "data" in request:
            seed(request["seed"])
            data = {name: unpack(column) for name, column in request["data"].items()}
        else:
            reply(answer(*functions[request["call"]], data, request["row"]))


if __name__ == "__main__":
    with suppress(EOFError):  # the host has closed the pipe
        main()
