"""What a checkpoint's failure says: the rank, the file, the cause, in one line."""

from __future__ import annotations

from torch.distributed.checkpoint.api import CheckpointException


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the file and the rank."""


class OtherFormat(CheckpointError):
    """A checkpoint is whole as far as one can tell, but of another version of dgrpo."""


def failures(error: CheckpointException) -> str:
    """What DCP gathered from the ranks that failed, without its tracebacks."""
    causes = ((rank, cause) for rank, (cause, _) in error.failures.items())
    return by_rank({rank: f"{type(cause).__name__}: {cause}" for rank, cause in causes})


def by_rank(failed: dict[int, str]) -> str:
    """One line; ranks that say the same share it."""
    ranks: dict[str, list[int]] = {}
    for rank, text in sorted(failed.items()):
        ranks.setdefault(text, []).append(rank)
    return "; ".join(f"rank {', '.join(map(str, who))}: {text}" for text, who in ranks.items())
