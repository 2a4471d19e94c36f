"""Invented facts, and weaving them into real text at uniformly random depths."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dgrpo.longblocks.tasks import rows
from dgrpo.longblocks.tasks.corpus import Corpus

PASSAGE = 90  # tokens of a passage of real text
_LABEL = re.compile(r"\[P(?=[0-9]+\])")  # real text that looks like a label
MONTHS = (
    "January February March April May June July August September October November December"
).split()


@dataclass
class Ground:
    """What tasks are made from: real text, a way to count tokens, and Python files."""

    corpus: Corpus
    count: Callable[[str], int]
    files: list = field(default_factory=list)


@dataclass(frozen=True)
class Fact:
    """A paragraph to be hidden; `gold` ones are needed for the answer."""

    text: str
    gold: bool = False


@dataclass(frozen=True)
class Woven:
    """A document with facts in it.

    Attributes:
        text: the document.
        tokens: its length.
        depths: for every fact in the order given, the share of the real text before it.
        labels: for every fact, the label of its passage (`"P12"`), where passages are labelled.
    """

    text: str
    tokens: int
    depths: list[float]
    labels: list[str]


class Names:
    """Invented names and numbers, each at most once a document."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.used: set = set()

    def place(self) -> str:
        """A name of one word, such as `Velmar`."""
        while True:
            a, b = self.rng.choice(list("BDFGHKLMNPRSTVZ"), 2)
            e, i = self.rng.choice(list("aeiou"), 2)
            middle = self.rng.choice(["l", "r", "n", "s", "k", "lm", "nd", "rt", "st", "v"])
            name = f"{a}{e}{middle}{i}{self.rng.choice(list('nrskvmtx'))}"
            name += self.rng.choice(["", "a", "en", "is", "ov"])
            if name.lower() not in self.used:
                self.used.add(name.lower())
                return name

    def person(self) -> str:
        """A first and a family name."""
        return f"{self.place()} {self.place()}"

    def number(self, low: int, high: int) -> int:
        """A number in [low, high) that was not drawn before."""
        for _ in range(1000):
            value = int(self.rng.integers(low, high))
            if value not in self.used:
                self.used.add(value)
                return value
        raise ValueError(f"number: no unused number left in [{low}, {high})")

    def date(self) -> tuple[tuple[int, int, int], str]:
        """A date that was not drawn before, to sort by and as text."""
        while True:
            year, month, day = (
                int(self.rng.integers(*r)) for r in ((1890, 1970), (1, 13), (1, 29))
            )
            if (year, month, day) not in self.used:
                self.used.add((year, month, day))
                return (year, month, day), f"{day} {MONTHS[month - 1]} {year}"


def pick(rng: np.random.Generator, low: int, high: int) -> int:
    """A whole number in [low, high]."""
    return int(rng.integers(low, high + 1))


def distractor_count(tokens: int, cost: int) -> int:
    """How many facts of `cost` tokens to hide beside the needed ones: one every 400 tokens.

    At most a quarter of the document, between 2 and 60.
    """
    return int(np.clip(min(tokens // 400, tokens // (4 * cost)), 2, 60))


def weave(
    ground: Ground,
    rng: np.random.Generator,
    facts: list[Fact],
    tokens: int,
    question: str,
    depths: list[float] | None = None,
) -> Woven:
    """Hide facts as lines of their own in real text.

    Every fact's depth is drawn from U[0, 1) on its own (or given, for the first facts, by
    `depths`) and met to within half a unit. Document, a blank line and the question have at most
    `tokens` tokens.

    Raises:
        ValueError: the facts leave no room for text.
    """
    corpus, lines = ground.corpus, [fact.text + "\n" for fact in facts]
    cost = sum(ground.count(line) + 1 for line in lines)  # a neighbour may cost a token more
    cost += ground.count("\n\n" + question) + 1
    first, last = _run(corpus, rng, tokens - cost)
    bounds = np.array([corpus.before(unit) for unit in range(first, last + 1)])
    bounds -= bounds[0]
    drawn = rng.random(len(facts))
    drawn[: len(depths or [])] = depths or []
    slots = _nearest(bounds, drawn)
    order = sorted(range(len(facts)), key=lambda i: (slots[i], rng.random()))
    pieces, done = [], 0
    for i in order:
        pieces += [corpus.text(first + done, first + int(slots[i])), lines[i]]
        done = int(slots[i])
    text = "".join([*pieces, corpus.text(first + done, last)])
    met = [float(bounds[slot] / bounds[-1]) for slot in slots]
    return Woven(text.rstrip("\n"), int(bounds[-1]) + cost, met, [])


def weave_passages(
    ground: Ground, rng: np.random.Generator, facts: list[Fact], tokens: int, question: str
) -> Woven:
    """Like `weave`, but the document is numbered passages, `[P1] ...`, `[P2] ...`.

    Every fact is a passage of its own; the others are real text of about `PASSAGE` tokens.
    """
    corpus, count = ground.corpus, ground.count
    label = count(f"x\n\n[P{max(100, tokens // PASSAGE)}] y") - count("x") - count("y")
    cost = sum(count(fact.text) + label for fact in facts) + count("\n\n" + question) + 1
    size = int(min(PASSAGE, max(24, tokens // 24)))
    units, ends = _passages(corpus, rng, tokens - cost, size, label)
    bounds = np.array([0, *ends])
    slots = _nearest(bounds, rng.random(len(facts)))
    order = sorted(range(len(facts)), key=lambda i: (slots[i], rng.random()))
    passages, labels, number, waiting = [], [""] * len(facts), 0, list(order)
    for k in range(len(bounds)):
        while waiting and slots[waiting[0]] == k:
            number += 1
            labels[waiting[0]] = f"P{number}"
            passages.append(f"[P{number}] {facts[waiting.pop(0)].text}")
        if k < len(bounds) - 1:
            number += 1
            text = corpus.text(units[k], units[k + 1]).strip("\n")
            passages.append(f"[P{number}] {_LABEL.sub('(P', text)}")
    depths = [float(bounds[slot] / bounds[-1]) for slot in slots]
    length = int(bounds[-1]) + cost + label * (len(bounds) - 1)
    return Woven("\n\n".join(passages), length, depths, labels)


def _passages(
    corpus: Corpus, rng: np.random.Generator, room: int, size: int, label: int
) -> tuple[list[int], list[int]]:
    """Units at which passages of about `size` tokens begin and end, and tokens up to each end."""
    units, ends, used = [_run(corpus, rng, room - label)[0]], [], 0
    while True:
        first, left = units[-1], room - used - label
        following = max(corpus.reach(first, min(size, left)), first + 1)
        length = corpus.before(following) - corpus.before(first)
        if length > left:
            return units, ends
        units.append(following)
        ends.append((ends[-1] if ends else 0) + length)
        used += length + label


def _run(corpus: Corpus, rng: np.random.Generator, room: int) -> tuple[int, int]:
    """A run of units from a random one on, of at most `room` tokens."""
    first = int(rng.integers(len(corpus)))
    for _ in range(20):  # a start whose first unit fits
        if corpus.reach(first, max(room, 0)) > first:
            return first, corpus.reach(first, room)
        first = int(rng.integers(len(corpus)))
    raise ValueError(
        f"tokens: the task's facts leave {room} tokens for text, too few for one line; "
        "ask for longer documents"
    )


def _nearest(bounds: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """For every depth in [0, 1), the index of the nearest boundary."""
    goals = depths * bounds[-1]
    right = np.clip(np.searchsorted(bounds, goals), 1, len(bounds) - 1)
    closer = goals - bounds[right - 1] < bounds[right] - goals
    return np.where(closer, right - 1, right)


def row(woven: Woven, *, gold: int, **columns) -> dict:
    """A row about a woven document; the answer needs its first `gold` facts."""
    columns = {"depths": woven.depths[:gold], "hops": max(1, gold), **columns}
    return rows.row(document=woven.text, tokens=woven.tokens, **columns)
