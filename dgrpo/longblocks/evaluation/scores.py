"""Scores of the public benchmarks, with the signature of a reward.

They follow what the benchmarks publish, written anew: close to the official scripts, not equal in
every corner, so compare systems with each other and not with a leaderboard.
"""

import difflib
import re
from collections import Counter

from dgrpo.longblocks.evaluation.instructions import follows
from dgrpo.longblocks.rewards.matching import final_answer, normalise, without_thinking

_LETTER = re.compile(r"\\(?:boxed|text)\{\(?([A-Z])\)?\}|\b(?:answer|option|choice)\b\W*(?:is\W*)?"
                     r"\(?([A-Z])\)?(?![A-Za-z'])", re.I)  # fmt: skip
_ALONE = re.compile(r"(?<![A-Za-z])\(?([A-Z])\)?(?![A-Za-z'])")


def choice(prompts, completions, *, answer, **columns) -> list[float]:
    """1 where the letter that a completion chooses is `answer` ("A", "B", ...)."""
    pairs = zip(completions, answer, strict=True)
    return [float(chosen_letter(text) == right.strip().upper()) for text, right in pairs]


def chosen_letter(text: str) -> str | None:
    """The letter that a text settles on: the last "answer is B", else the only letter alone."""
    text = without_thinking(text)
    line = final_answer(text)
    if re.fullmatch(r"\W*[A-Za-z]\W*", line):
        return re.sub(r"\W", "", line).upper()
    if found := _LETTER.findall(text):
        return next(letter for letter in found[-1] if letter).upper()
    alone = set(_ALONE.findall(line)) - {"I"}
    return alone.pop() if len(alone) == 1 else None


def word_f1(prompts, completions, *, answers, **columns) -> list[float]:
    """F1 of the words, the best over `answers` (question answering)."""
    return [
        max(_f1(normalise(final_answer(text)).split(), normalise(a).split()) for a in right)
        for text, right in zip(completions, answers, strict=True)
    ]


def character_f1(prompts, completions, *, answers, **columns) -> list[float]:
    """F1 of the characters but for white space and punctuation (Chinese question answering)."""
    return [
        max(_f1(_characters(final_answer(text)), _characters(a)) for a in right)
        for text, right in zip(completions, answers, strict=True)
    ]


def rouge_l(prompts, completions, *, answers, language=None, **columns) -> list[float]:
    """ROUGE-L F1 by words, in Chinese (`language` "zh") by characters, the best over answers."""
    languages = language or [None] * len(completions)
    scores = []
    for text, right, tongue in zip(completions, answers, languages, strict=True):
        cut = _characters if tongue == "zh" else lambda t: normalise(t).split()
        text = cut(without_thinking(text))
        scores.append(max(_rouge(text, cut(a)) for a in right))
    return scores


def class_name(prompts, completions, *, answers, classes, **columns) -> list[float]:
    """1 over the number of class names in the first line if the right one is among them.

    A name that is part of a longer one found there does not count by itself.
    """
    scores = []
    for text, right, names in zip(completions, answers, classes, strict=True):
        line = (without_thinking(text).strip().split("\n") or [""])[0]
        found = [name for name in names if name in line]
        found = [n for n in found if not any(n != other and n in other for other in found)]
        scores.append(1 / len(found) if right[0] in found else 0.0)
    return scores


def same_number(prompts, completions, *, answers, **columns) -> list[float]:
    """Share of the numbers in a completion that are the right one (retrieval, counting)."""
    scores = []
    for text, right in zip(completions, answers, strict=True):
        wanted = re.findall(r"\d+", right[0])
        found = re.findall(r"\d+", without_thinking(text))
        scores.append(sum(n == wanted[0] for n in found) / len(found) if found and wanted else 0.0)
    return scores


def contained(prompts, completions, *, answers, **columns) -> list[float]:
    """1 where one of `answers` stands in the first line of the final answer as whole words."""
    scores = []
    for text, right in zip(completions, answers, strict=True):
        line = f" {normalise(final_answer(text))} "
        scores.append(float(any(f" {normalise(a)} " in line for a in right)))
    return scores


def code_similarity(prompts, completions, *, answers, **columns) -> list[float]:
    """Edit similarity of the first line of code with the right one (completion of code)."""
    scores = []
    for text, right in zip(completions, answers, strict=True):
        lines = [line for line in without_thinking(text).lstrip("\n").split("\n") if line.strip()]
        code = [line for line in lines if not line.lstrip().startswith(("`", "#", "//"))]
        line = code[0] if code else ""
        scores.append(max(difflib.SequenceMatcher(None, line, a).ratio() for a in right))
    return scores


def number_list(prompts, completions, *, answers, **columns) -> list[float]:
    """Share of a list of numbers that is right from its start on (∞Bench math_calc)."""
    scores = []
    for text, right in zip(completions, answers, strict=True):
        wanted = [n for a in right for n in re.findall(r"-?\d+", str(a))]
        found = re.findall(r"-?\d+", without_thinking(text))
        good = 0
        while good < min(len(wanted), len(found)) and wanted[good] == found[good]:
            good += 1
        scores.append(good / len(wanted) if wanted else 0.0)
    return scores


def instructions(prompts, completions, *, instruction_ids, arguments, prompt, **columns) -> dict:
    """1 where all of a prompt's instructions are followed; part `instructions`: the share."""
    scores, shares = [], []
    for text, names, settings, asked in zip(
        completions, instruction_ids, arguments, prompt, strict=True
    ):
        text = without_thinking(text)
        done = [follows(n, s, text, asked) for n, s in zip(names, settings, strict=True)]
        known = [d for d in done if d is not None]
        scores.append(float(all(known)) if known else None)
        shares.append(sum(known) / len(known) if known else None)
    return {"reward": scores, "instructions": shares}


def _f1(given: list[str], right: list[str]) -> float:
    common = sum((Counter(given) & Counter(right)).values())
    return 2 * common / (len(given) + len(right)) if given and right else float(given == right)


def _characters(text: str) -> list[str]:
    return [c for c in normalise(text) if c.isalnum()]


def _rouge(given: list[str], right: list[str]) -> float:
    """F1 from the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in given:
        before = 0
        for k, other in enumerate(right):
            kept = row[k + 1]
            row[k + 1] = before + 1 if word == other else max(row[k + 1], row[k])
            before = kept
    return 2 * row[-1] / (len(given) + len(right)) if given and right else 0.0
