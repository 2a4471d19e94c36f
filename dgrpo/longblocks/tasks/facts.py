"""Invented facts, and weaving them into real text at uniformly random depths."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dgrpo.longblocks.tasks import rows
from dgrpo.longblocks.tasks.corpus import Corpus
from dgrpo.text import count_tokens

ANSWER = 'End with a line that says "Answer: " and then {} alone.'
PASSAGE = 90  # tokens of a passage of real text
_LABEL = re.compile(r"\[P(?=[0-9]+\])")  # real text that looks like a label
MONTHS = (
    "January February March April May June July August September October November December"
).split()


@dataclass(frozen=True)
class Ground:
    """What tasks are made from: real text, and the tokenizer that measures it."""

    corpus: Corpus
    tokenizer: object  # of transformers, or "bytes"
    code: Corpus | None = None  # where code tasks find Python files; None: in `corpus`

    def count(self, text: str) -> int:
        """Number of tokens of a text."""
        return count_tokens(self.tokenizer, text)


@dataclass(frozen=True)
class Woven:
    """A document with facts in it."""

    text: str
    tokens: int
    depths: list[float]  # per fact, the share of the real text before it
    labels: list[str]  # per fact, its passage ("P12"); empty where passages are not labelled


class Names:
    """Random draws for a document: names and numbers are invented, each at most once."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.used: set = set()

    def pick(self, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        return int(self.rng.integers(low, high + 1))

    def choose(self, options: Sequence):
        """One of some options, each as likely."""
        return options[self.pick(0, len(options) - 1)]

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
            drawn = self.pick(1890, 1969), self.pick(1, 12), self.pick(1, 28)
            if drawn not in self.used:
                self.used.add(drawn)
                year, month, day = drawn
                return drawn, f"{day} {MONTHS[month - 1]} {year}"


class Draft(Names):
    """What a task makes a row from: random draws, and text for a document of `tokens` tokens."""

    def __init__(self, ground: Ground, rng: np.random.Generator, tokens: int):
        super().__init__(rng)
        self.ground, self.tokens, self.count = ground, tokens, ground.count

    def distractors(self, cost: int) -> int:
        """See `distractor_count`."""
        return distractor_count(self.tokens, cost)

    def weave(self, facts: list[str], question: str) -> Woven:
        """See `weave`."""
        return weave(self.ground, self.rng, facts, self.tokens, question)

    def weave_passages(self, facts: list[str], question: str) -> Woven:
        """See `weave_passages`."""
        return weave_passages(self.ground, self.rng, facts, self.tokens, question)


def distractor_count(tokens: int, cost: int) -> int:
    """How many facts of `cost` tokens to hide beside the needed ones: one every 400 tokens.

    At most a quarter of the document, between 2 and 60.
    """
    return int(np.clip(min(tokens // 400, tokens // (4 * cost)), 2, 60))


def weave(
    ground: Ground,
    rng: np.random.Generator,
    facts: list[str],
    tokens: int,
    question: str,
    depths: Sequence[float] | None = None,
) -> Woven:
    """Hide facts as lines of their own in real text.

    Every fact's depth is drawn from U[0, 1) on its own (or given, for the first facts, by
    `depths`) and met to within half a unit. Document, a blank line and the question have at most
    `tokens` tokens.

    Raises:
        ValueError: the facts leave no room for text.
    """
    corpus, lines = ground.corpus, [fact + "\n" for fact in facts]
    cost = sum(ground.count(line) + 1 for line in lines)  # a neighbour may cost a token more
    cost += ground.count("\n\n" + question) + 1
    first, last = _run(corpus, rng, tokens - cost)
    bounds = np.array([corpus.before(unit) for unit in range(first, last + 1)])
    bounds -= bounds[0]
    drawn = rng.random(len(facts))
    drawn[: len(depths or ())] = depths or ()
    slots, order, met = _places(rng, bounds, drawn)
    pieces, done = [], 0
    for i in order:
        pieces += [corpus.text(first + done, first + slots[i]), lines[i]]
        done = slots[i]
    text = "".join([*pieces, corpus.text(first + done, last)])
    return Woven(text.rstrip("\n"), int(bounds[-1]) + cost, met, [])


def weave_passages(
    ground: Ground, rng: np.random.Generator, facts: list[str], tokens: int, question: str
) -> Woven:
    """Like `weave`, but the document is numbered passages, `[P1] ...`, `[P2] ...`.

    Every fact is a passage of its own; the others are real text of about `PASSAGE` tokens.
    """
    corpus, count = ground.corpus, ground.count
    label = count(f"x\n\n[P{max(100, tokens // PASSAGE)}] y") - count("x") - count("y")
    cost = sum(count(fact) + label for fact in facts) + count("\n\n" + question) + 1
    size = int(min(PASSAGE, max(24, tokens // 24)))
    units, ends = _passages(corpus, rng, tokens - cost, size, label)
    bounds = np.array([0, *ends])
    slots, order, met = _places(rng, bounds, rng.random(len(facts)))
    real = (corpus.text(a, b).strip("\n") for a, b in pairwise(units))
    passages = [(None, _LABEL.sub("(P", text)) for text in real]
    for i in reversed(order):  # from the last one on, so that slots count real text alone
        passages.insert(slots[i], (i, facts[i]))
    numbers = {i: number for number, (i, _) in enumerate(passages, 1)}
    document = "\n\n".join(f"[P{number}] {text}" for number, (_, text) in enumerate(passages, 1))
    length = int(bounds[-1]) + cost + label * (len(bounds) - 1)
    return Woven(document, length, met, [f"P{numbers[i]}" for i in range(len(facts))])


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


def _places(
    rng: np.random.Generator, bounds: np.ndarray, depths: np.ndarray
) -> tuple[list[int], list[int], list[float]]:
    """The boundary nearest to every depth, the facts in the order of theirs, and their depths."""
    goals = depths * bounds[-1]
    right = np.clip(np.searchsorted(bounds, goals), 1, len(bounds) - 1)
    closer = goals - bounds[right - 1] < bounds[right] - goals
    slots = np.where(closer, right - 1, right)
    order = sorted(range(len(slots)), key=lambda i: (slots[i], rng.random()))
    return slots.tolist(), order, (bounds[slots] / bounds[-1]).tolist()


def row(woven: Woven, *, gold: Sequence[str], **columns) -> dict:
    """A row about a woven document whose first facts, `gold`, prove the answer."""
    n = len(gold)
    about = {"depths": woven.depths[:n], "hops": max(1, n), "evidence": "\n".join(gold)}
    if woven.labels:
        labels = woven.labels[:n]
        cited = "\n\n".join(f"[{a}] {text}" for a, text in zip(labels, gold, strict=True))
        about |= {"evidence": cited, "passages": list(gold), "passage_ids": labels}
    return rows.row(document=woven.text, tokens=woven.tokens, **about | columns)
