"""The arguments of `dgrpo eval`, and the rows that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from itertools import islice

from dgrpo.data import load_rows
from dgrpo.longblocks.evaluation import LOADERS, RULER_TASKS, made, ruler
from dgrpo.longblocks.evaluation.evaluate import each
from dgrpo.longblocks.tasks.catalog import TASKS
from dgrpo.longblocks.tasks.command import length
from dgrpo.text import BadRow


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add what is to be scored, and where the results go."""
    add = command.add_argument
    add("arguments", nargs="*", metavar="FILE", help="rows: JSONL, parquet, a folder, as --rows")
    text = "a name in dgrpo.longblocks.rewards, module:function or file.py:function"
    add("--reward", metavar="PATH", help=f"scores all rows: {text} (each row's own column reward)")
    add("--tasks", help=f"those of dgrpo data make, made here: all, or some of {', '.join(TASKS)}")
    text = f"in the manner of RULER, made here: all, or some of {', '.join(RULER_TASKS)}"
    add("--ruler", metavar="TASKS", help=text)
    add("--lengths", default="4096", help="lengths of these, such as 4k,32k (4096)")
    add("--count", type=int, default=100, help="items of each task and length (100)")
    add("--rows", action="append", default=[], metavar="FILE", help="rows to score")
    text = f"a user's file of {', '.join(LOADERS)}"
    add("--benchmark", action="append", default=[], metavar="NAME=FILE", help=text)
    add("--lm-eval", metavar="TASKS", help="tasks of lm-eval by comma, where it is installed")
    add("--limit", type=int, help="items of each source at most (all)")
    add("--max-tokens", type=int, help="longest completion (the row's own, else 256)")
    add("--batch", type=int, default=8, help="prompts at once (8)")
    add("--against", metavar="JSON", help="earlier results.json: paired differences to it")
    add("--out", help="folder for results.json and the heat map")


def task_names(tasks: str | None, ruler_tasks: str | None) -> tuple[list[str], list[str]]:
    """The names in `--tasks` and `--ruler`, "all" being those that there are.

    Raises ValueError for a name in both, which would be counted as one task.
    """
    names = [
        [] if text is None else [*known] if text == "all" else text.split(",")
        for text, known in ((tasks, TASKS), (ruler_tasks, RULER_TASKS))
    ]
    if twice := sorted(set(names[0]) & set(names[1])):
        way_out = "evaluate the two one by one, as a table has one row per name"
        raise ValueError(f"--tasks: got {', '.join(twice)}, which --ruler has too; {way_out}")
    return names[0], names[1]


def rows_of(
    tokenizer, options: argparse.Namespace, tasks: list[str], ruler_tasks: list[str]
) -> Iterator[dict | BadRow]:
    """The rows of one source after the other; `tasks` and `ruler_tasks` are from `task_names`.

    Raises ValueError where a source is not there.
    """
    sources: list[Iterable] = [load_rows(path, split="test") for path in options.rows]
    for text in options.benchmark:
        name, _, path = text.partition("=")
        if name not in LOADERS or not path:
            raise ValueError(f"--benchmark: got {text!r}, expected NAME=FILE, NAME of {[*LOADERS]}")
        sources.append(LOADERS[name](path))
    lengths = [length(text) for text in options.lengths.split(",")]
    for make, names in ((made, tasks), (ruler, ruler_tasks)):
        if names:
            sources.append(make(tokenizer, names, lengths, options.count, options.seed))
    for source in sources:
        yield from (row for _, row in islice(each(source), options.limit))
