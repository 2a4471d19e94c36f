"""Keys and values of the running samples, laid out for groups that share a prompt.

G groups, W samples each (the width), P prompt tokens, S generated tokens, h key heads, r query
heads per key head, d head width. The prompts lie in the cache once a group, not once a sample:

    prompt   (G, h, P, d)       right-aligned, so that the distance to the end is the same in all
    suffix   (G, W, h, S, d)    grown by doubling

and a decoding step attends from the W samples of a group to their prompt in one product. Groups of
similar prompt length form a bucket and are padded to its longest. Sliding-window layers keep only
the last window of the prompt.

Hugging Face's own cache is not used: a batch is always packed, (1, T) tokens, and the attention
function hands query, key and value to :meth:`KVCache.attend`, at the prefill with T = tokens of
some prompts, then with T = samples, one token each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_FIRST = 32  # generated tokens for which there is room at first
_SCORES = 1 << 27  # attention scores (fp32) held at once


@dataclass
class Bucket:
    """Groups whose prompts are padded to one length."""

    lengths: list[int]  # of the G prompts
    width: int
    longest: int
    prompt: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by layer
    suffix: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    bias: Tensor | None = None  # (G, 1, 1, P), -inf on padding; None where there is none

    @property
    def rows(self) -> int:
        """Samples, the ones that have ended included."""
        return len(self.lengths) * self.width


class KVCache:
    """The cache of one wave of samples that started together.

    Args:
        groups: (prompt length, samples) of each group; neighbours of similar length share a bucket,
            so sort them by length.
        attention: the packed attention function that the prefill runs.
    """

    def __init__(self, groups: Sequence[tuple[int, int]], attention: Callable):
        self.attention = attention
        self.steps = 0  # generated tokens in the cache, the current one included
        self.filled = 0  # groups prefilled before the current chunk
        self.chunk: list[int] = []  # prompt lengths of the chunk being prefilled
        self.buckets = []
        self.places = []  # (bucket, group in it) of each group
        for same in _similar(groups):
            lengths = [length for length, _ in same]
            bucket = Bucket(lengths, same[0][1], max(lengths))
            self.places += [(bucket, i) for i in range(len(same))]
            self.buckets.append(bucket)

    @property
    def rows(self) -> int:
        """Tokens of a decoding step."""
        return sum(bucket.rows for bucket in self.buckets)

    def prefill(self, lengths: Sequence[int]) -> None:
        """The next forward pass holds the next ``len(lengths)`` groups' prompts."""
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
        options = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
        layer = module.layer_idx
        if self.chunk:
            self._store_prompts(layer, key, value, sliding_window)
            return self.attention(module, query, key, value, *args, **options, **kwargs)
        if kwargs.get("s_aux") is not None:
            raise ValueError(
                "model: got one with attention sinks, expected one without; "
                "sample it with another sampler"
            )
        out = torch.empty_like(query[0])  # (h r, T, d)
        start = 0
        for bucket in self.buckets:
            rows = slice(start, start + bucket.rows)
            start = rows.stop
            self._attend_bucket(
                bucket, layer, query[0, :, rows], key[0, :, rows], value[0, :, rows],
                out[:, rows], query.shape[-1] ** -0.5 if scaling is None else scaling,
                sliding_window, softcap,
            )  # fmt: skip
        return out.transpose(0, 1)[None].contiguous(), None

    def keep(self, alive: Tensor) -> Tensor:
        """Drop rows that have ended: groups without any other, and width where all can spare it.

        Args:
            alive: (rows,) bool on the CPU, at least one true.

        Returns:
            (new rows,) int64 on the CPU: the old row of each new one. Some may have ended: they
            fill up groups that have fewer rows than others of their bucket.
        """
        order = []
        buckets = []
        start = 0
        for bucket in self.buckets:
            going = alive[start : start + bucket.rows].view(len(bucket.lengths), bucket.width)
            counts = going.sum(1)
            groups = counts.nonzero()[:, 0]
            if len(groups):
                width = int(counts.max())
                columns = (~going[groups]).byte().argsort(dim=1, stable=True)[:, :width]
                rows = (groups[:, None] * bucket.width + columns).flatten()
                order.append(rows + start)
                buckets.append(bucket)
            start += bucket.rows
            if len(groups):
                _shrink(bucket, groups, rows, width)
        self.buckets = buckets
        return torch.cat(order)

    def _store_prompts(self, layer: int, key: Tensor, value: Tensor, window: int | None) -> None:
        start = 0
        for i, length in enumerate(self.chunk):
            bucket, group = self.places[self.filled + i]
            if layer not in bucket.prompt:
                size = min(bucket.longest, window or bucket.longest)
                shape = (len(bucket.lengths), key.shape[1], size, key.shape[-1])
                bucket.prompt[layer] = key.new_zeros(shape), value.new_zeros(shape)
            for new, old in zip((key, value), bucket.prompt[layer], strict=True):
                n = min(length, old.shape[2])
                old[group, :, old.shape[2] - n :] = new[0, :, start + length - n : start + length]
            start += length

    def _attend_bucket(
        self, bucket, layer, query, key, value, out, scaling, window, softcap
    ) -> None:
        """Write the attention of a bucket's rows into ``out`` (h r, G W, d)."""
        prompt_k, prompt_v = bucket.prompt[layer]
        groups, heads, size, dim = prompt_k.shape
        repeat = query.shape[0] // heads
        step = self.steps - 1
        suffix_k, suffix_v = self._append(bucket, layer, key, value)
        # The window of a query at distance `step` from the prompt's end, itself included.
        skip = 0 if window is None else max(0, step + size - window + 1)
        first = 0 if window is None else max(0, step - window + 1)
        bias = bucket.bias if skip < size else None
        if bias is None and skip < size and min(bucket.lengths) < bucket.longest:
            bias = bucket.bias = _padding(bucket, query.device)
        q = query.view(heads, repeat, groups, bucket.width, dim).permute(2, 0, 1, 3, 4)
        out = out.view(heads, repeat, groups, bucket.width, dim).permute(2, 0, 1, 3, 4)
        part = max(1, _SCORES // (query.shape[0] * bucket.width * (size + self.steps)))
        for a in range(0, groups, part):
            some = slice(a, a + part)
            out[some] = _attention(
                q[some],
                prompt_k[some, :, skip:],
                prompt_v[some, :, skip:],
                suffix_k[some, :, :, first : step + 1],
                suffix_v[some, :, :, first : step + 1],
                None if bias is None else bias[some, ..., -size:][..., skip:],
                scaling,
                softcap,
            )

    def _append(self, bucket: Bucket, layer: int, key: Tensor, value: Tensor):
        """Put one token of each row, (h, G W, d), behind the layer's suffix."""
        heads, _, dim = key.shape
        shape = (len(bucket.lengths), bucket.width, heads)
        old = bucket.suffix.get(layer)
        if old is None or old[0].shape[3] < self.steps:
            room = 2 * old[0].shape[3] if old else _FIRST
            new = tuple(x.new_empty(*shape, room, dim) for x in (key, value))
            for x, y in zip(new, old or (), strict=False):
                x[:, :, :, : y.shape[3]] = y
            bucket.suffix[layer] = new
        for store, x in zip(bucket.suffix[layer], (key, value), strict=True):
            store[:, :, :, self.steps - 1] = x.transpose(0, 1).reshape(*shape, dim)
        return bucket.suffix[layer]


def _shrink(bucket: Bucket, groups: Tensor, rows: Tensor, width: int) -> None:
    """Keep these groups (G',) and these rows (G' width,) of a bucket."""
    if len(groups) < len(bucket.lengths):
        bucket.lengths = [bucket.lengths[i] for i in groups.tolist()]
        bucket.bias = None
        for layer, pair in bucket.prompt.items():
            index = groups.to(pair[0].device)
            bucket.prompt[layer] = tuple(x[index] for x in pair)
    for layer, pair in bucket.suffix.items():
        index = rows.to(pair[0].device)
        bucket.suffix[layer] = tuple(
            x.flatten(0, 1)[index].view(len(groups), width, *x.shape[2:]) for x in pair
        )
    bucket.width = width


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
    size = prompt_k.shape[2]
    dtype = query.dtype
    by_group = query.reshape(groups * heads, repeat * width, dim)
    by_row = query.permute(0, 3, 1, 2, 4).reshape(groups * width * heads, repeat, dim)
    scores = query.new_empty(
        groups, heads, repeat, width, size + suffix_k.shape[3], dtype=torch.float32
    )
    left = _product(by_group, prompt_k.flatten(0, 1).transpose(1, 2))
    scores[..., :size] = left.view(groups, heads, repeat, width, size)
    right = _product(by_row, suffix_k.flatten(0, 2).transpose(1, 2))
    right = right.view(groups, width, heads, repeat, -1).permute(0, 2, 3, 1, 4)
    scores[..., size:] = right
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


def _similar(groups: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Cut into runs of equal width whose padding is at most an eighth of the run's tokens."""
    runs: list[list[tuple[int, int]]] = []
    tokens = 0
    for length, width in groups:
        run = runs[-1] if runs else []
        longest = max([length, *(n for n, _ in run)])
        padded = longest * (len(run) + 1)
        if run and run[0][1] == width and padded - tokens - length <= max(padded // 8, 64):
            run.append((length, width))
            tokens += length
        else:
            runs.append([(length, width)])
            tokens = length
    return runs
