"""Hooks that look at a prompt's whole group: the teacher's prompt, and the gate on its weight.

A teacher context is `context(group, row) -> (prompt, weight)`, `row` the place of a completion in
its `group`: the prompt that the teacher sees (text or chat messages; None: the student's own) and
the factor on that completion's teacher term (0: no teacher). A gate is `gate(group) -> factors`,
one per completion. Both factors multiply `teacher_coef`, so with `method.advantage: none` they are
the weight of the whole completion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from dgrpo.data import PromptStream, render_row
from dgrpo.extras import load_function

Messages = list[dict[str, Any]]
View = tuple[str | Messages | None, float]
# Columns that the contexts of these names need: one of each tuple.
NEEDED = {
    "evidence": (("document",), ("evidence", "passages")),
    "privileged": (("privileged", "answer"),),
}


@dataclass(frozen=True)
class Attempt:
    """One completion of a group, as hooks see it."""

    prompt: str | Messages
    completion: str
    row: dict[str, Any]  # the columns of the prompt's row
    tokens: int  # of the completion
    reward: float  # 0 where the reward failed
    correct: bool  # reward above rewards.correct_above
    failed: bool  # its reward raised or timed out
    truncated: bool


TeacherContext = Callable[[Sequence[Attempt], int], View]
Gate = Callable[[Sequence[Attempt]], Sequence[float]]


def teacher_context(name: str, template: str) -> TeacherContext | None:
    """The hook of `method.teacher_context`; None for "same".

    `template` is a text with `{prompt}` and `{context}`, for the two hooks that add a context.
    """
    known = {
        "same": None,
        "evidence": evidence,
        "correct_rollout": partial(correct_rollout, template=template),
        "privileged": partial(privileged, template=template),
    }
    return known[name] if name in known else load_function("method.teacher_context", name)


def gate(name: str) -> Gate | None:
    """The hook of `method.gate`; None for "none"."""
    known = {"none": None, "wrong": wrong, "mixed": mixed}
    return known[name] if name in known else load_function("method.gate", name)


def evidence(group: Sequence[Attempt], row: int) -> View:
    """OPSDL (2604.17535): the prompt with its `document` replaced by the row's `evidence`.

    Without an `evidence` column its `passages` are joined. A row with neither, or whose document
    is not part of its prompt, has no teacher.
    """
    attempt = group[row]
    document = attempt.row.get("document")
    short = attempt.row.get("evidence") or "\n\n".join(attempt.row.get("passages") or ())
    if not document or not short:
        return None, 0.0
    prompt = _map_text(attempt.prompt, lambda text: text.replace(document, short))
    return (prompt, 1.0) if prompt != attempt.prompt else (None, 0.0)


def correct_rollout(group: Sequence[Attempt], row: int, *, template: str) -> View:
    """SSOPD (2605.17497): the longest wrong completion, seen with the shortest correct one.

    Its weight is 4 p (1 - p), p the share of correct completions; every other completion has no
    teacher, and neither has a group that is all right or all wrong.
    """
    scored = [i for i, attempt in enumerate(group) if not attempt.failed]
    right = [i for i in scored if group[i].correct]
    wrong_ones = [i for i in scored if not group[i].correct]
    if not right or not wrong_ones or row != max(wrong_ones, key=lambda i: group[i].tokens):
        return None, 0.0
    witness = group[min(right, key=lambda i: group[i].tokens)]
    share = len(right) / len(scored)
    return _with_context(group[row].prompt, witness.completion, template), 4 * share * (1 - share)


def privileged(group: Sequence[Attempt], row: int, *, template: str) -> View:
    """The prompt with the row's `privileged` text, else its `answer`; neither: no teacher."""
    attempt = group[row]
    text = attempt.row.get("privileged") or attempt.row.get("answer")
    return (_with_context(attempt.prompt, str(text), template), 1.0) if text else (None, 0.0)


def wrong(group: Sequence[Attempt]) -> list[float]:
    """KDRL's reward-guided masking (2506.02208): the teacher on wrong completions only."""
    return [0.0 if attempt.correct else 1.0 for attempt in group]


def mixed(group: Sequence[Attempt]) -> list[float]:
    """4 p (1 - p) of the group's share p of correct completions: most where it is undecided."""
    scored = [attempt.correct for attempt in group if not attempt.failed]
    share = sum(scored) / max(1, len(scored))
    return [4 * share * (1 - share)] * len(group)


def _with_context(prompt: str | Messages, context: str, template: str) -> str | Messages:
    return _map_text(
        prompt, lambda text: template.replace("{prompt}", text).replace("{context}", context)
    )


def _map_text(prompt: str | Messages, change: Callable[[str], str]) -> str | Messages:
    """The text of a prompt changed; of chat messages that of the last one."""
    if isinstance(prompt, str):
        return change(prompt)
    return [*prompt[:-1], {**prompt[-1], "content": change(prompt[-1]["content"])}]


def check_columns(name: str, context: TeacherContext | None, stream: PromptStream) -> None:
    """Raise ValueError where no row of the data gives the context of that name its prompt.

    Reads up to the first row that does. Contexts that look at the group, and the user's own, are
    not checked.
    """
    if context is None or name not in NEEDED:
        return
    missing = list(NEEDED[name])
    with closing(_rows(stream)) as found:
        for prompt, row in found:
            attempt = Attempt(
                prompt, "", row, tokens=0, reward=0.0, correct=False, failed=False, truncated=False
            )
            if context([attempt], 0)[1]:
                return
            missing = [columns for columns in missing if not any(row.get(c) for c in columns)]
    if missing:
        what = f"the column {' or '.join(missing[0])}, so no completion would have a teacher"
    else:
        one_of = " and ".join(" or ".join(columns) for columns in NEEDED[name])
        what = f"{one_of}, with the document as a part of its prompt"
    raise ValueError(
        f"method.teacher_context: got {name!r}, but no row has {what}; add it to the rows, name it "
        "in data.sources[].columns, or take another method.preset"
    )


def _rows(stream: PromptStream) -> Iterator[tuple[str | Messages, dict[str, Any]]]:
    """The prompt's text and the row of every usable row, once; the stream stays where it is."""
    before, log = stream.state_dict(), stream.report.log
    stream.report.log = lambda line: None  # they are told when it is their turn
    try:
        for cursor, source, books in zip(stream.cursors, stream.sources, stream.books, strict=True):
            while (found := cursor.next()) is not None:
                row = found[1]
                try:
                    if any(row.get(column) != value for column, value in source.where.items()):
                        continue
                    row = books.join(row) if books else row
                    prompt, _ = render_row(row, source)
                except Exception:  # a row that the run will drop too, and tell why
                    continue
                yield prompt, row
    finally:
        stream.load_state_dict(before)
        stream.report.log = log
