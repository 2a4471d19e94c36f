"""Short answers with one right value, or a set of them."""

import re
import threading
from decimal import Decimal

from dgrpo.longblocks.rewards.matching import (
    answers,
    by_part,
    column,
    f1,
    final_answer,
    guarded,
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
    return [float(normalise(a) in gold) for a, gold in _pairs(completions, answer, aliases)]


def token_f1(prompts, completions, *, answer=None, aliases=None, **columns) -> dict:
    """F1 of the final answer's words times their precision, the best over the aliases.

    The factor (see `guarded`) takes the profit out of listing candidates.
    The part `f1` is the plain F1 of the literature.

    Columns: `aliases` (list of str) or `answer` (str).
    """
    found = []
    for given, gold in _pairs(completions, answer, aliases):
        words = normalise(given).split()
        pairs = [overlap(words, g.split()) for g in gold]
        found.append((max(guarded(*pair) for pair in pairs), max(f1(*pair) for pair in pairs)))
    return by_part(("reward", "f1"), found)


def item_f1(prompts, completions, *, items=None, **columns) -> dict:
    """F1 of a comma-separated list against a set of items, times its precision; order is free.

    Duplicates and extra items cost precision. Parts: `precision`, `recall`.

    Columns: `items` (list of str).
    """
    found = []
    for completion, gold in zip(completions, column(items, len(completions)), strict=True):
        if not gold:
            raise ValueError("items: got a row without items, expected a list of texts")
        given = [
            normalise(x) for x in re.split(r"[,;] |[,;]$| and ", squeeze(final_answer(completion)))
        ]
        precision, recall = overlap([x for x in given if x], [normalise(str(x)) for x in gold])
        found.append((guarded(precision, recall), precision, recall))
    return by_part(("reward", "precision", "recall"), found)


def final_number(prompts, completions, *, answer=None, aliases=None, **columns) -> list[float]:
    """1 where the last number of the completion equals the (last) number of one of the aliases.

    Columns: `aliases` (list of str) or `answer` (str).
    """
    values = []
    for completion, gold in _rows(completions, answer, aliases):
        found = _last_number(without_thinking(completion))
        values.append(float(found is not None and found in {_last_number(g) for g in gold}))
    return values


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
    values = []
    golds = solution if answer is None and aliases is None else answer
    for completion, gold in _rows(completions, golds, aliases, normal=False):
        given = _last_boxed(completion)
        if given is None:
            given = final_answer(completion)
            if len(_values(given)) > max(len(_values(g)) for g in gold):
                values.append(0.0)
                continue
        given = given.strip()
        found = parse(_latex(given), parsing_timeout=limit) if 0 < len(given) <= 1000 else []
        values.append(
            float(
                bool(found)
                and any(
                    verify(parse(_latex(g), parsing_timeout=limit), found, timeout_seconds=limit)
                    for g in gold
                )
            )
        )
    return values


def _rows(completions, answer, aliases, normal=True):
    n = len(completions)
    for c, a, b in zip(completions, column(answer, n), column(aliases, n), strict=True):
        right = answers(a, b)
        if not normal:
            given = b if b else [a]
            right = [_last_boxed(str(g)) or str(g) for g in given]
        yield c, right


def _pairs(completions, answer, aliases):
    for completion, gold in _rows(completions, answer, aliases):
        yield final_answer(completion), gold


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


def _latex(text: str) -> str:
    return text if "$" in text else f"${text}$"


def _values(text: str) -> list[str]:
    """The values that a text lists, split at commas, semicolons, "or" and "and"."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return [part for part in re.split(r"[,;]|\bor\b|\band\b", text) if part.strip()]
