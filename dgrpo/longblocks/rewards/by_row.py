"""The reward that each row of the data names for itself."""

import importlib
from collections.abc import Sequence

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
        function = _function(path, allow)
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


def _function(path: str, allow: Sequence[str]):
    module, _, name = path.rpartition(":")
    if path in allow:
        return getattr(importlib.import_module(module), name)
    home = importlib.import_module(HOME)
    if module not in ("", HOME) or name not in home.__all__ or name == "by_row":
        raise ValueError(
            f"reward: got a row with {path!r}, expected a function of {HOME}, or one that by_row's "
            "option allow lists"
        )
    return getattr(home, name)
