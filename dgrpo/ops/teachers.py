"""What a teacher hands to the loss head: hidden states and a head, or top-k log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from torch import Tensor

OpenHead = Callable[[], AbstractContextManager[tuple[Tensor, Tensor | None]]]


@dataclass(frozen=True)
class TeacherHead:
    """A teacher's last hidden states and its LM head: its full distribution, never materialised.

    hidden: (Nt, Ht) or (B, T, Ht), in (pinned) host memory or on the device; from the host it is
        streamed block by block. Of weight's dtype, or one that converts to it exactly (bf16 states
        with an fp32 head); under autocast both take autocast's dtype, as the student's do.
    weight: (V', Ht), or a function that returns a context manager yielding (weight, bias), entered
        for each pass over the head (a sharded head gathers there and frees on exit).
    bias: (V',) or None. logit_scale, logit_softcap: as in the student's arguments.
    rows: int64, shaped like `targets`: the row of `hidden` that belongs to a token, -1 = the token
        has no teacher. None = row n belongs to token n.
    """

    hidden: Tensor
    weight: Tensor | OpenHead
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    rows: Tensor | None = None

    @contextmanager
    def open(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The head's weight and bias, for the time of one pass."""
        if isinstance(self.weight, Tensor):
            yield self.weight, self.bias
        else:
            with self.weight() as (weight, bias):
                yield weight, bias


@dataclass(frozen=True)
class TopKTeacher:
    """A teacher known by its K most probable tokens; the rest of its mass is one tail bucket.

    token_ids: (N, K) int64 without repeats in a row, -1 = padding. logprobs: (N, K), nats, at the
        teacher's own temperature. The divergence is taken over K + 1 buckets, a lower bound of the
        full one. A row of padding alone has no teacher.
    target_logprobs: (N,) log-probability of the sampled token; without it, that of its bucket.
    Leading dimensions may be shaped like `targets`.
    """

    token_ids: Tensor
    logprobs: Tensor
    target_logprobs: Tensor | None = None
