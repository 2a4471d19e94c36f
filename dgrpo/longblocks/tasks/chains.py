"""A small long-context task: chains of facts among lines of real text.

A document is lines of source code, in which `chains` chains are scattered as lines of their own:

    LeraxMivax        hop 1 of the chain that starts at Lerax
    Mivax42           hop 2, the last one, ends in a number

and the query `?Lerax` asks for the number. The completion names the chain on the way. Nothing
stands between key and value: a small model learns it from scratch in minutes on a CPU.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from dgrpo.extras import whole_file
from dgrpo.longblocks.tasks.haystack import source_lines
from dgrpo.longblocks.tasks.tokenizer import invented_names, load_tokenizer
from dgrpo.text import count_tokens

SPLITS = {"train": 0, "test": 1, "validation": 2}


@dataclass(frozen=True)
class ChainDocument:
    """One document and what its queries ask for."""

    text: str
    chains: list[list[str]]  # per chain, its names from the first on, then the number's text
    depths: list[list[float]]  # per chain, the place of each hop's line, as a share of the lines


@dataclass
class ChainTask:
    """Documents with chains, deterministic in (seed, split, number)."""

    tokenizer: object  # measures the length
    tokens: int | None = 256  # most of a document, without the query; None: the chains alone
    chains: int = 4  # in a document, each asked for by a query
    hops: int = 2  # lines of a chain
    steps: str = "path"  # of a completion: "path" (Mivax42), "links" (whole lines), "answer" (42)
    queries: int | None = None  # how many of the chains are asked for; None: all
    digits: int = 2  # of a number
    names: int = 64  # how many exist
    split: str = "train"  # or "validation", "test"
    seed: int = 0

    def __post_init__(self):
        if self.split not in SPLITS:
            raise ValueError(f"split: got {self.split!r}, expected one of {', '.join(SPLITS)}")
        if self.steps not in ("path", "links", "answer"):
            raise ValueError(f'steps: got {self.steps!r}, expected "path", "links" or "answer"')
        if self.chains < 1 or self.hops < 1 or self.chains * self.hops > self.names:
            least = f"chains x hops = {self.chains} x {self.hops}, both at least 1"
            raise ValueError(f"names: got {self.names}, expected at least {least}")
        if self.chains > 9 * 10 ** (self.digits - 1):
            raise ValueError(f"digits: got {self.digits}, too few for {self.chains} numbers")
        self.queries = self.chains if self.queries is None else min(self.queries, self.chains)
        self.lines = _lines(self.split, self.names) if self.tokens else []
        if self.tokens:
            longest = max(_cost(self.tokenizer, name) for name in invented_names(self.names))
            needed = self.chains * self.hops * 2 * longest
            if needed > self.tokens:
                raise ValueError(f"tokens: got {self.tokens}, the chains alone may take {needed}")

    def document(self, number: int) -> ChainDocument:
        """Document `number`, any integer from 0 on."""
        rng = np.random.default_rng([self.seed, SPLITS[self.split], number])
        names = rng.choice(invented_names(self.names), self.chains * self.hops, replace=False)
        low = 10 ** (self.digits - 1)
        numbers = low + rng.choice(9 * low, self.chains, replace=False)
        paths = names.reshape(self.chains, self.hops).tolist()
        chains = [[*path, str(number)] for path, number in zip(paths, numbers, strict=True)]
        facts = [fact for chain in chains for fact in _facts(chain)]
        lines = []
        if self.tokens:
            lines = self._text(rng, self.tokens - sum(_cost(self.tokenizer, f) for f in facts))
        total = len(lines) + len(facts)
        slots = np.sort(rng.choice(total, len(facts), replace=False))
        places = rng.permutation(slots)  # the hops of a chain come in any order
        for place, fact in sorted(zip(places.tolist(), facts, strict=True)):
            lines.insert(place, fact)
        depths = (places / total).reshape(self.chains, self.hops).tolist()
        return ChainDocument("".join(line + "\n" for line in lines), chains, depths)

    def row(self, number: int) -> dict:
        """Row `number`: query `number % queries` of document `number // queries`."""
        document = self.document(number // self.queries)
        which = number % self.queries
        chain = document.chains[which]
        evidence = "".join(fact + "\n" for fact in _facts(chain))
        identifier = f"chains-{self.split}-{self.seed}-{number // self.queries}"
        return {
            "id": f"{identifier}-{which}",
            "document_id": identifier,
            "document": document.text,
            "source": "chains",
            "language": "code",
            "question": f"?{chain[0]}",
            "prompt": f"{document.text}?{chain[0]}",
            "completion": self.completion(chain),
            "answer": chain[-1],
            "family": "chains",
            "task": f"chain_{self.hops}",
            "reward": "dgrpo.rewards:final_number",
            "aliases": [chain[-1]],
            "distractors": [c[-1] for c in document.chains if c is not chain],
            "evidence": evidence,
            "privileged": evidence,
            "hops": self.hops,
            "tokens": self.tokens or 0,
            "depths": document.depths[which],
            "chance": 1 / self.chains,
        }

    def segments(self, number: int) -> dict:
        """Document `number` with all its queries answered, loss on the answers."""
        document = self.document(number)
        pieces = [{"text": document.text, "loss": False}]
        for chain in document.chains[: self.queries]:
            pieces.append({"text": f"?{chain[0]}", "loss": False})
            pieces.append({"text": self.completion(chain), "loss": True})
        identifier = f"chains-{self.split}-{self.seed}-{number}"
        return {"id": identifier, "document_id": identifier, "segments": pieces}

    def completion(self, chain: list[str]) -> str:
        """The right completion for a chain, without the end-of-sequence token."""
        if self.steps == "answer":
            return chain[-1]
        if self.steps == "path":
            return "".join(chain[1:])
        return "\n".join(_facts(chain))

    def _text(self, rng: np.random.Generator, room: int) -> list[str]:
        """Consecutive lines, from a random one on, of at most `room` tokens."""
        index, used, lines = int(rng.integers(len(self.lines))), 0, []
        while True:
            used += _cost(self.tokenizer, self.lines[index])
            if used > room:
                return lines
            lines.append(self.lines[index])
            index = (index + 1) % len(self.lines)


@lru_cache(maxsize=2**18)
def _cost(tokenizer, line: str) -> int:
    return count_tokens(tokenizer, line + "\n")


def _facts(chain: list[str]) -> list[str]:
    """The lines of a chain."""
    return [a + b for a, b in pairwise(chain)]


@lru_cache(maxsize=8)
def _lines(split: str, names: int) -> list[str]:
    """The lines of a split without names: train, validation, test are 8, 1, 1 tenths in order."""
    lines = source_lines()
    tenth = len(lines) // 10
    bounds = {"train": (0, 8 * tenth), "validation": (8 * tenth, 9 * tenth)}
    start, end = bounds.get(split, (9 * tenth, len(lines)))
    known = re.compile("|".join(invented_names(names)))
    return [line for line in lines[start:end] if not known.search(line)]


class ChainRows(Sequence):
    """Some rows of a task, made as they are read; see `rows`."""

    def __init__(self, task: ChainTask, count: int, start: int, segments: bool):
        self.numbers = range(start, start + count)
        self.make = task.segments if segments else task.row

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index):
        wanted = self.numbers[index]
        return [*map(self.make, wanted)] if isinstance(index, slice) else self.make(wanted)


def rows(
    tokenizer, count: int = 1000, start: int = 0, segments: bool = False, **options
) -> ChainRows:
    """Make rows of a `ChainTask`, as a data source `dgrpo.longblocks.tasks.chains:rows`.

    Args:
        tokenizer: a tokenizer, or the folder of one.
        start: number of the first row.
        segments: one row per document, with loss on all its answers, in place of one per query.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(str(tokenizer))
    return ChainRows(ChainTask(tokenizer, **options), count, start, segments)


def write(path: str | Path, rows: Sequence[dict]) -> None:
    """Write rows as JSONL, all or none."""
    with whole_file(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
