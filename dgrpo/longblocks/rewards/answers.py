"""Short answers with one right value, or a set of them."""

import re
import threading
from decimal import Decimal

from dgrpo.longblocks.rewards.matching import (
    answers,
    by_sample,
    f1,
    final_answer,
    guarded,
    is_right,
    normalise,
    overlap,
    squeeze,
    without_thinking,
)

_NUMBER = re.compile(r"(?:(?<!\w)-)?\d+(?:[.,]\d+)*")


def exact_match(prompts, completions, *, answer=None, aliases=None, **columns) -> list[float]:
    """1 where the final answer is one of the aliases in normal form, else 0.

    An answer that names several values, the right one among them, is wrong.

    Columns: `aliases` (list of str) or `answer` (str).
    """
    return by_sample(is_right, completions, answer, aliases)


def token_f1(prompts, completions, *, answer=None, aliases=None, **columns) -> dict:
    """F1 of the final answer's words times their precision, the best over the aliases.

    The precision (see `guarded`) makes listing candidates unprofitable. The part `f1` is the plain
    F1 of the literature.

    Columns: `aliases` (list of str) or `answer` (str).
    """

    def score(completion, one, many):
        words = normalise(final_answer(completion)).split()
        pairs = [overlap(words, gold.split()) for gold in answers(one, many)]
        return max(guarded(*pair) for pair in pairs), max(f1(*pair) for pair in pairs)

    return by_sample(score, completions, answer, aliases, parts=("f1",))


def item_f1(prompts, completions, *, items=None, **columns) -> dict:
    """F1 of a comma-separated list against a set of items, times its precision; order is free.

    Duplicates and extra items cost precision. Parts: `precision`, `recall`.

    Columns: `items` (list of str).
    """

    def score(completion, gold):
        if not gold:
            raise ValueError("items: got a row without items, expected a list of texts")
        listed = re.split(r"[,;] |[,;]$| and ", squeeze(final_answer(completion)))
        given = [item for item in map(normalise, listed) if item]
        precision, recall = overlap(given, [normalise(str(x)) for x in gold])
        return guarded(precision, recall), precision, recall

    return by_sample(score, completions, items, parts=("precision", "recall"))


def final_number(prompts, completions, *, answer=None, aliases=None, **columns) -> list[float]:
    """1 where the last number of the completion equals the (last) number of one of the aliases.

    Columns: `aliases` (list of str) or `answer` (str).
    """

    def score(completion, one, many):
        right = {_last_number(gold) for gold in answers(one, many)}
        found = _last_number(without_thinking(completion))
        return float(found is not None and found in right)

    return by_sample(score, completions, answer, aliases)


def math(
    prompts, completions, *, answer=None, aliases=None, solution=None, **columns
) -> list[float]:
    """1 where math-verify finds the final answer equal to the right one, else 0.

    The final answer is the last `\\boxed{...}`, else what follows the last "Answer:", else the
    last line, at most 1,000 characters. Without a box, a list of values where one is asked for is
    wrong: math-verify itself would accept any list that ends in the right one.

    Columns: `aliases`, `answer` or `solution` (str, LaTeX or plain).
    """
    from math_verify import parse, verify

    # Both stop themselves by an alarm signal, which only a main thread gets.
    limit = 5 if threading.current_thread() is threading.main_thread() else None

    def score(completion, one, many):
        answers(one, many)  # raises where the row has none
        right = [_last_boxed(str(gold)) or str(gold) for gold in many or [one]]
        given = _last_boxed(completion)
        if given is None:
            given = final_answer(completion)
            if len(_values(given)) > max(len(_values(gold)) for gold in right):
                return 0.0
        given = given.strip()
        found = read(given) if 0 < len(given) <= 1000 else []
        same = (verify(read(gold), found, timeout_seconds=limit) for gold in right)
        return float(bool(found) and any(same))

    def read(text):
        return parse(text if "$" in text else f"${text}$", parsing_timeout=limit)

    golds = solution if answer is None and aliases is None else answer
    return by_sample(score, completions, golds, aliases)


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
