"""Questions about a user's documents, asked and judged by a language model behind an endpoint.

A model reads a stretch of a document and asks a question, with the answer and word-for-word
evidence. The evidence must stand in the document, and a second, judging pass must find that the
document supports this answer and no other. What fails is dropped with its reason and counted.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
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
TEMPERATURE = 0.7  # of the questions; they are judged at 0
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
    seed: int = 0  # of the stretches, and sent along

    def __post_init__(self):
        if not self.documents:
            raise ValueError("documents: got nothing, expected a folder of text files")


def synthesize(settings: SynthesisSettings, *, log: Callable[[str], None] = print) -> MakeResult:
    """Ask all questions that have not been asked yet, and write those that pass.

    Raises ValueError without a readable document, or for a folder with data of other settings.
    """
    out, endpoint = Path(settings.out), settings.endpoint
    about = {n: v for n, v in vars(settings).items() if n not in ("out", "endpoint")}
    claim(out, about | {"model": endpoint.model})
    report = Report(log, out / META / "problems.jsonl")
    stretches = _Stretches(settings, report)
    journal = out / META / "asked.jsonl"
    done = _asked(journal)
    silent = 0  # requests in a row that reached nothing

    def ask(number: int) -> dict | BadRow:
        if silent >= GIVE_UP:
            return BadRow(UNREACHABLE, "not tried after many failures in a row")
        kind = [*questions.KINDS][number % len(questions.KINDS)]
        seed = settings.seed * 1_000_003 + number
        try:
            text = stretches.text(number)
            asked = questions.ask(endpoint, kind, text, seed)
            questions.judge(endpoint, asked, text, seed)
        except BadRow as problem:
            return problem
        except EndpointError as error:
            return BadRow(error.reason, error.detail)
        except Exception as error:  # an answer that the checks did not foresee
            return BadRow("malformed answer", f"{type(error).__name__}: {error}")
        return {"number": number, "kind": kind, "name": stretches.name(number), **asked}

    earlier = list(done.values())
    todo = [n for n in range(settings.count) if n not in done]
    for index, found in endpoint.each(ask, todo):
        number = todo[index]
        silent = silent + 1 if isinstance(found, BadRow) and found.reason == UNREACHABLE else 0
        if isinstance(found, BadRow):
            report.drop(found, f"question {number} ({stretches.name(number)})")
            if found.reason.startswith("endpoint"):  # to be asked again by the next run
                continue
            found = {"number": number, "dropped": found.reason}
        done[number] = found
        append_json(journal, found)
    for entry in earlier:
        if "dropped" in entry:
            report.counts[entry["dropped"]] += 1
    passed = [entry for _, entry in sorted(done.items()) if "dropped" not in entry]
    files = []
    for start in range(0, len(passed), FILE_ROWS):
        some = passed[start : start + FILE_ROWS]
        rows = [questions.row_of(entry, stretches.text(entry["number"])) for entry in some]
        files.append(write_part(out, len(files), rows))
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
        tokenizer, self.units = load_tokenizer(settings.tokenizer), []
        for _, text in self.documents[: settings.count]:
            cuts = unit_cuts(text)
            self.units.append((cuts, np.cumsum([0, *unit_tokens(tokenizer, text, cuts)])))

    def name(self, number: int) -> str:
        """The document's name."""
        return self.documents[number % len(self.documents)][0]

    def text(self, number: int) -> str:
        """The stretch."""
        which = number % len(self.documents)
        text, (cuts, totals) = self.documents[which][1], self.units[which]
        last_start = int(np.searchsorted(totals, totals[-1] - self.tokens))
        first = int(np.random.default_rng([self.seed, number]).integers(last_start + 1))
        end = int(np.searchsorted(totals, totals[first] + self.tokens, side="right")) - 1
        return text[cuts[first] : cuts[max(end, first + 1)]].strip("\n")


def _asked(journal: Path) -> dict[int, dict]:
    """What was asked so far, by number: one line per question."""
    done = {}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []:
        with suppress(ValueError, KeyError, TypeError):  # cut off: the question is asked again
            entry = json.loads(line)
            done[entry["number"]] = entry
    return done
