"""Questions about a user's documents, asked and judged by a language model behind an endpoint.

A model reads a stretch of a document and asks a question, with the answer and word-for-word
evidence. What is checked: the evidence must stand in the document, and a second pass (the same or
another model) must find that the document alone supports the answer and no other. What fails a
check, or the endpoint, is dropped with its reason and counted; the rest becomes rows like those of
:mod:`dgrpo.longblocks.tasks.make`.
"""

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dgrpo.endpoint import Endpoint
from dgrpo.longblocks.tasks.asking import KINDS, checked, judged, question_prompt, row_of
from dgrpo.longblocks.tasks.corpus import unit_cuts, unit_tokens
from dgrpo.longblocks.tasks.haystack import texts
from dgrpo.longblocks.tasks.make import META, MakeResult, claim, load_tokenizer, schema
from dgrpo.text.problems import BadRow, Report

UNREACHABLE = "endpoint unreachable"
GIVE_UP = 20  # requests in a row that reach nothing, after which the rest is not tried


@dataclass(frozen=True)
class SynthesisSettings:
    """What to ask.

    Attributes:
        out: folder for the parquet files; a run that was interrupted goes on there.
        endpoint: base address of an OpenAI-compatible server.
        model: its model that asks.
        documents: folder of text files.
        count: questions to ask (rows that pass are fewer).
        tokens: longest stretch of a document.
        tokenizer: folder or hub name that measures it, or ``"bytes"``.
        judge_endpoint, judge_model: who judges; empty: the one that asks.
        kinds: kinds of questions, asked for in turn.
        seed: of the stretches, and sent along.
        threads: requests at a time.
        key_variable, temperature, timeout, retries: see :class:`~dgrpo.endpoint.Endpoint`.
    """

    out: str
    endpoint: str
    model: str
    documents: str
    count: int = 100
    tokens: int = 32_768
    tokenizer: str = "bytes"
    judge_endpoint: str = ""
    judge_model: str = ""
    kinds: tuple[str, ...] = tuple(KINDS)
    seed: int = 0
    threads: int = 8
    key_variable: str = "OPENAI_API_KEY"
    temperature: float = 0.7
    timeout: float = 300.0
    retries: int = 2
    pause: float = 1.0

    def __post_init__(self):
        if not self.documents:
            raise ValueError("documents: got nothing, expected a folder of text files")
        unknown = set(self.kinds) - set(KINDS)
        if unknown or not self.kinds:
            raise ValueError(f"kinds: got {sorted(unknown)}, expected some of {', '.join(KINDS)}")

    def asker(self) -> Endpoint:
        """The endpoint that asks."""
        return self._at(self.endpoint, self.model, self.temperature)

    def judge(self) -> Endpoint:
        """The endpoint that judges, at temperature 0."""
        return self._at(self.judge_endpoint or self.endpoint, self.judge_model or self.model, 0.0)

    def _at(self, url: str, model: str, temperature: float) -> Endpoint:
        return Endpoint(
            url,
            model,
            self.key_variable,
            temperature,
            timeout=self.timeout,
            retries=self.retries,
            pause=self.pause,
        )


def synthesize(settings: SynthesisSettings, *, log: Callable[[str], None] = print) -> MakeResult:
    """Ask all questions that have not been asked yet, and write those that pass.

    Raises:
        ValueError: no readable document, or a folder with data of other settings.
    """
    asker, judge = settings.asker(), settings.judge()
    out = Path(settings.out)
    (out / META).mkdir(parents=True, exist_ok=True)
    kept = ("out", "threads", "timeout", "retries", "pause", "key_variable", "endpoint")
    known = {name: value for name, value in asdict(settings).items() if name not in kept}
    claim(out / META / "settings.json", known)
    report = Report(log, out / META / "problems.jsonl")
    stretches = _Stretches(settings, report)
    journal = _Journal(out / META / "asked.jsonl")
    silent = 0  # requests in a row that reached nothing

    def one(number: int) -> dict:
        if silent >= GIVE_UP:
            raise BadRow(UNREACHABLE, "not tried after many failures in a row")
        name, text = stretches.text(number)
        kind = settings.kinds[number % len(settings.kinds)]
        seed = settings.seed * 1_000_003 + number
        asked = checked(kind, asker.ask(question_prompt(kind, text), seed=seed), text)
        judged(judge, asked, text, seed)
        return {"number": number, "kind": kind, "name": name, **asked}

    todo = [n for n in range(settings.count) if n not in journal.done]
    with ThreadPoolExecutor(settings.threads) as pool:
        waiting = {pool.submit(one, n): n for n in todo}
        for future in as_completed(waiting):
            number = waiting[future]
            try:
                journal.add(future.result())
                silent = 0
            except Exception as error:  # of the endpoint, the checks, or of an answer unforeseen
                problem = error
                if not isinstance(error, BadRow):
                    problem = BadRow("malformed answer", f"{type(error).__name__}: {error}")
                silent = silent + 1 if problem.reason == UNREACHABLE else 0
                report.drop(problem, f"question {number} ({stretches.name(number)})")
                if not problem.reason.startswith("endpoint"):
                    journal.add({"number": number, "dropped": problem.reason})
    for entry in journal.done.values():  # of earlier runs
        if "dropped" in entry and entry["number"] not in waiting.values():
            report.counts[entry["dropped"]] = report.counts.get(entry["dropped"], 0) + 1
    files = _write(out, journal, stretches)
    report.kept = sum("dropped" not in entry for entry in journal.done.values())
    log(f"{report.summary()}; {len(files)} files in {out}")
    return MakeResult(report.kept, report, files)


class _Stretches:
    """Which part of which document a question is about; deterministic."""

    def __init__(self, settings: SynthesisSettings, report: Report):
        self.tokens, self.seed = settings.tokens, settings.seed
        self.documents = list(texts(settings.documents, report))
        if not self.documents:
            raise ValueError(f"documents: got {settings.documents!r}, which holds no readable text")
        self.tokenizer = load_tokenizer(settings.tokenizer)
        self.units: dict[int, tuple] = {}
        self.lock = threading.Lock()

    def name(self, number: int) -> str:
        """The document's name."""
        return self.documents[number % len(self.documents)][0]

    def text(self, number: int) -> tuple[str, str]:
        """The document's name and the stretch."""
        which = number % len(self.documents)
        name, text = self.documents[which]
        with self.lock:
            if which not in self.units:
                cuts = unit_cuts(text)
                totals = np.cumsum([0, *unit_tokens(self.tokenizer, text, cuts)])
                self.units[which] = (cuts, totals)
        cuts, totals = self.units[which]
        last_start = int(np.searchsorted(totals, totals[-1] - self.tokens))
        first = int(np.random.default_rng([self.seed, number]).integers(last_start + 1))
        end = int(np.searchsorted(totals, totals[first] + self.tokens, side="right")) - 1
        return name, text[cuts[first] : cuts[max(end, first + 1)]].strip("\n")


class _Journal:
    """What was asked so far, a line a question."""

    def __init__(self, file: Path):
        self.file = file
        self.done: dict[int, dict] = {}
        if file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    self.done[entry["number"]] = entry
                except (ValueError, KeyError, TypeError):
                    continue  # a line that was cut off: the question is asked again

    def add(self, entry: dict) -> None:
        """Note one question for good."""
        self.done[entry["number"]] = entry
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _write(out: Path, journal: _Journal, stretches: _Stretches) -> list[Path]:
    import pyarrow
    import pyarrow.parquet

    passed = [e for _, e in sorted(journal.done.items()) if "dropped" not in e]
    files = []
    for number, start in enumerate(range(0, len(passed), 64)):
        rows = [
            row_of(entry, stretches.text(entry["number"])[1])
            for entry in passed[start : start + 64]
        ]
        file = out / f"part-{number:05d}.parquet"
        table = pyarrow.Table.from_pylist(rows, schema=schema())
        pyarrow.parquet.write_table(table, file.with_suffix(".partial"), compression="zstd")
        os.replace(file.with_suffix(".partial"), file)
        files.append(file)
    return files
