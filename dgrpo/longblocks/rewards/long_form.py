"""Long answers that must cover a list of points, in a form and a length."""

import math
import re

from dgrpo.longblocks.rewards.matching import (
    common_subsequence,
    contains,
    copied,
    normalise,
    per_sample,
    repetition,
    without_thinking,
)

_MARKS = {"bullets": re.compile(r"\s*[-*]\s+(.+)"), "numbered": re.compile(r"\s*\d+[.)]\s+(.+)")}
_HEADING = re.compile(r"\s*#{1,6}\s+(.+)")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
PARTS = ("coverage", "precision", "form", "length", "repetition", "copying")


@per_sample(*PARTS)
def coverage(
    completion,
    points,
    form=None,
    headings=None,
    min_words=None,
    max_words=None,
    document=None,
    distractors=None,
) -> tuple[float, ...]:
    """How well a long answer covers its points: a product of six factors, each a part.

    * `coverage`: share of the points that an item of the answer covers, that is, names all of the
      point's texts and none of the distractors. An item covers one point at most, so that one
      long item does not cover all.
    * `precision`: share of the items that cover a point.
    * `form`: share of the lines that follow the form: "bullets" ("- item"), "numbered"
      ("1. item"), "table" (rows "| a | b |", as wide as the first), "sections" (share of the
      headings that stand in order, text under each, no others), "" free.
    * `length`: 1 from `min_words` to `max_words`, falling to 0 at none and at twice as many.
    * `repetition`: 1 up to a third of repeated runs of six words, falling to 0.
    * `copying`: 1 up to a tenth copied in bulk from the document, falling to 0 at a half.

    Columns: `points` (list of list of str), `form`, `headings` (list of str), `min_words`,
    `max_words` (0: no limit), `document`, `distractors` (list of str: wrong values).
    """
    if not points:
        raise ValueError("points: got a row without points, expected at least one list of texts")
    text = without_thinking(completion).strip()
    if not text:
        return (0.0,) * (1 + len(PARTS))
    items, shape = _read(text, form or "", headings or [])
    wanted = [[normalise(part) for part in point] for point in points]
    wrong = {normalise(value) for value in distractors or ()}
    edges = [_covers(item, wanted, wrong) for item in items]
    words = len(text.split())
    length = min(1.0, words / min_words) if min_words else 1.0
    if max_words and words > max_words:
        length = max(0.0, 2.0 - words / max_words)
    repeats = max(repetition(text), 1.0 - len(set(items)) / len(items) if items else 0.0)
    factors = (
        _matching(edges, len(points)) / len(points),
        sum(map(bool, edges)) / len(items) if items else 0.0,
        shape,
        length,
        _falling(repeats, 1 / 3, 1.0),
        _falling(copied(text, document), 0.1, 0.5),
    )
    return math.prod(factors), *factors


def _covers(item: str, wanted: list[list[str]], wrong: set[str]) -> list[int]:
    """The points that an item covers."""
    points = [k for k, parts in enumerate(wanted) if all(contains(item, p) for p in parts)]
    named = {value for value in wrong if contains(item, value)} if points else set()
    return [k for k in points if not any(not contains(" ".join(wanted[k]), v) for v in named)]


def _read(text: str, form: str, headings: list[str]) -> tuple[list[str], float]:
    """The answer's items in normal form, and how well it keeps to its form."""
    lines = [line for line in text.splitlines() if line.strip()]
    if form in _MARKS:
        marked = [_MARKS[form].fullmatch(line) for line in lines]
        return [normalise(m[1]) for m in marked if m], sum(map(bool, marked)) / len(lines)
    if form == "table":
        rows = [line.strip() for line in lines if not set(line) <= set(" \t:|-")]
        cells = [row.count("|") if row[:1] == row[-1:] == "|" else 0 for row in rows]
        good = [count > 1 and count == cells[0] for count in cells]
        items = [normalise(r.replace("|", " ")) for r, ok in zip(rows, good, strict=True) if ok]
        ruled = len(rows) < len(lines)
        return items[1:] if ruled else items, sum(good) / len(rows) if rows else 0.0
    if form == "sections":
        return _sections(lines, [normalise(h) for h in headings])
    if form:
        known = "bullets, numbered, table, sections or an empty text"
        raise ValueError(f"form: got {form!r}, expected {known}")
    return [normalise(s) for line in lines for s in _SENTENCE.split(line)], 1.0


def _sections(lines: list[str], headings: list[str]) -> tuple[list[str], float]:
    items, found = [], []
    for line in lines:
        heading = _HEADING.fullmatch(line)
        if heading:
            found.append([normalise(heading[1]), 0])
            continue
        if found:
            found[-1][1] += 1
        mark = _MARKS["bullets"].fullmatch(line) or _MARKS["numbered"].fullmatch(line)
        items += [normalise(s) for s in _SENTENCE.split(mark[1] if mark else line.strip())]
    full = [title for title, size in found if size]
    most = max(len(headings), len(found))
    return items, common_subsequence(full, headings) / most if most else 1.0


def _matching(edges: list[list[int]], points: int) -> int:
    """Points covered when each item covers one at most: a maximum matching."""
    owner = [-1] * points

    def place(item: int, seen: set[int]) -> bool:
        for point in edges[item]:
            if point not in seen:
                seen.add(point)
                if owner[point] < 0 or place(owner[point], seen):
                    owner[point] = item
                    return True
        return False

    return sum(place(item, set()) for item in range(len(edges)))


def _falling(value: float, start: float, end: float) -> float:
    """1 up to `start`, then in a line to 0 at `end`."""
    return min(1.0, max(0.0, (end - value) / (end - start)))
