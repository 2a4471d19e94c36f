"""The files of `dgrpo data make`, by one process or several, from text that is tokenised once."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

from dgrpo.longblocks.tasks.catalog import TASKS, MakeSettings, make_row
from dgrpo.longblocks.tasks.corpus import Corpus, build_corpus
from dgrpo.longblocks.tasks.facts import Ground
from dgrpo.longblocks.tasks.rows import META, MakeResult, claim, part, write_part
from dgrpo.longblocks.tasks.tokenizer import load_tokenizer
from dgrpo.text import BadRow, Report

HAYSTACK, CODE_HAYSTACK = f"{META}/haystack", f"{META}/code"


def make(settings: MakeSettings, *, log: Callable[[str], None] = print, show=True) -> MakeResult:
    """Make all files that are not there yet; `show` a progress bar.

    Raises:
        ValueError: the folder holds data of other settings, or the haystack no text.
        RuntimeError: a worker process was killed.
    """
    from pyarrow.parquet import read_metadata
    from rich.progress import track

    out = Path(settings.out)
    kept = ("out", "processes")  # what changes nothing in the rows
    claim(out, {name: v for name, v in asdict(settings).items() if name not in kept})
    report = Report(log, out / META / "problems.jsonl")
    if settings.tokenizer == "bytes":
        log("lengths are counted in bytes; name a tokenizer to count its tokens")
    starts = list(range(0, settings.count, settings.file_rows))
    todo = [n for n in range(len(starts)) if not part(out, n).exists()]
    if len(todo) < len(starts):
        log(f"{len(starts) - len(todo)} of {len(starts)} files are there; making the rest")
    if todo:
        _prepare(out, settings, report, log)
        made = _run(settings, todo)
        for problems in track(made, "files", total=len(todo), disable=not show):
            for problem in problems:
                report.drop(problem)
    files = [part(out, n) for n in range(len(starts))]
    report.kept = sum(read_metadata(file).num_rows for file in files)
    if missing := settings.count - report.kept:  # those of earlier runs too
        report.counts["cannot be made"] = missing
    summary = {"rows": report.kept, "dropped": report.counts, "files": len(files)}
    (out / META / "summary.json").write_text(json.dumps(summary, indent=1))
    log(f"{report.summary()}; {len(files)} files in {out}")
    return MakeResult(report.kept, report, files)


def _prepare(out: Path, settings: MakeSettings, report: Report, log) -> None:
    """Tokenise the haystack into the folder, and one of Python code if code is asked for."""
    corpus = _corpus(out / HAYSTACK, settings, settings.haystack, report, log)
    if corpus.tokens < max(settings.tokens):
        log(f"the haystack has {corpus.tokens} tokens; longer documents repeat it")
    if any(TASKS[name][0] == "code" for name in settings.named) and not corpus.code:
        log("the haystack has no Python files; code tasks use the standard library")
        _corpus(out / CODE_HAYSTACK, settings, None, report, log)


def _corpus(folder: Path, settings: MakeSettings, haystack, report: Report, log) -> Corpus:
    """The split's part of the corpus in a folder, made where it is not there yet."""
    if not (folder / "files.json").exists():
        log("reading and tokenising the haystack")
        build_corpus(load_tokenizer(settings.tokenizer), haystack, report=report).save(folder)
    return Corpus.load(folder).part(settings.split)


def _run(settings: MakeSettings, todo: list[int]) -> Iterator[list[BadRow]]:
    """Make the files; yield for each the rows that could not be made."""
    _ground.cache_clear()  # an earlier call may have left other text in the folder
    if settings.processes == 1:
        yield from (_write_file(settings, n) for n in todo)
        return
    with ProcessPoolExecutor(min(settings.processes, len(todo)), get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_write_file, settings, n) for n in todo]):
            try:
                yield done.result()
            except BrokenProcessPool:
                raise RuntimeError(
                    "a worker process died, perhaps for want of memory; run again, with fewer "
                    "processes, to make the files that are missing"
                ) from None


@lru_cache(maxsize=1)  # once per process
def _ground(out: str, split: str, tokenizer: str) -> Ground:
    folders = [Path(out, name) for name in (HAYSTACK, CODE_HAYSTACK)]
    corpus, code = (Corpus.load(f).part(split) if f.exists() else None for f in folders)
    return Ground(corpus, load_tokenizer(tokenizer), code)


def _write_file(settings: MakeSettings, number: int) -> list[BadRow]:
    """Make the file `number`; return the rows that could not be made."""
    ground = _ground(settings.out, settings.split, settings.tokenizer)
    first, rows, problems = number * settings.file_rows, [], []
    for i in range(first, min(first + settings.file_rows, settings.count)):
        try:
            rows.append(make_row(ground, settings, i))
        except Exception as error:  # whatever goes wrong costs this row alone
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            problems.append(BadRow("cannot be made", f"{kind}{error}", f"row {i}"))
    write_part(Path(settings.out), number, rows)
    return problems
