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
from dgrpo.longblocks.tasks import questions
from dgrpo.longblocks.tasks.corpus import unit_cuts, unit_tokens
from dgrpo.longblocks.tasks.haystack import texts
from dgrpo.longblocks.tasks.rows import META, MakeResult, claim, write_part
from dgrpo.longblocks.tasks.tokenizer import load_tokenizer
from dgrpo.text import BadRow, Report
from dgrpo.text.problems import append_json

UNREACHABLE = "endpoint unreachable"
FILE_ROWS = 64
GIVE_UP = 20  # requests in a row that reach nothing, after which the rest is not tried


@dataclass(frozen=True)
class SynthesisSettings:
    """What to ask."""

    out: str  # folder for the parquet files; a run that was interrupted goes on there
    endpoint: Endpoint  # the model that asks
    documents: str  # folder of text files
    count: int = 100  # questions to ask (rows that pass are fewer)
    tokens: int = 32_768  # longest stretch of a document
    tokenizer: str = "bytes"  # folder or hub name that measures it; "bytes": one token per byte
    judge: Endpoint | None = None  # None: the model that asks
    kinds: tuple[str, ...] = tuple(questions.KINDS)  # of questions, asked for in turn
    seed: int = 0  # of the stretches, and sent along
    temperature: float = 0.7  # of the questions; the judge has 0

    def __post_init__(self):
        if not self.documents:
            raise ValueError("documents: got nothing, expected a folder of text files")
        if not self.kinds or set(self.kinds) - set(questions.KINDS):
            wanted = ", ".join(questions.KINDS)
            raise ValueError(f"kinds: got {list(self.kinds)}, expected some of {wanted}")


def synthesize(settings: SynthesisSettings, *, log: Callable[[str], None] = print) -> MakeResult:
    """Ask all questions that have not been asked yet, and write those that pass.

    Raises:
        ValueError: no readable document, or a folder with data of other settings.
    """
    out, judge = Path(settings.out), settings.judge
    where, who = (judge.url, judge.model) if judge else ("", "")
    about = asdict(settings) | {"model": settings.endpoint.model}
    about |= {"judge_endpoint": where, "judge_model": who}
    claim(out, {n: v for n, v in about.items() if n not in ("out", "endpoint", "judge")})
    report = Report(log, out / META / "problems.jsonl")
    stretches = _Stretches(settings, report)
    journal = out / META / "asked.jsonl"
    done = _asked(journal)
    silent = 0  # requests in a row that reached nothing

    def ask(number: int) -> dict | BadRow:
        if silent >= GIVE_UP:
            return BadRow(UNREACHABLE, "not tried after many failures in a row")
        kind = settings.kinds[number % len(settings.kinds)]
        seed = settings.seed * 1_000_003 + number
        try:
            text = stretches.text(number)
            reply = settings.endpoint.chat(
                questions.chat(questions.KINDS[kind], text),
                temperature=settings.temperature,
                max_tokens=questions.MAX_TOKENS,
                seed=seed,
            )
            asked = questions.checked(kind, reply, text)
            questions.judged(judge or settings.endpoint, asked, text, seed)
        except BadRow as problem:
            return problem
        except EndpointError as error:
            return BadRow(error.reason, error.detail)
        except Exception as error:  # an answer that the checks did not foresee
            return BadRow("malformed answer", f"{type(error).__name__}: {error}")
        return {"number": number, "kind": kind, "name": stretches.name(number), **asked}

    earlier = list(done.values())
    todo = [n for n in range(settings.count) if n not in done]
    for index, found in settings.endpoint.each(ask, todo):
        number = todo[index]
        silent = silent + 1 if isinstance(found, BadRow) and found.reason == UNREACHABLE else 0
        if isinstance(found, BadRow):
            report.drop(found, f"question {number} ({stretches.name(number)})")
            if found.reason.startswith("endpoint"):  # to be asked again by the next run
                continue
            found = {"number": number, "dropped": found.reason}
        done[number] = found
        append_json(journal, found)
    for reason in (entry["dropped"] for entry in earlier if "dropped" in entry):
        report.counts[reason] = report.counts.get(reason, 0) + 1
    passed = [entry for _, entry in sorted(done.items()) if "dropped" not in entry]
    files = []
    for number, start in enumerate(range(0, len(passed), FILE_ROWS)):
        some = passed[start : start + FILE_ROWS]
        rows = [questions.row_of(entry, stretches.text(entry["number"])) for entry in some]
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

    def text(self, number: int) -> str:
        """The stretch."""
        which = number % len(self.documents)
        text = self.documents[which][1]
        with self.lock:  # a fast tokenizer cannot be used by two threads at once
            if which not in self.units:
                cuts = unit_cuts(text)
                totals = np.cumsum([0, *unit_tokens(self.tokenizer, text, cuts)])
                self.units[which] = (cuts, totals)
        cuts, totals = self.units[which]
        last_start = int(np.searchsorted(totals, totals[-1] - self.tokens))
        first = int(np.random.default_rng([self.seed, number]).integers(last_start + 1))
        end = int(np.searchsorted(totals, totals[first] + self.tokens, side="right")) - 1
        return text[cuts[first] : cuts[max(end, first + 1)]].strip("\n")


def _asked(journal: Path) -> dict[int, dict]:
    """What was asked so far, by number: one line per question."""
    done = {}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []:
        try:
            entry = json.loads(line)
            done[entry["number"]] = entry
        except (ValueError, KeyError, TypeError):
            continue  # a line that was cut off: the question is asked again
    return done
