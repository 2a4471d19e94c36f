"""Keys and values of the running samples, laid out for groups that share a prompt.

G groups, W samples each (the width), P prompt tokens, S generated tokens, h key heads, r query
heads per key head, d head width. The cache holds a prompt once per group, not once per sample:

    prompt   (2, G, h, P, d)       right-aligned, so that all have the same distance to the end
    suffix   (2, G, W, h, S, d)    grown by doubling; keys first, then values, in both

and a decoding step attends from the W samples of a group to their prompt in one product. Groups of
similar prompt length form a bucket and are padded to its longest. Sliding-window layers keep only
the last window of the prompt.

Hugging Face's caches hold a prompt once per sample, so they are not used: a batch is always packed,
(1, T) tokens, and the attention function hands query, key and value to `KVCache.attend`, at the
prefill with T = tokens of some prompts, then with T = samples, one token each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_FIRST = 32  # generated tokens for which there is room at first
_SCORES = 1 << 27  # attention scores (fp32) held at once


@dataclass
class Bucket:
    """Groups whose prompts are padded to the same length."""

    lengths: list[int]  # of the G prompts
    width: int
    longest: int
    prompt: dict[int, Tensor] = field(default_factory=dict)  # by layer
    suffix: dict[int, Tensor] = field(default_factory=dict)
    bias: Tensor | None = None  # (G, 1, 1, P), -inf on padding; None where there is none


class KVCache:
    """The cache of one wave of samples that started together.

    `groups` are (prompt length, samples) of each, by length, as neighbours of similar length share
    a bucket. The prefill runs `attention`.
    """

    def __init__(self, groups: Sequence[tuple[int, int]], attention: Callable):
        self.attention = attention
        self.steps = 0  # generated tokens in the cache, the current one included
        self.filled = 0  # groups prefilled before the current chunk
        self.chunk: list[int] = []  # prompt lengths of the chunk being prefilled
        self.buckets = _similar(groups)
        # Bucket of each group, and its place in it.
        self.places = [(b, i) for b in self.buckets for i in range(len(b.lengths))]

    def prefill(self, lengths: Sequence[int]) -> None:
        """The next forward pass holds the next `len(lengths)` groups' prompts."""
        self.filled += len(self.chunk)
        self.chunk = list(lengths)

    def decode(self) -> None:
        """The next forward pass holds one new token of every row."""
        self.chunk = []
        self.steps += 1

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,  # (1, h r, T, d)
        key: Tensor,  # (1, h, T, d)
        value: Tensor,  # (1, h, T, d)
        *args,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """Attention of one layer, which stores the new keys and values: (1, T, h r, d)."""
        if self.chunk:
            self._store_prompts(module.layer_idx, key, value, sliding_window)
            kwargs |= {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
            return self.attention(module, query, key, value, *args, **kwargs)
        if kwargs.get("s_aux") is not None:
            raise ValueError("model: got one with attention sinks; sample it with another sampler")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = torch.empty_like(query[0])  # (h r, T, d)
        parts = (x.split(self._rows(), dim=1) for x in (query[0], key[0], value[0], out))
        for bucket, *states in zip(self.buckets, *parts, strict=True):
            _attend(bucket, module.layer_idx, self.steps, *states, scaling, sliding_window, softcap)
        return out.transpose(0, 1)[None].contiguous(), None

    def keep(self, alive: Tensor) -> Tensor:
        """Drop rows that have ended: groups without any other, and width where all can spare it.

        `alive` is (rows,) bool on the CPU, at least one true. Returns the old row of each new one,
        int64 on the CPU. Some may have ended: they fill up groups that have fewer rows than others
        of their bucket.
        """
        order, buckets, start = [], [], 0
        for bucket, going in zip(self.buckets, alive.split(self._rows()), strict=True):
            going = going.view(len(bucket.lengths), bucket.width)
            counts = going.sum(1)
            groups = counts.nonzero()[:, 0]
            if len(groups):
                width = int(counts.max())
                columns = (~going[groups]).byte().argsort(dim=1, stable=True)[:, :width]
                rows = (groups[:, None] * bucket.width + columns).flatten()
                order.append(rows + start)
                buckets.append(bucket)
                _shrink(bucket, groups, rows, width)
            start += going.numel()
        self.buckets = buckets
        return torch.cat(order)

    def _rows(self) -> list[int]:
        """Samples of each bucket, the ones that have ended included."""
        return [len(bucket.lengths) * bucket.width for bucket in self.buckets]

    def _store_prompts(self, layer: int, key: Tensor, value: Tensor, window: int | None) -> None:
        pieces = zip(*(x[0].split(self.chunk, dim=1) for x in (key, value)), strict=True)
        for pair, (bucket, group) in zip(pieces, self.places[self.filled :], strict=False):
            size = min(bucket.longest, window or bucket.longest)
            if layer not in bucket.prompt:
                shape = (2, len(bucket.lengths), key.shape[1], size, key.shape[-1])
                bucket.prompt[layer] = key.new_zeros(shape)
            for store, new in zip(bucket.prompt[layer], pair, strict=True):
                n = min(new.shape[1], size)
                store[group, :, size - n :] = new[:, new.shape[1] - n :]


def _shrink(bucket: Bucket, groups: Tensor, rows: Tensor, width: int) -> None:
    """Keep these groups (G',) and these rows (G' width,) of a bucket."""
    if len(groups) < len(bucket.lengths):
        bucket.lengths = [bucket.lengths[i] for i in groups.tolist()]
        bucket.bias = None
        for layer, x in bucket.prompt.items():
            bucket.prompt[layer] = x[:, groups.to(x.device)]
    for layer, x in bucket.suffix.items():
        kept = x.flatten(1, 2)[:, rows.to(x.device)]
        bucket.suffix[layer] = kept.view(2, len(groups), width, *x.shape[3:])
    bucket.width = width


def _append(bucket: Bucket, layer: int, steps: int, key: Tensor, value: Tensor) -> Tensor:
    """Put one token of each row, (h, G W, d), behind the layer's suffix, which is returned."""
    heads, _, dim = key.shape
    shape = (len(bucket.lengths), bucket.width, heads)
    store = bucket.suffix.get(layer)
    if store is None or store.shape[4] < steps:
        room = _FIRST if store is None else 2 * store.shape[4]
        new = key.new_empty(2, *shape, room, dim)
        if store is not None:
            new[..., : store.shape[4], :] = store
        bucket.suffix[layer] = store = new
    for own, x in zip(store, (key, value), strict=True):
        own[:, :, :, steps - 1] = x.transpose(0, 1).reshape(*shape, dim)
    return store


def _attend(
    bucket: Bucket,
    layer: int,
    steps: int,
    query: Tensor,  # (h r, G W, d)
    key: Tensor,  # (h, G W, d)
    value: Tensor,
    out: Tensor,  # (h r, G W, d), written
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Attention of a bucket's rows."""
    prompt = bucket.prompt[layer]
    _, groups, heads, size, dim = prompt.shape
    step = steps - 1
    suffix = _append(bucket, layer, steps, key, value)
    # The window of a query at distance `step` from the prompt's end, itself included.
    skip = 0 if window is None else max(0, step + size - window + 1)
    first = 0 if window is None else max(0, step - window + 1)
    bias = bucket.bias if skip < size else None
    if bias is None and skip < size and min(bucket.lengths) < bucket.longest:
        bias = bucket.bias = _padding(bucket, query.device)
    shape = (heads, query.shape[0] // heads, groups, bucket.width, dim)
    query, out = (x.view(shape).permute(2, 0, 1, 3, 4) for x in (query, out))
    part = max(1, _SCORES // (shape[0] * shape[1] * bucket.width * (size + steps)))
    for a in range(0, groups, part):
        some = slice(a, a + part)
        out[some] = _attention(
            query[some],
            *prompt[:, some, :, skip:],
            *suffix[:, some, :, :, first : step + 1],
            None if bias is None else bias[some, ..., -size:][..., skip:],
            scaling,
            softcap,
        )


def _attention(
    query: Tensor,  # (G, h, r, W, d)
    prompt_k: Tensor,  # (G, h, P, d)
    prompt_v: Tensor,
    suffix_k: Tensor,  # (G, W, h, S, d)
    suffix_v: Tensor,
    bias: Tensor | None,  # (G, 1, 1, P)
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Softmax attention over prompt and suffix together: (G, h, r, W, d)."""
    groups, heads, repeat, width, dim = query.shape
    size, dtype = prompt_k.shape[2], query.dtype
    by_group = query.reshape(groups * heads, repeat * width, dim)
    by_row = query.permute(0, 3, 1, 2, 4).reshape(groups * width * heads, repeat, dim)
    shape = (groups, heads, repeat, width, size + suffix_k.shape[3])
    scores = query.new_empty(shape, dtype=torch.float32)
    left = _product(by_group, prompt_k.flatten(0, 1).transpose(1, 2))
    scores[..., :size] = left.view(groups, heads, repeat, width, size)
    right = _product(by_row, suffix_k.flatten(0, 2).transpose(1, 2))
    scores[..., size:] = right.view(groups, width, heads, repeat, -1).permute(0, 2, 3, 1, 4)
    scores *= scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores[..., :size] += bias[:, :, None]
    weights = scores.softmax(-1).to(dtype)
    left = weights[..., :size].reshape(groups * heads, repeat * width, size)
    right = weights[..., size:].permute(0, 3, 1, 2, 4)
    right = right.reshape(groups * width * heads, repeat, -1)
    out = _product(left, prompt_v.flatten(0, 1)).view(query.shape)
    tail = _product(right, suffix_v.flatten(0, 2)).view(groups, width, heads, repeat, dim)
    return (out + tail.permute(0, 2, 3, 1, 4)).to(dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched product with fp32 result."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _padding(bucket: Bucket, device: torch.device) -> Tensor:
    """(G, 1, 1, P): 0 on the prompt, -inf on the padding to its left."""
    place = torch.arange(bucket.longest, device=device)
    lengths = torch.tensor(bucket.lengths, device=device)
    padded = place < bucket.longest - lengths[:, None]
    bias = torch.zeros(padded.shape, device=device).masked_fill_(padded, float("-inf"))
    return bias[:, None, None]


def _similar(groups: Sequence[tuple[int, int]]) -> list[Bucket]:
    """Runs of equal width whose padding is at most an eighth of the run's tokens."""
    buckets: list[Bucket] = []
    for length, width in groups:
        if buckets and buckets[-1].width == width:
            last = buckets[-1]
            longest = max(last.longest, length)
            padded = longest * (len(last.lengths) + 1)
            if padded - sum(last.lengths) - length <= max(padded // 8, 64):
                last.lengths.append(length)
                last.longest = longest
                continue
        buckets.append(Bucket([length], width, length))
    return buckets
