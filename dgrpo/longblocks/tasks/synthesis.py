"""Questions about a user's documents, asked and judged by a language model behind an endpoint.

A model reads a stretch of a document and asks a question, with the answer and word-for-word
evidence. What is checked: the evidence must stand in the document, and a second pass (the same or
another model) must find that the document alone supports the answer and no other. What fails a
check, or the endpoint, is dropped with its reason and counted; the rest becomes rows like those of
`dgrpo.longblocks.tasks.make`.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dgrpo.endpoint import Endpoint, EndpointError
from dgrpo.longblocks.tasks.corpus import unit_cuts, unit_tokens
from dgrpo.longblocks.tasks.haystack import texts
from dgrpo.longblocks.tasks.questions import (
    KINDS,
    MAX_TOKENS,
    checked,
    judged,
    question_prompt,
    row_of,
)
from dgrpo.longblocks.tasks.rows import META, MakeResult, claim, write_part
from dgrpo.longblocks.tasks.tokenizer import load_tokenizer
from dgrpo.text import BadRow, Report

UNREACHABLE = "endpoint unreachable"
FILE_ROWS = 64
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
        tokenizer: folder or hub name that measures it, or `"bytes"`.
        judge_endpoint, judge_model: who judges; empty: the one that asks.
        kinds: kinds of questions, asked for in turn.
        seed: of the stretches, and sent along.
        temperature: of the questions; the judge has 0.
        threads: requests at a time.
        key_variable, timeout, retries, pause: see `dgrpo.endpoint.Endpoint`.
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
        return self._at(self.endpoint, self.model)

    def judge(self) -> Endpoint:
        """The endpoint that judges."""
        return self._at(self.judge_endpoint or self.endpoint, self.judge_model or self.model)

    def _at(self, url: str, model: str) -> Endpoint:
        how = (self.key_variable, self.timeout, self.retries, self.pause, self.threads)
        return Endpoint(url, model, *how)


def synthesize(settings: SynthesisSettings, *, log: Callable[[str], None] = print) -> MakeResult:
    """Ask all questions that have not been asked yet, and write those that pass.

    Raises:
        ValueError: no readable document, or a folder with data of other settings.
    """
    asker, judge = settings.asker(), settings.judge()
    out = Path(settings.out)
    kept = ("out", "threads", "timeout", "retries", "pause", "key_variable", "endpoint")
    claim(out, {name: value for name, value in asdict(settings).items() if name not in kept})
    report = Report(log, out / META / "problems.jsonl")
    stretches = _Stretches(settings, report)
    journal = _Journal(out / META / "asked.jsonl")
    silent = 0  # requests in a row that reached nothing

    def one(number: int) -> dict:
        if silent >= GIVE_UP:
            raise BadRow(UNREACHABLE, "not tried after many failures in a row")
        name, text = stretches.text(number)
        kind = settings.kinds[number % len(settings.kinds)]
        chat, seed = question_prompt(kind, text), settings.seed * 1_000_003 + number
        reply = asker.chat(chat, temperature=settings.temperature, max_tokens=MAX_TOKENS, seed=seed)
        asked = checked(kind, reply, text)
        judged(judge, asked, text, seed)
        return {"number": number, "kind": kind, "name": name, **asked}

    def one_or_problem(number: int) -> dict | BadRow:
        try:
            return one(number)
        except BadRow as problem:
            return problem
        except EndpointError as error:
            return BadRow(error.reason, error.detail)
        except Exception as error:  # an answer that the checks did not foresee
            return BadRow("malformed answer", f"{type(error).__name__}: {error}")

    earlier = list(journal.done.values())
    todo = [n for n in range(settings.count) if n not in journal.done]
    for index, found in asker.each(one_or_problem, todo):
        number = todo[index]
        if not isinstance(found, BadRow):
            journal.add(found)
            silent = 0
            continue
        silent = silent + 1 if found.reason == UNREACHABLE else 0
        report.drop(found, f"question {number} ({stretches.name(number)})")
        if not found.reason.startswith("endpoint"):
            journal.add({"number": number, "dropped": found.reason})
    for entry in earlier:
        if "dropped" in entry:
            report.counts[entry["dropped"]] = report.counts.get(entry["dropped"], 0) + 1
    passed = [entry for _, entry in sorted(journal.done.items()) if "dropped" not in entry]
    files = []
    for number, start in enumerate(range(0, len(passed), FILE_ROWS)):
        some = passed[start : start + FILE_ROWS]
        rows = [row_of(entry, stretches.text(entry["number"])[1]) for entry in some]
        files.append(write_part(out, number, rows))
    report.kept = len(passed)
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
    """What was asked so far, one line per question."""

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
