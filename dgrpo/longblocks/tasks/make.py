"""``dgrpo data make``: long-context tasks with verifiable answers, made from any text.

A row depends on the seed, its number and the settings alone, so that any number of processes makes
the same files, and a run that was interrupted goes on with the files that are missing. The text is
tokenised once; documents are put together by adding up counts (`dgrpo.longblocks.tasks.corpus`).
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from dgrpo.longblocks.tasks.corpus import Corpus, build_corpus, counter
from dgrpo.longblocks.tasks.facts import Ground
from dgrpo.longblocks.tasks.families import CODE, TASKS, MakeSettings, make_row
from dgrpo.longblocks.tasks.tracing import code_files
from dgrpo.text.problems import BadRow, Report

META = ".make"  # hidden, so that reading the folder reads the rows alone
HAYSTACK, CODE_HAYSTACK = f"{META}/haystack", f"{META}/code"


@dataclass(frozen=True)
class MakeResult:
    """What was made: rows written, rows that could not be made, and the files."""

    rows: int
    report: Report
    files: list[Path]


def make(settings: MakeSettings, *, log: Callable[[str], None] = print, show=True) -> MakeResult:
    """Make all files that are not there yet.

    Args:
        settings: what to make.
        log: receives messages.
        show: a progress bar.

    Raises:
        ValueError: the folder holds data of other settings, or the haystack no text.
        RuntimeError: a worker process was killed.
    """
    out = Path(settings.out)
    (out / META).mkdir(parents=True, exist_ok=True)
    kept = ("out", "processes")  # what changes nothing in the rows
    known = {name: v for name, v in dataclasses.asdict(settings).items() if name not in kept}
    claim(out / META / "settings.json", known)
    report = Report(log, out / META / "problems.jsonl")
    if settings.tokenizer == "bytes":
        log("lengths are counted in bytes; name a tokenizer to count its tokens")
    starts = list(range(0, settings.count, settings.file_rows))
    todo = [n for n in range(len(starts)) if not _file(out, n).exists()]
    if len(todo) < len(starts):
        log(f"{len(starts) - len(todo)} of {len(starts)} files are there; making the rest")
    if todo:
        _prepare(out, settings, report, log)
        for problems in _bar(_run(out, settings, todo), todo, show):
            for where, reason, detail in problems:
                report.drop(BadRow(reason, detail), where)
    files = [_file(out, n) for n in range(len(starts))]
    report.kept = sum(_rows_in(file) for file in files)
    if missing := settings.count - report.kept:  # those of earlier runs too
        report.counts["cannot be made"] = missing
    summary = {"rows": report.kept, "dropped": report.counts, "files": len(files)}
    (out / META / "summary.json").write_text(json.dumps(summary, indent=1))
    log(f"{report.summary()}; {len(files)} files in {out}")
    return MakeResult(report.kept, report, files)


def claim(file: Path, known: dict) -> None:
    """Note the settings of the data in a folder; refuse one that has data of others."""
    known = json.loads(json.dumps(known))
    if file.exists() and json.loads(file.read_text()) != known:
        raise ValueError(
            f"out: {file.parent.parent} holds data of other settings ({file}); "
            "name another folder or empty it"
        )
    file.write_text(json.dumps(known, indent=1))


def _prepare(out: Path, settings: MakeSettings, report: Report, log) -> None:
    """Tokenise the haystack into the folder, and one of Python code if code is asked for."""
    corpus = _corpus(out / HAYSTACK, settings, settings.haystack, report, log)
    if corpus.tokens < max(settings.tokens):
        log(f"the haystack has {corpus.tokens} tokens; longer documents repeat it")
    if set(settings.named) & set(CODE) and not code_files(corpus):
        log("the haystack has no Python files; code tasks use the standard library")
        _corpus(out / CODE_HAYSTACK, settings, None, report, log)


def _corpus(folder: Path, settings: MakeSettings, haystack, report: Report, log) -> Corpus:
    if not (folder / "files.json").exists():
        log("reading and tokenising the haystack")
        build_corpus(load_tokenizer(settings.tokenizer), haystack, report=report).save(folder)
    return Corpus.load(folder).part(settings.split)


def load_tokenizer(name: str):
    """The tokenizer of a folder or of the hub; ``"bytes"`` stays."""
    if name == "bytes":
        return name
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


_ground: Ground  # of a worker process


def _start(out: str, settings: MakeSettings) -> None:
    global _ground
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _ground = _load(Path(out), settings)


def _load(out: Path, settings: MakeSettings) -> Ground:
    corpus = Corpus.load(out / HAYSTACK).part(settings.split)
    files = code_files(corpus) if set(settings.named) & set(CODE) else []
    if (out / CODE_HAYSTACK).exists():
        files = code_files(Corpus.load(out / CODE_HAYSTACK).part(settings.split))
    return Ground(corpus, counter(load_tokenizer(settings.tokenizer)), files)


def _run(out: Path, settings: MakeSettings, todo: list[int]) -> Iterator[list]:
    if settings.processes == 1:
        ground = _load(out, settings)
        yield from (_write_file(ground, out, settings, n) for n in todo)
        return
    pool = ProcessPoolExecutor(
        min(settings.processes, len(todo)),
        get_context("spawn"),
        initializer=_start,
        initargs=(str(out), settings),
    )
    with pool:
        for done in as_completed([pool.submit(_work, str(out), settings, n) for n in todo]):
            try:
                yield done.result()
            except BrokenProcessPool:
                raise RuntimeError(
                    "a worker process died, perhaps for want of memory; run again, with fewer "
                    "processes, to make the files that are missing"
                ) from None


def _work(out: str, settings: MakeSettings, number: int) -> list:
    return _write_file(_ground, Path(out), settings, number)


def _write_file(ground: Ground, out: Path, settings: MakeSettings, number: int) -> list:
    """Make file ``number``, whole or not at all; returns the rows that could not be made."""
    import pyarrow
    import pyarrow.parquet

    first = number * settings.file_rows
    rows, problems = [], []
    for i in range(first, min(first + settings.file_rows, settings.count)):
        try:
            rows.append(make_row(ground, settings, i))
        except Exception as error:  # whatever goes wrong costs this row alone
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            problems.append((f"row {i}", "cannot be made", f"{kind}{error}"))
    file = _file(out, number)
    partial = file.with_suffix(".partial")
    table = pyarrow.Table.from_pylist(rows, schema=schema())
    pyarrow.parquet.write_table(table, partial, compression="zstd", row_group_size=16)
    os.replace(partial, file)
    return problems


def schema():
    """The columns of the files, as an Arrow schema."""
    import pyarrow as pa

    text, texts, whole = pa.string(), pa.list_(pa.string()), pa.int64()
    kinds = {
        **dict.fromkeys("id document source language question answer".split(), text),
        **dict.fromkeys("response_reference family task reward".split(), text),
        **dict.fromkeys("aliases items distractors passages passage_ids".split(), texts),
        "answerable": pa.bool_(),
        "points": pa.list_(texts),
        "form": text,
        "headings": texts,
        **dict.fromkeys("min_words max_words hops".split(), whole),
        "evidence": text,
        "privileged": text,
        "depths": pa.list_(pa.float64()),
        "tokens": whole,
        "seed": whole,
    }
    return pa.schema(list(kinds.items()))


def _file(out: Path, number: int) -> Path:
    return out / f"part-{number:05d}.parquet"


def _rows_in(file: Path) -> int:
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(file).num_rows


def _bar(results, todo: list[int], show: bool):
    """The results, with a progress bar over files while they come in."""
    if not show:
        yield from results
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task("files", total=len(todo))
        for result in results:
            progress.advance(bar)
            yield result


def length(text: str) -> int:
    """``"32k"`` as a number: k is 1024, M is 1024 squared."""
    factor = {"k": 1024, "m": 1024**2}.get(text[-1:].lower(), 1)
    digits = text[:-1] if factor > 1 else text
    try:
        return int(float(digits) * factor)
    except ValueError:
        raise ValueError(
            f"tokens: got {text!r}, expected a number such as 4096, 32k or 1M"
        ) from None


def main(argv: list[str] | None = None) -> int:
    """The command line; see ``dgrpo data make --help``. Returns the exit status."""
    parser = argparse.ArgumentParser("dgrpo data make", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("out", help="folder for the parquet files; a run that was interrupted goes on there")
    add("--count", type=int, default=1000, help="rows in all (%(default)s)")
    add("--tokens", default="32k", help="lengths, such as 4k,32k,1M (%(default)s)")
    add("--tokenizer", default="bytes", help="folder or hub name that measures lengths; or bytes")
    add("--seed", type=int, default=0, help="of everything (%(default)s)")
    add("--processes", type=int, default=os.cpu_count() or 1, help="how many (%(default)s)")
    add("--tasks", default="all", help=f"all, or some of {', '.join(TASKS)}")
    add("--haystack", help="folder of text or code to hide the facts in; default: Python's own")
    add("--split", default="train", help="train or test (%(default)s)")
    add("--endpoint", help="an OpenAI-compatible URL: a model asks questions about --documents")
    add("--model", help="its name there")
    add("--documents", help="folder of the documents to ask about")
    add("--key-variable", default="OPENAI_API_KEY", help="variable with its key (%(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.endpoint:
            from dgrpo.longblocks.tasks.synthesis import SynthesisSettings, synthesize

            settings = SynthesisSettings(
                out=args.out,
                endpoint=args.endpoint,
                model=args.model or "",
                documents=args.documents or "",
                count=args.count,
                tokens=max(map(length, args.tokens.split(","))),
                tokenizer=args.tokenizer,
                seed=args.seed,
                key_variable=args.key_variable,
            )
            return 0 if synthesize(settings).rows else 1
        settings = MakeSettings(
            out=args.out,
            tasks=tuple(args.tasks.split(",")),
            count=args.count,
            tokens=tuple(map(length, args.tokens.split(","))),
            tokenizer=args.tokenizer,
            haystack=args.haystack,
            split=args.split,
            seed=args.seed,
            processes=args.processes,
        )
        return 0 if make(settings).rows else 1
    except ValueError as error:
        parser.error(str(error))
