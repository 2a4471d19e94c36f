"""From samples to packed micro-batches, as many on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dgrpo.distributed import ranks
from dgrpo.objectives import Context
from dgrpo.trainer.attention.packed import Prefixes
from dgrpo.trainer.batch.micro import Micro
from dgrpo.trainer.batch.sample import IGNORED, SHARED, Sample


def pack(
    samples: Sequence[Sample], max_tokens: int, *, share_prompts: bool = True, **coefficients: Any
) -> list[Micro]:
    """Pack samples into micros of at most `max_tokens` tokens, by first-fit decreasing.

    Samples of one group with the same prompt go together and share it, as far as `max_tokens`
    allows; a longer sample gets a micro of its own.

    Args:
        max_tokens: tokens in a micro; a shared prompt counts once.
        share_prompts: lay a prompt out once for all of its samples in a micro.
        coefficients: scalar fields of `Context`, e.g. `teacher_coef=0.5, clip_low=0.2`.

    Raises:
        ValueError: `max_tokens` below 1, or a field of `SHARED` given for some samples only.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: got {max_tokens}, expected at least 1")
    fields = shared_fields(samples)
    alike: dict[Any, list[int]] = {}  # samples of a group with the same prompt
    for i, sample in enumerate(samples):
        key = (sample.group, sample.prompt_ids.numpy().tobytes()) if share_prompts else i
        alike.setdefault(key, []).append(i)
    units, costs = [], []
    for same in alike.values():
        prefix = len(samples[same[0]].prompt_ids) - 1
        sizes = [len(samples[i].completion_ids) for i in same]
        for chosen in _first_fit(sizes, max_tokens - prefix):
            units.append([same[n] for n in chosen])
            costs.append(prefix + sum(sizes[n] for n in chosen))
    return [
        _micro(samples, [units[n] for n in chosen], fields, coefficients)
        for chosen in _first_fit(costs, max_tokens)
    ]


def _first_fit(costs: Sequence[int], limit: int) -> list[list[int]]:
    """Bins of items by first-fit decreasing, ascending in each; one over the limit has its own."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):  # stable: ties in order
        place = next((b for b, free in enumerate(room) if costs[i] <= free), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(limit)
        bins[place].append(i)
        room[place] -= costs[i]
    return [sorted(chosen) for chosen in bins]


def shared_fields(samples: Sequence[Sample]) -> tuple[str, ...]:
    """Names of the optional per-token fields that samples have; ValueError if only some do."""
    counts = {name: sum(getattr(s, name) is not None for s in samples) for name in SHARED}
    for name, have in counts.items():
        if 0 < have < len(samples):
            raise ValueError(
                f"{name}: got it for {have} of {len(samples)} samples, expected all or none"
            )
    return tuple(name for name, have in counts.items() if have)


def balanced_count(micros: list[Micro], **coefficients: Any) -> list[Micro]:
    """Fill up with masked one-token micros to the largest count of any rank. Collective.

    A filler has the fields of the other ranks' micros; `coefficients` are those given to `pack`.
    """
    if ranks().world == 1:
        return micros
    context = micros[0].context if micros else None
    have = [context is not None and getattr(context, name) is not None for name in SHARED]
    most, *present = ranks().maxima([len(micros), *have])
    fields = [name for name, there in zip(SHARED, present, strict=True) if there]
    return micros + [filler(fields, **coefficients) for _ in range(most - len(micros))]


def filler(fields: Sequence[str] = ("token_weights",), **coefficients: Any) -> Micro:
    """A micro of one masked token: its loss is 0, and still connected to the model."""
    one = Sample(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    one.loss_mask = torch.zeros(1, dtype=torch.bool)
    for name in fields:
        setattr(one, name, torch.zeros(1))
    return replace(_micro([one], [[0]], fields, coefficients), samples=(), starts=(), indices=())


def _micro(
    samples: Sequence[Sample],
    units: Sequence[Sequence[int]],  # indices of samples; those of a unit share their prompt
    fields: Sequence[str],
    coefficients: Mapping[str, Any],
) -> Micro:
    members = [i for unit in units for i in unit]
    chosen = tuple(samples[i] for i in members)
    ids, positions, branches, starts = _lay_out([[samples[i] for i in unit] for unit in units])
    lengths = tuple(map(len, ids))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    counts = [len(sample.completion_ids) for sample in chosen]
    where = torch.cat([torch.arange(t, t + c) for t, c in zip(starts, counts, strict=True)])

    def spread(pieces: list[Tensor], dtype: torch.dtype, empty: float = 0) -> Tensor:
        """(C,) pieces to the (T,) tokens whose hidden states predict them."""
        values = torch.full((int(ends[-1]),), empty, dtype=dtype)
        values[where] = torch.cat([piece.to(dtype) for piece in pieces])
        return values

    def column(name: str, default: float, dtype: torch.dtype, empty: float = 0) -> Tensor:
        given = zip([getattr(sample, name) for sample in chosen], counts, strict=True)
        pieces = [torch.full((c,), default, dtype=dtype) if x is None else x for x, c in given]
        return spread(pieces, dtype, empty)

    masked = [torch.where(s.mask, s.completion_ids, IGNORED) for s in chosen]
    targets = spread(masked, torch.int64, IGNORED)
    context = None
    if "token_weights" in fields:
        tensors = {name: column(name, 0, torch.float32) for name in ("advantages", *fields)}
        scalars = dict(coefficients)
        if any(sample.teacher_coef is not None for sample in chosen):
            teacher_coef = float(scalars.pop("teacher_coef", Context.teacher_coef))
            tensors["teacher_coef"] = column("teacher_coef", teacher_coef, torch.float32)
        context = Context(**tensors, **scalars)
    return Micro(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat(positions)[None],
        cu_seqlens=ends.to(torch.int32),
        lengths=lengths,
        sequence_ids=torch.repeat_interleave(torch.arange(len(ids)), torch.tensor(lengths)),
        targets=targets,
        rows=torch.nonzero(targets != IGNORED).reshape(-1),
        context=context,
        teacher_rows=column("teacher_rows", -1, torch.int64, -1),
        prefixes=Prefixes.of(lengths, branches) if any(branches) else None,
        samples=chosen,
        starts=tuple(starts),
        indices=tuple(members),
    )


def _lay_out(
    units: Sequence[Sequence[Sample]],
) -> tuple[list[Tensor], list[Tensor], list[int], list[int]]:
    """The sequences: their ids, positions and numbers of branches; and the samples' starts.

    A start is the token that predicts the completion's first one.
    """
    ids, positions, branches, starts, end = [], [], [], [], 0

    def add(tokens: Tensor, position: int, own_branches: int) -> None:
        nonlocal end
        ids.append(tokens)
        positions.append(torch.arange(position, position + len(tokens)))
        branches.append(own_branches)
        end += len(tokens)

    for unit in units:
        size = len(unit[0].prompt_ids) - 1  # of the prefix
        shared = size if len(unit) > 1 else 0
        if shared:
            add(unit[0].prompt_ids[:size], 0, len(unit))
        for sample in unit:
            starts.append(end + size - shared)
            add(torch.cat([sample.prompt_ids[shared:], sample.completion_ids[:-1]]), shared, 0)
    return ids, positions, branches, starts
