"""Tokenizers and weights from a folder or the hub; what is wrong with them is told in one line.

Student and teacher are compared id by id, so the same id must be the same token for both.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoTokenizer

from dgrpo.distributed import ranks
from dgrpo.trainer.config import Model, RunSettings, Teacher

log = logging.getLogger(__name__)

# Files that hold a tokenizer's vocabulary, in the layouts that transformers reads.
VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json")
SHOWN = 3  # ids of an error
PROBE = "The 2nd Test: naïve\n\tdef f(x): return x + 10"


@contextlib.contextmanager
def loading(setting: str, name: str) -> Iterator[None]:
    """Raise ValueError of one line with the setting where what it names cannot be loaded.

    Wrap nothing in it but the reading of files: any exception counts as a fault of theirs.
    """
    path = Path(name)
    if (path.is_absolute() or len(path.parts) > 2) and not path.is_dir():
        raise ValueError(
            f"{setting}: got {name!r}, expected an existing folder or a hub name; "
            "the result of a stage is there once that stage has been run"
        )
    try:
        yield
    except Exception as error:  # each library that reads a file raises its own
        cause = damaged(path) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{setting}: got {name!r}, which cannot be loaded: {cause}") from error


def damaged(folder: Path) -> str | None:
    """The first file of a model's folder that ends too early or is something else; None if none."""
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            else:
                safe_open(path, framework="pt")
        except Exception as error:
            size = path.stat().st_size if path.exists() else 0
            return f"{path.name} is not whole: {size} bytes, {error}; copy or download it again"
    return None


def load_tokenizer(model: Model) -> Any:
    """The policy's tokenizer; warns if it has no end token."""
    tokenizer = read_tokenizer("model", model)
    if tokenizer.eos_token_id is None and ranks().first:
        log.warning(
            "model.tokenizer: got %r, which has no end-of-sequence token: given completions are "
            "not ended, and sampled ones end where the model's eos_token_id or rollout.max_tokens "
            "says; set eos_token in its tokenizer_config.json",
            model.tokenizer or model.name,
        )
    return tokenizer


def read_tokenizer(group: str, wanted: Model | Teacher) -> Any:
    """The tokenizer that a group of settings names, else that of its model.

    Raises:
        ValueError: there is none, with the setting. Without its files transformers makes one of
            the model's kind that knows no word.
    """
    setting, name, revision = f"{group}.tokenizer", wanted.tokenizer, None
    if name is None:
        setting, name, revision = f"{group}.name", wanted.name, wanted.revision
    missing = (
        f"it has no tokenizer files (tokenizer.json); copy them there, or set {group}.tokenizer"
    )
    with loading(setting, name):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=wanted.trust_remote_code
            )
        except Exception as error:
            folder = Path(name)
            if folder.is_dir() and not any(any(folder.glob(p)) for p in VOCABULARIES):
                raise ValueError(missing) from error
            raise
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        if len(tokenizer.get_vocab().keys() - added) < 2:
            raise ValueError(missing)
    return tokenizer


def teacher_tokenizer(settings: RunSettings, tokenizer: Any) -> Any | None:
    """The teacher's tokenizer, compared with the student's; None where it is not compared.

    That is with `teacher.allow_other_tokenizer`, or for an endpoint whose name for the model is
    neither a folder here nor on the hub. Warns of the latter, and where both have the same ids but
    end or split texts in different ways.

    Raises:
        ValueError: ids differ, or there is no tokenizer where one is expected.
    """
    wanted, theirs = settings.teacher, None
    if wanted.allow_other_tokenizer:
        return None
    # A server may call its model what it likes: ask the hub only for what can be a name on it.
    if settings.method.teacher != "served" or wanted.tokenizer is not None:
        theirs = read_tokenizer("teacher", wanted)
    elif Path(wanted.name).is_dir() or wanted.name.count("/") == 1:
        with contextlib.suppress(ValueError):
            theirs = read_tokenizer("teacher", wanted)
    if theirs is not None:
        check_same_ids(tokenizer, theirs)
    if ranks().first:
        for line in _differences(tokenizer, theirs):
            log.warning("teacher.%s: %s", "tokenizer" if wanted.tokenizer else "name", line)
    return theirs


def common_vocab(student_size: int, teacher_size: int, tokenizer: Any = None) -> int:
    """The columns in which two heads are compared: the smaller of their padded vocabularies.

    Raises:
        ValueError: the tokenizer that both share uses ids beyond the smaller head.
    """
    size = min(student_size, teacher_size)
    used = 0 if tokenizer is None else max(tokenizer.get_vocab().values(), default=-1) + 1
    if used > size:
        raise ValueError(
            f"teacher: got heads of {student_size} (student) and {teacher_size} (teacher) rows, "
            f"expected at least the {used} ids that the tokenizers use"
        )
    return size


def check_same_ids(student: Any, teacher: Any) -> None:
    """Raise ValueError with the first ids at which two tokenizers, special tokens too, differ."""
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


def _differences(student: Any, teacher: Any | None) -> Iterator[str]:
    """What to warn of: the ids are the same, or cannot be compared."""
    if teacher is None:
        yield (
            "no tokenizer can be loaded under the name by which the endpoint serves the teacher, "
            "so its ids are not compared with the student's; set teacher.tokenizer"
        )
        return
    if student.eos_token_id != teacher.eos_token_id:
        yield (
            f"its tokenizer ends a text with {teacher.eos_token!r}, the student's with "
            f"{student.eos_token!r}: the teacher never asks for the student's end"
        )
    if student.encode(PROBE) != teacher.encode(PROBE):
        yield (
            "its tokenizer has the student's ids but splits texts in another way; the teacher "
            "reads the student's tokens, which may be unusual ones for it"
        )
