"""Short answers with one right value, or a set of them."""

import re
import threading
from decimal import Decimal

from dgrpo.longblocks.rewards.matching import (
    answers,
    f1,
    final_answer,
    guarded,
    is_right,
    normalise,
    overlap,
    per_sample,
    squeeze,
    without_thinking,
)

_NUMBER = re.compile(r"(?:(?<!\w)-)?\d+(?:[.,]\d+)*")


@per_sample()
def exact_match(completion, answer=None, aliases=None) -> float:
    """1 where the final answer is one of the aliases in normal form, else 0.

    An answer that names several values, the right one among them, is wrong.

    Columns: `aliases` (list of str) or `answer` (str).
    """
    return is_right(completion, answer, aliases)


@per_sample("f1")
def token_f1(completion, answer=None, aliases=None) -> tuple:
    """F1 of the final answer's words times their precision, the best over the aliases.

    The precision makes listing candidates unprofitable. The part `f1` is that of the literature.

    Columns: `aliases` (list of str) or `answer` (str).
    """
    words = normalise(final_answer(completion)).split()
    pairs = [overlap(words, gold.split()) for gold in answers(answer, aliases)]
    return max(guarded(*pair) for pair in pairs), max(f1(*pair) for pair in pairs)


@per_sample("precision", "recall")
def item_f1(completion, items=None) -> tuple:
    """F1 of a comma-separated list, in any order, against a set of items, times its precision.

    Columns: `items` (list of str).
    """
    if not items:
        raise ValueError("items: got a row without items, expected a list of texts")
    listed = re.split(r"[,;] |[,;]$| and ", squeeze(final_answer(completion)))
    given = [item for item in map(normalise, listed) if item]
    precision, recall = overlap(given, [normalise(str(x)) for x in items])
    return guarded(precision, recall), precision, recall


@per_sample()
def final_number(completion, answer=None, aliases=None) -> float:
    """1 where the last number of the completion equals the (last) number of one of the aliases.

    Columns: `aliases` (list of str) or `answer` (str).
    """
    right = {_last_number(gold) for gold in answers(answer, aliases)}
    found = _last_number(without_thinking(completion))
    return float(found is not None and found in right)


@per_sample()
def math(completion, answer=None, aliases=None, solution=None) -> float:
    """1 where math-verify finds the final answer equal to the right one, else 0.

    The final answer is the last `\\boxed{...}`, else what follows the last "Answer:", else the
    last line, at most 1,000 characters. Without a box, a list of values where one is asked for is
    wrong: math-verify itself would accept any list that ends in the right one.

    Columns: `aliases`, `answer` or `solution` (str, LaTeX or plain).
    """
    from math_verify import parse, verify

    # Both stop themselves by an alarm signal, which only a main thread gets.
    limit = 5 if threading.current_thread() is threading.main_thread() else None

    def read(text):
        return parse(text if "$" in text else f"${text}$", parsing_timeout=limit)

    if answer is None and aliases is None:
        answer = solution
    answers(answer, aliases)  # raises where the row has none
    right = [_last_boxed(str(gold)) or str(gold) for gold in aliases or [answer]]
    given = _last_boxed(completion)
    if given is None:
        given = final_answer(completion)
        if len(_values(given)) > max(len(_values(gold)) for gold in right):
            return 0.0
    given = given.strip()
    found = read(given) if 0 < len(given) <= 1000 else []
    same = (verify(read(gold), found, timeout_seconds=limit) for gold in right)
    return float(bool(found) and any(same))


def _last_number(text: str) -> Decimal | str | None:
    found = _NUMBER.findall(text)
    if not found:
        return None
    digits = found[-1].replace(",", "")
    return Decimal(digits) if digits.count(".") < 2 else digits


def _last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}`, with its inner braces."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + 6, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 7 : i]
    return None


def _values(text: str) -> list[str]:
    """The values that a text lists, split at commas, semicolons, "or" and "and"."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return [part for part in re.split(r"[,;]|\bor\b|\band\b", text) if part.strip()]
