"""The reward that each row of the data names for itself."""

import importlib
from collections.abc import Callable, Sequence

from dgrpo.extras import load_function
from dgrpo.longblocks.rewards.worker import HOME, WrongResult, columns_of


def by_row(prompts, completions, *, reward, allow: Sequence[str] = (), **columns) -> dict:
    """Score each sample by the function in its row's `reward` column.

    A row may name a function of `dgrpo.rewards` ("dgrpo.rewards:exact_match", "exact_match") or
    one that `allow` lists as "module:function"; data cannot have other code called. Parts are
    those of the functions, a sample having those of its own.

    Columns: `reward` (str), and what the functions read. Raises ValueError for any other name.
    """
    rows_of: dict[str, list[int]] = {}
    for row, path in enumerate(reward):
        rows_of.setdefault(str(path), []).append(row)
    parts: dict[str, list] = {"reward": [None] * len(completions)}
    for path, rows in rows_of.items():
        some = {name: [values[r] for r in rows] for name, values in columns.items()}
        some = {name: v for name, v in some.items() if any(x is not None for x in v)}
        function = function_of_row(path, allow)
        found = function([prompts[r] for r in rows], [completions[r] for r in rows], **some)
        try:
            found = columns_of(found, len(rows))
        except WrongResult as error:
            raise ValueError(f"reward {path!r}: {error}") from error
        for name, values in found.items():
            column = parts.setdefault(name, [None] * len(completions))
            for row, value in zip(rows, values, strict=True):
                column[row] = value
    return parts


def function_of_row(
    path: str, allow: Sequence[str] = (), homes: Sequence[str] = (HOME,)
) -> Callable:
    """The function that a row names, of a module in `homes` or in `allow`; else ValueError."""
    if path in allow:
        return load_function("reward", path)
    where, _, name = path.rpartition(":")
    where = where or HOME
    found = vars(importlib.import_module(where)).get(name) if where in homes else None
    if not callable(found) or name == "by_row":
        known = " or ".join([*(f"a function of {home}" for home in homes), *allow])
        raise ValueError(f"reward: got a row with {path!r}, expected {known}")
    return found
