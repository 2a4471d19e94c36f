"""What rewards share: the loop over samples, final answers, normal forms, overlap, copying.

Patterns must not backtrack: a policy writes runs of a hundred thousand spaces or tags.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from inspect import signature
from typing import Any

_ANSWER = re.compile(r"^[ \t*_#>-]*(?:final )?answer[ \t*_]*:[*_]*\s*(.*)$", re.I | re.M)
_ARTICLES = {"a", "an", "the"}
_EDGES = "".join(chr(c) for c in range(33, 127) if not chr(c).isalnum()) + "“”‘’«»…–—"
_RUN = 12  # words of a block that is looked up in a document; two in a row are a copy


def per_sample(*parts: str) -> Callable[[Callable], Callable]:
    """Make a reward of a function that scores one completion.

    Its further positional parameters name columns (None where there is no such column),
    keyword-only ones are options; those without a default are required. With `parts`, it returns
    the reward and these in a tuple.
    """

    def decorate(score: Callable) -> Callable:
        parameters = list(signature(score).parameters.values())[1:]
        options = {p.name for p in parameters if p.kind == p.KEYWORD_ONLY}
        read = [p.name for p in parameters if p.kind != p.KEYWORD_ONLY]
        required = {p.name for p in parameters if p.default is p.empty}

        def reward(prompts, completions, **columns):
            if lacking := ", ".join(sorted(required - columns.keys())):
                raise TypeError(f"{score.__name__}: got no {lacking}, expected a column or option")
            fixed = {name: columns[name] for name in options & columns.keys()}
            none = [None] * len(completions)
            given = (none if columns.get(name) is None else columns[name] for name in read)
            found = [score(*row, **fixed) for row in zip(completions, *given, strict=True)]
            if not parts:
                return found
            return {name: [row[i] for row in found] for i, name in enumerate(("reward", *parts))}

        reward.__name__, reward.__doc__ = score.__name__, score.__doc__
        reward.__module__ = score.__module__
        return reward

    return decorate


def without_thinking(completion: str) -> str:
    """What follows the last `</think>`, or the whole completion if there is none."""
    return completion.rpartition("</think>")[2]


def final_answer(completion: str) -> str:
    """What follows the last "Answer:" at a line's start, to the line's end; else the last line.

    Reasoning up to `</think>` is left out.
    """
    text = without_thinking(completion)
    found = _ANSWER.findall(text) or [line for line in text.splitlines() if line.strip()] or [""]
    return found[-1].strip()


def normalise(text: str) -> str:
    """Comparable form: NFKC, no case, no articles, no punctuation around words, single spaces.

    Signs, decimal points and everything else within a word stay ("-3.5" is not "35"); commas
    between digits go ("1,000" is "1000").
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    words = [word for word in map(_strip, text.split()) if word]
    kept = [word for word in words if word not in _ARTICLES]
    return " ".join(kept or words) or squeeze(text)


def _strip(word: str) -> str:
    stripped = word.rstrip(_EDGES.replace("%", "")).lstrip(_EDGES.replace("-", "").replace("+", ""))
    if stripped[:1] in ("-", "+") and not stripped[1:2].isdigit():
        stripped = stripped.lstrip(_EDGES)
    return stripped


def answers(answer: Any, aliases: Any) -> list[str]:
    """The normal forms of the aliases, or of the answer where there are none; else ValueError."""
    given = aliases or [answer]
    given = [given] if isinstance(given, str) else given
    found = [normalise(str(a)) for a in given if a is not None and str(a).strip()]
    if not found:
        raise ValueError("answer: got a row without answer and aliases, expected one of them")
    return found


def is_right(completion: str, answer: Any, aliases: Any) -> float:
    """1 where the final answer in normal form is one of `answers`, else 0."""
    return float(normalise(final_answer(completion)) in answers(answer, aliases))


def overlap(words: Sequence[str], gold: Sequence[str]) -> tuple[float, float]:
    """Precision and recall of a multiset of words (or items) against the right one."""
    if not words or not gold:
        return 0.0, 0.0
    common = sum((Counter(words) & Counter(gold)).values())
    return common / len(words), common / len(gold)


def f1(precision: float, recall: float) -> float:
    """Harmonic mean; 0 where both are."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def guarded(precision: float, recall: float) -> float:
    """F1 times precision: the score of a set of answers.

    F1 alone pays for lists: k candidates of which one is right have 2 / (k + 1), more than the 1/k
    that a random one of them would earn. F1 times precision is less than 1/k.
    """
    return f1(precision, recall) * precision


def contains(text: str, part: str) -> bool:
    """Whether normalised `part` stands in normalised `text` as whole words."""
    return f" {part} " in f" {text} "


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    best = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for k, other in enumerate(second):
            above = best[k + 1]
            best[k + 1] = diagonal + 1 if word == other else max(above, best[k])
            diagonal = above
    return best[-1]


def repetition(text: str, size: int = 6) -> float:
    """Share of the runs of `size` words that occurred before: near 1 in loops."""
    words = text.lower().split()
    runs = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def copied(text: str, document: str | None) -> float:
    """Share of `text` that stands in runs of 24 or more words of `document` within one line."""
    if not document:
        return 0.0
    total = taken = 0
    for line in text.lower().splitlines():
        words = re.findall(r"\w+", line)
        total += len(words)
        blocks = range(0, len(words) - _RUN + 1, _RUN)
        if len(blocks) > 1:
            whole = _plain_words(document)
            found = [f" {' '.join(words[i : i + _RUN])} " in whole for i in blocks]
            near = [False, *found, False]
            runs = sum(f and (near[i] or near[i + 2]) for i, f in enumerate(found))
            taken += len(words) * runs / len(blocks)
    return taken / total if total else 0.0


@lru_cache(maxsize=8)
def _plain_words(document: str) -> str:
    words = re.findall(r"\w+", document.lower())
    return f" {' '.join(words)} "


def passages_of(document: str, ids: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(id, text) of the passages labelled "[id] text", for those of `ids` that there are."""
    for label in ids:
        start = re.search(rf"^[ \t]*\[{re.escape(label)}\]", document, re.M)
        if start:
            kind = re.escape(label.rstrip("0123456789"))
            end = re.compile(rf"^[ \t]*\[{kind}\d+\]", re.M).search(document, start.end())
            yield label, document[start.end() : end.start() if end else None]


def squeeze(text: str) -> str:
    """Single spaces for all white space."""
    return " ".join(text.split())
