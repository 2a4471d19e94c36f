"""The arguments of `dgrpo eval`, with the names of all tasks."""

from __future__ import annotations

import argparse

from dgrpo.longblocks.evaluation import LOADERS, RULER_TASKS
from dgrpo.longblocks.tasks.families import TASKS


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds what is to be scored, and where the results go."""
    add = command.add_argument
    add("arguments", nargs="*", metavar="FILE", help="rows: JSONL, parquet, a folder, as --rows")
    add(
        "--reward",
        metavar="PATH",
        help="scores all rows: a name in dgrpo.longblocks.rewards, module:function "
        "or file.py:function (each row's own column reward)",
    )
    add("--tasks", help=f"those of dgrpo data make, made here: all, or some of {', '.join(TASKS)}")
    add(
        "--ruler",
        metavar="TASKS",
        help="in the manner of RULER, made here: all, or some of " + ", ".join(RULER_TASKS),
    )
    add("--lengths", default="4096", help="lengths of these, such as 4k,32k (4096)")
    add("--count", type=int, default=100, help="items of each task and length (100)")
    add("--rows", action="append", default=[], metavar="FILE", help="rows to score")
    add(
        "--benchmark",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help=f"a user's file of {', '.join(LOADERS)}",
    )
    add("--lm-eval", metavar="TASKS", help="tasks of lm-eval by comma, where it is installed")
    add("--limit", type=int, help="items of each source at most (all)")
    add("--max-tokens", type=int, help="longest completion (the row's own, else 256)")
    add("--batch", type=int, default=8, help="prompts at once (8)")
    add("--against", metavar="JSON", help="earlier results.json: paired differences to it")
    add("--out", help="folder for results.json and the heat map")
