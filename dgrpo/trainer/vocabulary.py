"""Student and teacher are compared id by id: the same id must be the same token for both."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from dgrpo import distributed as ranks
from dgrpo.trainer.config import RunSettings
from dgrpo.trainer.loading import read_tokenizer

log = logging.getLogger(__name__)

SHOWN = 3  # ids of an error
PROBE = "The 2nd Test: naïve\n\tdef f(x): return x + 10"


def teacher_tokenizer(settings: RunSettings, tokenizer: Any) -> Any | None:
    """The teacher's tokenizer, compared with the student's; None where it is not compared.

    That is with `teacher.allow_other_tokenizer`, or for an endpoint whose name for the model is
    neither a folder here nor on the hub. Warns of that, and where both have the same ids but end
    or split texts in different ways.

    Raises:
        ValueError: ids differ, or there is no tokenizer where one is expected.
    """
    wanted = settings.teacher
    if wanted.allow_other_tokenizer:
        return None
    setting, name, revision = "teacher.name", wanted.name, wanted.revision
    if wanted.tokenizer is not None:
        setting, name, revision = "teacher.tokenizer", wanted.tokenizer, None
    served = settings.method.teacher == "served" and wanted.tokenizer is None
    theirs = None
    # A server may call its model what it likes: ask the hub only for what can be a name on it.
    if not served:
        theirs = read_tokenizer(setting, name, revision, wanted.trust_remote_code)
    elif Path(name).is_dir() or name.count("/") == 1:
        with contextlib.suppress(ValueError):
            theirs = read_tokenizer(setting, name, revision, wanted.trust_remote_code)
    if theirs is not None:
        check_same_ids(tokenizer, theirs)
    if ranks.rank() == 0:
        for line in _differences(tokenizer, theirs):
            log.warning("%s: %s", setting, line)
    return theirs


def common_vocab(
    student_size: int,
    teacher_size: int,
    student_tokenizer: Any = None,
    teacher_tokenizer: Any = None,
) -> int:
    """The columns in which two heads are compared: the smaller of their padded vocabularies.

    With the tokenizers it is checked that both give every id the same token, and that the columns
    left out are padding.

    Raises:
        ValueError: the tokenizers disagree, or use ids beyond the smaller head.
    """
    size = min(student_size, teacher_size)
    if student_tokenizer is None or teacher_tokenizer is None:
        return size
    check_same_ids(student_tokenizer, teacher_tokenizer)
    used = max(student_tokenizer.get_vocab().values(), default=-1) + 1
    if used > size:
        raise ValueError(
            f"teacher: got heads of {student_size} (student) and {teacher_size} (teacher) rows, "
            f"expected at least the {used} ids that the tokenizers use"
        )
    return size


def check_same_ids(student: Any, teacher: Any) -> None:
    """ValueError with the first ids at which two tokenizers, special tokens included, differ."""
    ours, theirs = set(student.get_vocab().items()), set(teacher.get_vocab().items())
    apart = sorted({number for _, number in ours ^ theirs})
    if not apart:
        return

    def at(number: int, vocabulary: set[tuple[str, int]]) -> str:
        found = sorted(token for token, own in vocabulary if own == number)
        return " or ".join(map(repr, found)) if found else "no token"

    first = "; ".join(f"id {i} is {at(i, theirs)}, expected {at(i, ours)}" for i in apart[:SHOWN])
    more = f" (and {len(apart) - SHOWN} more ids)" if len(apart) > SHOWN else ""
    raise ValueError(
        f"teacher: got another tokenizer than the student's: {first}{more}; distributions over "
        "tokens can only be compared id by id: take a teacher with the student's tokenizer, or set "
        "teacher.allow_other_tokenizer=true where you know that the ids mean the same"
    )


def _differences(student: Any, teacher: Any | None) -> list[str]:
    """What to warn of: the ids are the same, or cannot be compared."""
    if teacher is None:
        return [
            "no tokenizer can be loaded under the name by which the endpoint serves the teacher, "
            "so its ids are not compared with the student's; set teacher.tokenizer"
        ]
    lines = []
    if student.eos_token_id != teacher.eos_token_id:
        lines.append(
            f"its tokenizer ends a text with {teacher.eos_token!r}, the student's with "
            f"{student.eos_token!r}: the teacher never asks for the student's end"
        )
    if student.encode(PROBE) != teacher.encode(PROBE):
        lines.append(
            "its tokenizer has the student's ids but splits texts in another way; the teacher "
            "reads the student's tokens, which may be unusual ones for it"
        )
    return lines
