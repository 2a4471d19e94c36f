"""What a teacher hands to the loss head: hidden states and a head, or top-k log-probabilities.

Each kind checks its own fields; `topk` holds the arithmetic of the second one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dgrpo.ops.checks import (
    FLOATS,
    IGNORE,
    check_bias,
    check_finite,
    check_tensor,
    check_transform,
    is_dtensor,
    shape,
)

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

    @property
    def columns(self) -> int | None:
        """Of the head; None before it is opened."""
        return len(self.weight) if isinstance(self.weight, Tensor) else None

    def kind(self) -> tuple:
        """What decides how a call runs."""
        return (type(self).__name__,)

    def check(self, targets: Tensor, device: torch.device, temperature: float) -> None:
        """Raise for shapes and dtypes that do not fit; a function's head is checked when opened."""
        hidden = check_tensor("teacher.hidden", self.hidden)
        if hidden.dim() not in (2, 3):
            raise ValueError(f"teacher.hidden: got shape {shape(hidden)}, expected (Nt, Ht)")
        if hidden.dtype not in FLOATS:
            raise TypeError(f"teacher.hidden: got {hidden.dtype}, expected a floating dtype")
        if hidden.device not in (device, torch.device("cpu")):
            raise ValueError(f"teacher.hidden: got {hidden.device}, expected {device} or the host")
        check_transform(1.0, self.logit_scale, self.logit_softcap, of="teacher.")
        self._check_rows(targets)
        if not callable(self.weight):
            self.check_head(self.weight, self.bias, device)

    def _check_rows(self, targets: Tensor) -> None:
        rows, count = self.rows, self.hidden.shape[:-1].numel()
        if rows is None:
            if count != targets.numel():
                raise ValueError(
                    f"teacher.hidden: got {count} rows, expected {targets.numel()}, one per token; "
                    "or say with teacher.rows which belongs to which"
                )
            return
        if check_tensor("teacher.rows", rows).dtype != torch.int64 or rows.shape != targets.shape:
            raise ValueError(
                f"teacher.rows: got {rows.dtype} of shape {shape(rows)}, expected torch.int64 of "
                f"shape {tuple(targets.shape)}, that of targets"
            )
        if rows.is_cpu and targets.is_cpu:  # elsewhere asking would wait: `check=True` does
            self._check_row_values(targets)

    def _check_row_values(self, targets: Tensor) -> None:
        """Raise for a row of a token with loss that does not exist. A sync on a device."""
        count = self.hidden.shape[:-1].numel()
        rows = self.rows[(targets != IGNORE).to(self.rows.device)]
        outside = (rows < -1) | (rows >= count)
        if bool(outside.any()):
            raise ValueError(
                f"teacher.rows: got {int(rows[outside][0])}, expected -1 to {count - 1}"
            )

    def check_head(self, weight: object, bias: Tensor | None, device: torch.device) -> None:
        """Raise for shape, dtype or device of the (opened) head that do not fit."""
        if is_dtensor(weight):
            raise TypeError(
                "teacher.weight: got a DTensor, expected a tensor; pass a function that gathers it "
                "for the time of a pass (see TeacherHead)"
            )
        width = self.hidden.shape[-1]
        if check_tensor("teacher.weight", weight).dim() != 2 or weight.shape[1] != width:
            raise ValueError(
                f"teacher.weight: got shape {shape(weight)}, expected (V, {width}), with the width "
                "of teacher.hidden"
            )
        if weight.dtype not in FLOATS:
            raise TypeError(f"teacher.weight: got {weight.dtype}, expected a floating dtype")
        given = self.hidden.dtype
        exact = torch.promote_types(given, weight.dtype) == weight.dtype
        if not exact and not torch.is_autocast_enabled(device.type):
            raise TypeError(
                f"teacher.hidden: got {given}, expected {weight.dtype} like teacher.weight, or one "
                "that converts to it exactly; cast one of them, or call under autocast"
            )
        if weight.device != device:
            raise ValueError(f"teacher.weight: got {weight.device}, expected {device}, like weight")
        if bias is not None and check_tensor("teacher.bias", bias).shape != weight.shape[:1]:
            raise ValueError(f"teacher.bias: got shape {shape(bias)}, expected ({len(weight)},)")

    def check_values(self, targets: Tensor, taught: Tensor, vocabulary: int, columns: int) -> None:
        """Raise for values that would reach the loss and cannot be used. Syncs.

        `taught` (bool, like `targets`) says at which tokens they do; `columns` are the compared
        ones of this shard, `vocabulary` those of all shards.
        """
        states = self.hidden.reshape(-1, self.hidden.shape[-1])
        used = taught.reshape(-1).to(states.device)
        if self.rows is not None:
            self._check_row_values(targets)
            chosen = self.rows.reshape(-1).to(states.device)[used]
            used = torch.zeros(len(states), dtype=torch.bool, device=states.device)
            used[chosen[chosen >= 0]] = True
        check_finite("teacher.hidden", states, used)
        with self.open() as (weight, bias):
            check_finite("teacher.weight", weight[:columns])
            check_bias("teacher.bias", None if bias is None else bias[:columns])

    def picks(
        self, rows: Tensor, host_rows: Tensor, dense: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(n,) rows of `hidden`, where that lies, for the tokens `rows`, and which have a teacher.

        None: the token's own, and all. States on the host are picked there: that takes the indices
        to the host (a sync, unless `host_rows` and `self.rows` are there already).
        """
        where = self.hidden.device
        picks = host_rows if host_rows.device == where else rows.to(where)
        if self.rows is None:
            return (None if dense else picks), None
        chosen = self.rows.reshape(-1).to(where)[picks]
        has = (chosen >= 0).to(rows.device, non_blocking=True)
        return chosen.clamp(min=0), has


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

    columns = None  # of a head: there is none

    def kind(self) -> tuple:
        """What decides how a call runs."""
        return type(self).__name__, self.token_ids.shape

    def picks(self, rows: Tensor, host_rows: Tensor, dense: bool) -> tuple[None, None]:
        """No hidden states to pick from; `topk` sees which rows are padding alone."""
        return None, None

    def check(self, targets: Tensor, device: torch.device, temperature: float) -> None:
        """Raise for shapes and dtypes that do not fit."""
        if temperature != 1:
            raise ValueError(
                f"teacher_temperature: got {temperature} with a TopKTeacher, expected 1; its "
                "log-probabilities are of one temperature, which is set where they come from"
            )
        ids = check_tensor("teacher.token_ids", self.token_ids)
        logprobs = check_tensor("teacher.logprobs", self.logprobs)
        if ids.dtype != torch.int64:
            raise TypeError(f"teacher.token_ids: got {ids.dtype}, expected torch.int64")
        tokens = (tuple(targets.shape), (targets.numel(),))
        if ids.dim() < 2 or tuple(ids.shape[:-1]) not in tokens:
            raise ValueError(
                f"teacher.token_ids: got shape {shape(ids)}, expected ({targets.numel()}, K)"
            )
        if logprobs.shape != ids.shape or not logprobs.is_floating_point():
            raise ValueError(
                f"teacher.logprobs: got {logprobs.dtype} of shape {shape(logprobs)}, expected a "
                f"floating dtype and shape {shape(ids)}, that of teacher.token_ids"
            )
        own = self.target_logprobs
        if own is not None and (
            tuple(check_tensor("teacher.target_logprobs", own).shape) not in tokens
        ):
            raise ValueError(
                f"teacher.target_logprobs: got shape {shape(own)}, expected {tuple(targets.shape)}"
            )
        for name in ("token_ids", "logprobs", "target_logprobs"):
            value = getattr(self, name)
            if value is not None and value.device != targets.device:
                raise ValueError(f"teacher.{name}: got {value.device}, expected {targets.device}")

    def check_values(self, targets: Tensor, taught: Tensor, vocabulary: int, columns: int) -> None:
        """Raise for values at `taught` tokens that cannot be used. Syncs; see `TeacherHead`."""
        taught = taught.reshape(-1)
        ids, logprobs = (x.flatten(0, -2)[taught] for x in (self.token_ids, self.logprobs))
        own = self.target_logprobs
        if bool(((ids < -1) | (ids >= vocabulary)).any()):
            raise ValueError(
                f"teacher.token_ids: got an id outside, expected -1 (padding) to {vocabulary - 1}"
            )
        ordered = ids.sort(-1).values
        if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
            raise ValueError("teacher.token_ids: got an id twice in a row, expected each once")
        given = logprobs.masked_fill(ids < 0, -torch.inf)
        if bool(given.isnan().any()) or bool((given.double().exp().sum(-1) > 1 + 1e-3).any()):
            raise ValueError(
                "teacher.logprobs: got NaN or a row whose probabilities exceed 1, expected "
                "log-probabilities (nats)"
            )
        if own is not None:
            own = own.reshape(-1)[taught]
            bad = own.isnan() | (own > 1e-3)
            if bool(bad.any()):
                raise ValueError(
                    f"teacher.target_logprobs: got {int(bad.sum())} values that are NaN or above "
                    "0, expected log-probabilities (nats)"
                )
