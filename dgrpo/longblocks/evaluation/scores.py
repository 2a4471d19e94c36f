"""Scores of the public benchmarks, with the signature of a reward.

They are close to the official scripts, not equal in every corner: compare systems with each other
and not with a leaderboard.
"""

import re
from collections import Counter
from difflib import SequenceMatcher
from os.path import commonprefix

from dgrpo.longblocks.evaluation.instructions import follows
from dgrpo.longblocks.rewards.matching import (
    common_subsequence,
    contains,
    final_answer,
    normalise,
    per_sample,
    without_thinking,
)

_LETTER = re.compile(
    r"\\(?:boxed|text)\{\(?([A-Z])\)?\}|"
    r"\b(?:answer|option|choice)\b\W*(?:is\W*)?\(?([A-Z])\)?(?![A-Za-z'])",
    re.I,
)
_ALONE = re.compile(r"(?<![A-Za-z])\(?([A-Z])\)?(?![A-Za-z'])")


@per_sample()
def choice(text, answer) -> float:
    """1 where the letter that a completion chooses is `answer` ("A", "B", ...)."""
    return float(chosen_letter(text) == answer.strip().upper())


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


@per_sample()
def word_f1(text, answers) -> float:
    """F1 of the words, the best over `answers` (question answering)."""
    return max(_f1(_words(final_answer(text)), _words(a)) for a in answers)


@per_sample()
def character_f1(text, answers) -> float:
    """F1 of the characters but for white space and punctuation (Chinese question answering)."""
    return max(_f1(_characters(final_answer(text)), _characters(a)) for a in answers)


@per_sample()
def rouge_l(text, answers, language=None) -> float:
    """ROUGE-L F1 by words, in Chinese (`language` "zh") by characters, the best over answers."""
    cut = _characters if language == "zh" else _words
    given = cut(without_thinking(text))
    return max(_rouge(given, cut(a)) for a in answers)


@per_sample()
def class_name(text, answers, classes) -> float:
    """1 over the number of class names in the first line if the right one is among them.

    A name that is part of a longer one found there does not count by itself.
    """
    line = without_thinking(text).strip().split("\n")[0]
    found = [name for name in classes if name in line]
    found = [n for n in found if not any(n != other and n in other for other in found)]
    return 1 / len(found) if answers[0] in found else 0.0


@per_sample()
def same_number(text, answers) -> float:
    """Share of the numbers in a completion that are the right one (retrieval, counting)."""
    wanted = re.findall(r"\d+", answers[0])
    found = re.findall(r"\d+", without_thinking(text))
    return found.count(wanted[0]) / len(found) if found and wanted else 0.0


@per_sample()
def contained(text, answers) -> float:
    """1 where one of `answers` stands in the first line of the final answer as whole words."""
    line = normalise(final_answer(text))
    return float(any(contains(line, normalise(a)) for a in answers))


@per_sample()
def code_similarity(text, answers) -> float:
    """Edit similarity of the first line of code with the right one (completion of code)."""
    lines = [line for line in without_thinking(text).split("\n") if line.strip()]
    code = [line for line in lines if not line.lstrip().startswith(("`", "#", "//"))]
    return max(SequenceMatcher(None, code[0] if code else "", a).ratio() for a in answers)


@per_sample()
def number_list(text, answers) -> float:
    """Share of a list of numbers that is right from its start on (∞Bench math_calc)."""
    wanted = [n for a in answers for n in re.findall(r"-?\d+", str(a))]
    found = re.findall(r"-?\d+", without_thinking(text))
    return len(commonprefix([wanted, found])) / len(wanted) if wanted else 0.0


@per_sample("instructions")
def instructions(text, instruction_ids, arguments, prompt) -> tuple:
    """1 where all of a prompt's instructions are followed; part `instructions`: the share."""
    text = without_thinking(text)
    done = [follows(n, s, text, prompt) for n, s in zip(instruction_ids, arguments, strict=True)]
    known = [d for d in done if d is not None]
    return (float(all(known)), sum(known) / len(known)) if known else (None, None)


def _f1(given: list[str], right: list[str]) -> float:
    common = sum((Counter(given) & Counter(right)).values())
    return 2 * common / (len(given) + len(right)) if given and right else float(given == right)


def _words(text: str) -> list[str]:
    return normalise(text).split()


def _characters(text: str) -> list[str]:
    return [c for c in normalise(text) if c.isalnum()]


def _rouge(given: list[str], right: list[str]) -> float:
    """F1 from the longest common subsequence."""
    common = common_subsequence(given, right)
    return 2 * common / (len(given) + len(right)) if given and right else 0.0
