"""Token weights: every normaliser of a loss, computed from the masks before the forward pass.

The losses of all tokens, micro-batches and ranks are summed, and nothing is divided afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgrpo.objectives.sequences import padded_sequence_ids, sequence_sums, sums_by_id

_KINDS = {"sequence": "grpo", "token": "dapo", "constant": "dr_grpo", "local": "bnpo"}


class BatchCounts(NamedTuple):
    """Counts over all ranks and all micro-batches of one optimiser step: ints or 0-dim tensors."""

    tokens: Tensor | int  # unmasked tokens
    sequences: Tensor | int  # sequences with an unmasked token
    micro_batches: Tensor | int = 1


def batch_counts(
    masks: Sequence[Tensor],
    sequence_ids: Sequence[Tensor] | None = None,
    all_reduce: Callable[[Tensor], object] | None = None,
) -> BatchCounts:
    """Count one optimiser step: `masks`, one per micro-batch, (B, T) or packed (N,). No host sync.

    `sequence_ids` (see `sequence_sums`) go with packed masks. `all_reduce` sums an int64 tensor in
    place over all data-parallel ranks. A sequence without an unmasked token is not counted.
    """
    ids = [None] * len(masks) if sequence_ids is None else sequence_ids
    device = masks[0].device if masks else None
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    for mask, numbers in zip(masks, ids, strict=True):
        flat, index = _flatten(mask, numbers)
        sequences = (sums_by_id(flat.long(), index) > 0).sum()
        counts += torch.stack([flat.sum(), sequences, torch.ones_like(sequences)])
    if all_reduce is not None:
        all_reduce(counts)
    return BatchCounts(*counts.unbind())


def token_weights(
    mask: Tensor,
    kind: str = "token",
    *,
    sequence_ids: Tensor | None = None,
    counts: BatchCounts | None = None,
    max_length: int | None = None,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight `w` of each token's loss, shaped like `mask`, 0 where masked.

    n_s: unmasked tokens of the token's sequence s; W = `world_size`; counts as in `BatchCounts`:

        "grpo", "sequence"       W / (n_s · sequences)                       2402.03300
        "dapo", "token"          W / tokens                                  2503.14476
        "dr_grpo", "constant"    W / (`max_length` · sequences)              2503.20783
        "bnpo", "local"          W / (tokens of this call · micro_batches)   name as in TRL

    `mask` is (B, T), or (N,) packed with `sequence_ids` (N,) int64 (see `sequence_sums`; "token"
    and "local" do without). `counts` (see `batch_counts`) default to this call's own. `world_size`
    is the number of ranks over which gradients are *averaged* (FSDP, DDP: the whole mesh), 1 where
    they are summed. "grpo" needs whole sequences in a call; only "bnpo" depends on the split into
    micro-batches. Raises ValueError on an unknown kind and on a missing argument.
    """
    kind = _KINDS.get(kind, kind)
    if kind not in _KINDS.values():
        names = ", ".join(f'"{paper}"/"{name}"' for name, paper in _KINDS.items())
        raise ValueError(f"kind: got {kind!r}, expected one of {names}")
    if world_size > 1 and counts is None:
        raise ValueError(
            f"counts: got None with world_size={world_size}, expected the counts over all ranks; "
            "pass batch_counts(masks, ids, all_reduce=torch.distributed.all_reduce)"
        )
    if kind == "dr_grpo" and (max_length or 0) <= 0:
        raise ValueError(
            f'max_length: got {max_length}, expected a positive number for kind="{kind}"; '
            "pass the largest completion length that sampling allows"
        )
    needs_ids = kind == "grpo" or (kind == "dr_grpo" and counts is None)
    flat, index = _flatten(mask, sequence_ids, needs_ids)
    if counts is None:
        counts = batch_counts([flat], [index]) if needs_ids else BatchCounts(flat.sum(), 0)
    if kind == "grpo":
        norm = sequence_sums(flat.double(), index) * counts.sequences
    elif kind == "dr_grpo":
        norm = counts.sequences * max_length
    elif kind == "dapo":
        norm = counts.tokens
    else:
        norm = flat.sum() * counts.micro_batches
    # fp64 until the last step: products of counts pass 2^24. Nothing unmasked gives 0, not 0 / 0.
    norm = torch.as_tensor(norm, dtype=torch.float64).clamp(min=1)
    return (flat.double() * world_size / norm).to(dtype).reshape(mask.shape)


def _flatten(
    mask: Tensor, sequence_ids: Tensor | None, needs_ids: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`mask` as (N,) bool, and its sequence ids, made from the rows of a (B, T) mask."""
    if mask.dim() not in (1, 2):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected (N,) or (B, T)")
    if mask.dim() == 2 and sequence_ids is None:
        sequence_ids = padded_sequence_ids(mask)
    if needs_ids and sequence_ids is None:
        raise ValueError(
            f"sequence_ids: got None for a mask of shape {tuple(mask.shape)}, expected (N,) int64; "
            "pass the sequence of each packed token"
        )
    return mask.reshape(-1) != 0, None if sequence_ids is None else sequence_ids.reshape(-1)
