"""What a checkpoint's failure says: the rank, the file, the cause, in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dgrpo.distributed import Ranks

_T = TypeVar("_T")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the file and the rank."""


class OtherFormat(CheckpointError):
    """A checkpoint is whole as far as one can tell, but of another version of dgrpo."""


def together(ranks: Ranks, what: str, call: Callable[[], _T]) -> _T:
    """`call()`, or CheckpointError on every rank if it fails on any. COLLECTIVE.

    A collective within `call` must run on every rank, whatever fails.
    """
    value, error = None, None
    try:
        value = call()
    except BaseException as caught:  # an interrupt too must not leave the other ranks waiting
        error = caught
    failed: dict[str, list[str]] = {}  # ranks that say the same share it
    for rank, text in enumerate(ranks.gather(error and f"{type(error).__name__}: {error}")):
        if text:
            failed.setdefault(text, []).append(str(rank))
    if error is not None and not isinstance(error, Exception):
        raise error
    if failed:
        texts = (f"rank {', '.join(who)}: {text}" for text, who in failed.items())
        raise CheckpointError(f"{what}: {'; '.join(texts)}") from error
    return value
