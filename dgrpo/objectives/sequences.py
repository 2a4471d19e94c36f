"""Sums over the sequences of a packed batch, without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor


def padded_sequence_ids(mask: Tensor) -> Tensor:
    """Sequence ids of a padded batch: `mask` (B, T) -> (B * T,) int64, -1 where masked."""
    if mask.dim() != 2:
        wanted = "expected (B, T); for packed tokens number the sequences yourself, 0 … S - 1"
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, {wanted}")
    rows = torch.arange(mask.shape[0], device=mask.device)[:, None]
    return torch.where(mask != 0, rows, -1).reshape(-1)


def sequence_sums(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """For each token the sum of `values` over its own sequence; 0 where the id is -1. (N,).

    `sequence_ids` (N,) int64 numbers the sequences of this call, 0 … S - 1 in any order; -1 is a
    token of no sequence (a prompt, padding). S may not exceed N. Differentiable in `values`, and
    bitwise the same on every run.
    """
    inside, sums = sequence_ids >= 0, sums_by_id(values, sequence_ids)
    return torch.where(inside, sums[sequence_ids.clamp(min=0)], torch.zeros_like(values))


def sums_by_id(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """The sum of `values` over sequence s at index s, and 0 at the indices left over. (N,)."""
    check_sequence_ids(sequence_ids, values)
    kept = torch.where(sequence_ids >= 0, values, torch.zeros_like(values))
    # index_put sorts its indices on CUDA; index_add would sum in a random order there.
    index = (sequence_ids.clamp(min=0),)
    return torch.zeros_like(values).index_put(index, kept, accumulate=True)


def check_sequence_ids(sequence_ids: Tensor, values: Tensor, name: str = "sequence_ids") -> None:
    """Raise on a wrong shape or dtype, and on CPU (where it costs no sync) on a wrong number."""
    if sequence_ids.dtype != torch.int64:
        raise TypeError(
            f"{name}: got dtype {sequence_ids.dtype}, expected torch.int64; convert it with .long()"
        )
    if sequence_ids.shape != values.shape or values.dim() != 1:
        raise ValueError(
            f"{name}: got shape {tuple(sequence_ids.shape)} for values of shape "
            f"{tuple(values.shape)}, expected (N,) for both; see padded_sequence_ids(mask)"
        )
    if sequence_ids.device.type == "cpu" and sequence_ids.numel():
        low, high = int(sequence_ids.min()), int(sequence_ids.max())
        if low < -1 or high >= values.numel():
            raise ValueError(
                f"{name}: got values from {low} to {high}, expected -1 … {values.numel() - 1}"
                "; number them from 0 within this call, and give -1 to what is left out"
            )
