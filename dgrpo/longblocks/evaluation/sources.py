"""The rows that `dgrpo eval` was asked to score, from all of its sources."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from dgrpo.data import load_rows
from dgrpo.longblocks.evaluation.benchmarks import LOADERS
from dgrpo.longblocks.evaluation.evaluate import each
from dgrpo.longblocks.evaluation.made import made
from dgrpo.longblocks.evaluation.ruler import TASKS as RULER_TASKS
from dgrpo.longblocks.evaluation.ruler import ruler
from dgrpo.longblocks.tasks.catalog import TASKS
from dgrpo.text import BadRow


def rows_of(
    tokenizer,
    *,
    files: Sequence[str] = (),
    benchmarks: Sequence[str] = (),
    tasks: Sequence[str] = (),
    ruler_tasks: Sequence[str] = (),
    lengths: Sequence[int] = (4096,),
    count: int = 100,
    seed: int = 0,
    limit: int | None = None,
) -> Iterator[dict | BadRow]:
    """The rows of one source after the other.

    Args:
        tokenizer: measures the tasks that are made.
        files: of rows, see `dgrpo.data.load_rows`.
        benchmarks: each `NAME=FILE`, NAME one of `LOADERS`.
        tasks, ruler_tasks, lengths, count, seed: see `made` and `ruler`.
        limit: rows of each source at most.

    Raises:
        ValueError: a source that is not there.
    """
    sources: list[Iterable[dict | BadRow]] = [load_rows(path, split="test") for path in files]
    for text in benchmarks:
        name, _, path = text.partition("=")
        if name not in LOADERS or not path:
            raise ValueError(f"--benchmark: got {text!r}, expected NAME=FILE, NAME of {[*LOADERS]}")
        sources.append(LOADERS[name](path))
    for make, names in ((made, tasks), (ruler, ruler_tasks)):
        if names:
            sources.append(make(tokenizer, names, lengths, count, seed))
    for source in sources:
        yield from (row for _, row in islice(each(source), limit))


def task_names(tasks: str | None, ruler_tasks: str | None) -> tuple[list[str], list[str]]:
    """The names in the options `--tasks` and `--ruler`, "all" being those that there are.

    Raises:
        ValueError: a name in both, which would be counted as one task.
    """
    names = [
        [] if text is None else [*known] if text == "all" else text.split(",")
        for text, known in ((tasks, TASKS), (ruler_tasks, RULER_TASKS))
    ]
    if twice := sorted(set(names[0]) & set(names[1])):
        raise ValueError(
            f"--tasks: got {', '.join(twice)}, which --ruler has too; evaluate the two one by one, "
            "as a table has one row per name"
        )
    return names[0], names[1]
