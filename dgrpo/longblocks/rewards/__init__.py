"""Rewards: functions `(prompts, completions, **columns) -> list[float]`, and what runs them.

A reward scores each sample by itself, in [0, 1]. It gets every column of the data by name, a value
per sample, and returns a list, or a dict of lists whose key "reward" is the score and the others
are reported as parts. None, NaN or a text (the reason) in place of a number is a sample that could
not be scored: it is left out of training and counted. Needs the standard library alone.
"""

from dgrpo.longblocks.rewards.answers import exact_match, final_number, item_f1, math, token_f1
from dgrpo.longblocks.rewards.by_row import by_row
from dgrpo.longblocks.rewards.grounding import abstention, citation, grounded, retrieval
from dgrpo.longblocks.rewards.judge import judge
from dgrpo.longblocks.rewards.long_form import coverage
from dgrpo.longblocks.rewards.shape import format_regex, format_tags, length

__all__ = [
    "abstention",
    "by_row",
    "citation",
    "coverage",
    "exact_match",
    "final_number",
    "format_regex",
    "format_tags",
    "grounded",
    "item_f1",
    "judge",
    "length",
    "math",
    "retrieval",
    "token_f1",
]
