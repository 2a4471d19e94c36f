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


class Draft:
    """What a task makes a row from: random draws, and text for a document of `tokens` tokens.

    Names, numbers and dates are invented, each drawn at most once.
    """

    def __init__(self, ground: Ground, rng: np.random.Generator, tokens: int):
        self.ground, self.rng, self.tokens, self.count = ground, rng, tokens, ground.count
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

    def distractors(self, cost: int) -> int:
        """How many more facts of `cost` tokens to hide: one per 400 tokens, at most a quarter."""
        return int(np.clip(min(self.tokens // 400, self.tokens // (4 * cost)), 2, 60))

    def weave(
        self, facts: list[str], question: str, depths: Sequence[float] | None = None
    ) -> Woven:
        """Hide facts as lines of their own in real text, at depths drawn from U[0, 1).

        `depths` gives those of the first facts. Document, a blank line and the question have at
        most `tokens` tokens; raises ValueError where the facts leave no room for text.
        """
        corpus, lines = self.ground.corpus, [fact + "\n" for fact in facts]
        cost = sum(self.count(line) + 1 for line in lines)  # a neighbour may cost a token more
        cost += self.count("\n\n" + question) + 1
        first, last = self._run(self.tokens - cost)
        bounds = np.array([corpus.before(unit) for unit in range(first, last + 1)])
        bounds -= bounds[0]
        drawn = self.rng.random(len(facts))
        drawn[: len(depths or ())] = depths or ()
        slots, order, met = self._places(bounds, drawn)
        pieces, done = [], 0
        for i in order:
            pieces += [corpus.text(first + done, first + slots[i]), lines[i]]
            done = slots[i]
        text = "".join([*pieces, corpus.text(first + done, last)])
        return Woven(text.rstrip("\n"), int(bounds[-1]) + cost, met, [])

    def weave_passages(self, facts: list[str], question: str) -> Woven:
        """Hide facts as passages among passages of real text, all labelled: `[P1] ...`."""
        corpus, count = self.ground.corpus, self.count
        label = count(f"x\n\n[P{max(100, self.tokens // PASSAGE)}] y") - count("x") - count("y")
        cost = sum(count(fact) + label for fact in facts) + count("\n\n" + question) + 1
        size = int(min(PASSAGE, max(24, self.tokens // 24)))
        left = self.tokens - cost - label
        units, bounds = [self._run(left)[0]], [0]  # where passages end, in units and in tokens
        while True:
            first = units[-1]
            following = max(corpus.reach(first, min(size, left)), first + 1)
            length = corpus.before(following) - corpus.before(first)
            if length > left:
                break
            units.append(following)
            bounds.append(bounds[-1] + length)
            left -= length + label
        slots, order, met = self._places(np.array(bounds), self.rng.random(len(facts)))
        real = (corpus.text(a, b).strip("\n") for a, b in pairwise(units))
        passages = [(None, _LABEL.sub("(P", text)) for text in real]
        for i in reversed(order):  # from the last one on, so that slots count real text alone
            passages.insert(slots[i], (i, facts[i]))
        labels = {i: f"P{number}" for number, (i, _) in enumerate(passages, 1)}
        text = "\n\n".join(f"[P{number}] {text}" for number, (_, text) in enumerate(passages, 1))
        length = bounds[-1] + cost + label * (len(bounds) - 1)
        return Woven(text, length, met, [labels[i] for i in range(len(facts))])

    def _run(self, room: int) -> tuple[int, int]:
        """A run of units from a random one on, of at most `room` tokens."""
        corpus = self.ground.corpus
        first = self.pick(0, len(corpus) - 1)
        for _ in range(20):  # a start whose first unit fits
            if (end := corpus.reach(first, max(room, 0))) > first:
                return first, end
            first = self.pick(0, len(corpus) - 1)
        left = f"the task's facts leave {room} tokens for text, too few for one line"
        raise ValueError(f"tokens: {left}; ask for longer documents")

    def _places(
        self, bounds: np.ndarray, depths: np.ndarray
    ) -> tuple[list[int], list[int], list[float]]:
        """The boundary nearest to every depth, the facts by boundary, and the depths met."""
        goals = depths * bounds[-1]
        right = np.clip(np.searchsorted(bounds, goals), 1, len(bounds) - 1)
        closer = goals - bounds[right - 1] < bounds[right] - goals
        slots = np.where(closer, right - 1, right)
        order = sorted(range(len(slots)), key=lambda i: (slots[i], self.rng.random()))
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
