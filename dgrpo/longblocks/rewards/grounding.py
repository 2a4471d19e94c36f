"""Answers that must rest on passages of the document, or say that it has none."""

import re

from dgrpo.longblocks.rewards.matching import (
    f1,
    final_answer,
    guarded,
    is_right,
    normalise,
    overlap,
    passages_of,
    per_sample,
    squeeze,
    without_thinking,
)

_CITED = re.compile(r"\[([A-Za-z]*\d+)\]")
_QUOTE = re.compile(
    r'^[ \t*>-]*quote[ \t]*:[ \t]*["“](.+)["”][ \t]*\[([A-Za-z]*\d+)\][ \t.]*$', re.I | re.M
)
_QUOTE_LINE = re.compile(r"^[ \t*>-]*quote[ \t]*:.*$", re.I | re.M)  # may follow the answer
_BLOCK = re.compile(r"</?RETRIEVAL>", re.I)
_ENTRY = re.compile(r"^[ \t]*\[([A-Za-z]*\d+)\](.*?)(?=^[ \t]*\[[A-Za-z]*\d+\]|\Z)", re.S | re.M)
_ABSTENTIONS = (
    "not answerable",
    "unanswerable",
    "cannot be answered",
    "not in document",
    "not stated in document",
)
_MIN_QUOTE = 5  # words


@per_sample("abstained")
def abstention(completion, answerable, answer=None, aliases=None) -> tuple:
    """1 for the right answer to what is answerable, and for abstaining from what is not.

    To abstain is to say so in the final answer ("not answerable"), without an answer beside it.

    Columns: `answerable` (bool), `aliases` (list of str) or `answer` (str).
    """
    plain = _QUOTE_LINE.sub("", completion)
    silent = _abstains(plain)
    if answerable and not silent:
        return is_right(plain, answer, aliases), 0.0
    return float(silent and not answerable), float(silent)


@per_sample("precision", "recall")
def citation(completion, passage_ids) -> tuple:
    """F1 of the cited labels ("[P12]", each once) against the supporting ones, times precision.

    Columns: `passage_ids` (list of str).
    """
    cited = set(_CITED.findall(without_thinking(completion)))
    precision, recall = overlap(list(cited), list(passage_ids or []))
    return guarded(precision, recall), precision, recall


@per_sample("answer", "citation_precision", "citation_recall", "quote", "abstained")
def grounded(
    completion,
    passage_ids,
    answerable=None,
    answer=None,
    aliases=None,
    passages=None,
    document=None,
) -> tuple:
    """A right answer with exact quotations of the supporting passages.

    The completion is `Answer: value` and lines `Quote: "sentence" [P12]`. The reward is 0 for a
    wrong answer, else half of it for the answer and half for the evidence: F1 of the cited labels
    times their precision times the share of quotations that are exact: that stand in the passage of
    their label but for white space and have five words or are the whole passage. What the document
    does not answer is to be answered by an abstention without quotations.

    Columns: `passage_ids`, `passages`, `aliases` (lists of str), `answerable` (bool),
    `document` (str) with passages labelled "[P12]" at line starts.
    """
    plain, text = _QUOTE_LINE.sub("", completion), without_thinking(completion)
    silent = _abstains(plain)
    quotes, lines = _QUOTE.findall(text), len(_QUOTE_LINE.findall(text))
    if answerable is False:
        right = float(silent)
        return float(silent and not lines), right, None, None, None, right
    right = 0.0 if silent else is_right(plain, answer, aliases)
    ids = [str(label) for label in passage_ids or []]
    precision, recall = overlap([label for _, label in quotes], ids)
    known = dict(zip(ids, passages or [], strict=False))
    known |= passages_of(document or "", {label for _, label in quotes})
    known = {label: squeeze(text) for label, text in known.items()}
    exact = sum(_is_exact(quote, known.get(label)) for quote, label in quotes)
    exact = exact / lines if lines else 0.0
    value = right * (0.5 + 0.5 * (guarded(precision, recall) * exact))
    return value, right, precision, recall, exact, float(silent)


@per_sample("answer", "retrieval_precision", "retrieval_recall")
def retrieval(completion, passage_ids, passages, answer=None, aliases=None) -> tuple:
    """Retrieve, then generate (ICR², arXiv 2501.08248): copy the supporting passages, then answer.

    The completion is `<RETRIEVAL>`, a line "[P3] text" for each passage, `</RETRIEVAL>`, then
    the answer. The reward is 0 for a wrong answer, else half for the answer and half for the block:
    F1 of its entries times their precision, an entry being right if its label is a supporting one,
    not given before, and its words have F1 of at least 0.9 with the passage's. More than one block,
    or none, is an empty one.

    Columns: `passage_ids`, `passages`, `aliases` (lists of str).
    """
    text = without_thinking(completion)
    pieces, marks = _BLOCK.split(text), _BLOCK.findall(text)
    whole = [mark.upper() for mark in marks] == ["<RETRIEVAL>", "</RETRIEVAL>"]
    entries = _ENTRY.findall(pieces[1]) if whole else []
    gold = dict(zip(map(str, passage_ids), passages, strict=True))
    hits = {
        label
        for label, copy in entries
        if f1(*overlap(normalise(copy).split(), normalise(gold.get(label, "")).split())) >= 0.9
    }
    precision = len(hits) / len(entries) if entries else 0.0
    recall = len(hits) / len(gold) if gold else 0.0
    right = is_right(_QUOTE_LINE.sub("", pieces[-1]), answer, aliases)
    value = right * (0.5 + 0.5 * guarded(precision, recall))
    return value, right, precision, recall


def _abstains(completion: str) -> bool:
    """Whether the final answer says that the document has none, and nothing else."""
    return normalise(final_answer(completion)) in _ABSTENTIONS


def _is_exact(quote: str, passage: str | None) -> bool:
    words = quote.split()
    quote = " ".join(words)
    return quote in (passage or "") and (len(words) >= _MIN_QUOTE or quote == passage)
