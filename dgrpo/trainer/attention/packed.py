"""What packed sequences see of each other, and attention over them in plain torch.

Completions of one prompt can share it: the prompt's tokens but the last are a sequence of their
own, the prefix, and the sequences right after it are its branches. A branch sees all of the prefix,
of itself what is not later, and nothing of the other branches.

Legend: T packed tokens, S sequences (prefixes and branches among them), P tokens of a prefix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 1024  # least number of queries of a block with a mask


@dataclass(frozen=True)
class Prefixes:
    """Which of the packed sequences are prefixes. Made by `Prefixes.of`, once per micro-batch."""

    branches: tuple[int, ...]  # of each of the S sequences: how many after it see it; 0: no prefix
    order: tuple[int, ...]  # sequences whose keys, end to end, are what the S sequences see
    cu_seqlens_k: Tensor  # (S + 1,) int32, ends of the keys of each sequence in that order
    longest_k: int  # most keys of a sequence
    starts: Tensor  # (T,) int64, the first token of each token's sequence

    @classmethod
    def of(cls, lengths: Sequence[int], branches: Sequence[int]) -> Prefixes:
        """The description of S sequences, on the CPU."""
        order, keys, prefix, left = [], [], 0, 0
        for n, length in enumerate(lengths):
            seen = [prefix, n] if left else [n]
            left -= bool(left)
            if branches[n]:
                prefix, left = n, branches[n]
            order += seen
            keys.append(length + sum(lengths[i] for i in seen[:-1]))
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return cls(
            branches=tuple(branches),
            order=tuple(order),
            cu_seqlens_k=torch.tensor([0, *keys]).cumsum(0).to(torch.int32),
            longest_k=max(keys),
            starts=ends[:-1].repeat_interleave(torch.tensor(lengths)),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Prefixes:
        """The same with its tensors on `device`."""
        ends, starts = (
            x.to(device, non_blocking=non_blocking) for x in (self.cu_seqlens_k, self.starts)
        )
        return replace(self, cu_seqlens_k=ends, starts=starts)

    def expand(self, packed: Tensor, lengths: Sequence[int]) -> Tensor:
        """Keys or values (T, ...) as the S sequences see them: a prefix again for each branch.

        In pieces rather than by index: the gradient of a prefix is summed in the same order always.
        """
        pieces = packed.split(list(lengths))
        return torch.cat([pieces[n] for n in self.order])


class _Scores(NamedTuple):
    """What attention does to its scores."""

    scaling: float
    window: int | None
    softcap: float | None
    dropout: float


def sequences_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    prefixes: Prefixes | None = None,
) -> Tensor:
    """Causal attention within each packed sequence; query (1, heads, T, D), result likewise.

    A sequence without window or soft cap is one call of sdpa; else blocks of queries see only the
    keys that they need. The branches of a prefix are cut into blocks together.
    """
    scores = _Scores(scaling, window, softcap, dropout)
    runs = list(_runs(lengths, prefixes))
    sizes = [size for length, branches in runs for size in (length, sum(branches)) if size]
    pieces = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
    outs, start = [], 0
    for length, branches in runs:
        q, k, v = next(pieces)
        if softcap is None and (window is None or length <= window):
            outs.append(_sdpa(q, k, v, scores, is_causal=True))
        else:  # one branch of an empty prefix
            origin = torch.zeros(length, dtype=torch.int64, device=q.device)
            outs += _branches(q, k, v, None, [length], origin, scores)
        start += length
        if branches:
            origin = prefixes.starts[start : start + sum(branches)] - start
            outs += _branches(*next(pieces), (k, v), branches, origin, scores)
            start += sum(branches)
    return torch.cat(outs, dim=2)


def _runs(lengths: Sequence[int], prefixes: Prefixes | None) -> Iterator[tuple[int, Sequence[int]]]:
    """Each sequence that is no branch, with the lengths of its branches."""
    n = 0
    while n < len(lengths):
        count = 0 if prefixes is None else prefixes.branches[n]
        yield lengths[n], lengths[n + 1 : n + 1 + count]
        n += 1 + count


def _branches(
    query: Tensor,  # (1, heads, B, D) of all branches, end to end
    key: Tensor,
    value: Tensor,
    prefix: tuple[Tensor, Tensor] | None,  # keys and values, (1, kv_heads, P, D) each
    lengths: Sequence[int],
    starts: Tensor,  # (B,) first token of each token's branch, counted from the first branch's
    scores: _Scores,
) -> Iterator[Tensor]:
    """Blocks of queries, each with the prefix and its own branches from the first one's start."""
    total, size = query.shape[2], prefix[0].shape[2] if prefix else 0
    window = scores.window
    reach = math.inf if window is None else window
    block = max(QUERY_BLOCK, window or 0)
    cuts = [sum(lengths[:n]) for n in range(len(lengths))]
    for first in range(0, total, block):
        end = min(first + block, total)
        begin = max(cut for cut in cuts if cut <= first)
        own = max(begin, first - reach + 1)
        i = torch.arange(first, end, device=query.device)[:, None]
        j = torch.arange(own, end, device=query.device)
        origin = starts[first:end, None]
        seen = (j <= i) & (starts[own:end] == origin)
        if window is not None:
            seen &= i - j < window
        k, v = key[:, :, own:end], value[:, :, own:end]
        if prefix:
            # The query nearest to the prefix: the first of the block, or of a branch within it.
            near = 0 if any(first <= cut < end for cut in cuts) else first - begin
            low = min(size, max(0, size + near - reach + 1))
            before = torch.arange(low - size, 0, device=query.device)  # from a branch's start
            seen = torch.cat([(i - origin - before) < reach, seen], dim=1)
            k, v = (torch.cat([x[:, :, low:], y], 2) for x, y in zip(prefix, (k, v), strict=True))
        yield _masked(query[:, :, first:end], k, v, seen, scores)


def _masked(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scores: _Scores) -> Tensor:
    """Attention where `seen` (queries, keys) bool allows it."""
    cap, dropout = scores.softcap, scores.dropout
    if cap is None:
        return _sdpa(query, key, value, scores, attn_mask=seen)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    z = torch.tanh(query @ key.transpose(-1, -2) * scores.scaling / cap) * cap
    z = z.masked_fill(~seen, float("-inf"))
    weights = torch.softmax(z, -1, dtype=torch.promote_types(z.dtype, torch.float32))
    return F.dropout(weights.to(value.dtype), dropout, training=dropout > 0) @ value


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scores: _Scores, **mask: Any) -> Tensor:
    options = {"dropout_p": scores.dropout, "scale": scores.scaling}
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped, **options, **mask)
