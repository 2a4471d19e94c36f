"""Attention over packed sequences without padding, as an attention implementation of transformers.

`use_packed_attention(model)` switches a Hugging Face model to it. A forward pass brings
`packed_arguments(...)` and takes, in this order,

1. flash-attn (2, 3 or 4), where it imports, on a GPU in 16 bits;
2. `torch.nn.attention.varlen.varlen_attn`, where it runs: a GPU, 16 bits, no soft cap;
3. `sequences_attention`: sdpa sequence by sequence, in blocks of queries where there is a sliding
   window or a soft cap, so that no mask grows with the square of the length. It runs anywhere.

All know grouped queries, a sliding window (which may differ from layer to layer) and, the second
apart, Gemma-2's soft cap of the scores. Attention sinks, bidirectional and chunked attention raise.
A pass with a `cache` of keys and values (`dgrpo.rollout`) is handed to `cache.attend`. Padded
batches are not taken: no mask is ever made.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "dgrpo_packed"
QUERY_BLOCK = 1024  # least number of queries of a block in the portable form
LAYER_TYPES = {"full_attention", "sliding_attention"}


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switch `model` to this attention, in place. Its configuration then names it.

    Raises:
        ValueError: the model mixes its tokens in another way, which packing does not separate.
    """
    config = model.config.get_text_config()
    other = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if other:
        raise ValueError(
            f"model: got layers of type {sorted(other)}, expected only {sorted(LAYER_TYPES)}; "
            "packed sequences would leak into each other"
        )
    model.set_attn_implementation(NAME)
    if config._attn_implementation != NAME:
        raise ValueError(
            f"model: got {type(model).__name__}, expected one that takes its attention from "
            "transformers' AttentionInterface"
        )


def packed_arguments(
    cu_seqlens: Tensor | None, lengths: tuple[int, ...] | None, cache: Any = None
) -> dict[str, Any]:
    """Keyword arguments for the forward pass of a model's body over packed sequences.

    `cu_seqlens` (S + 1,) int32 and `lengths` say where the sequences are; a decoding step with a
    `cache` has neither.
    """
    longest = max(lengths) if lengths else None
    arguments = {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
        "sequence_lengths": lengths,
    }
    return arguments if cache is None else {**arguments, "cache": cache}


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, T, D)
    key: Tensor,  # (1, kv_heads, T, D)
    value: Tensor,  # (1, kv_heads, T, D)
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every attention layer; returns ((1, T, heads, D), None).

    Raises:
        RuntimeError: the sequences' ends did not arrive: a pass that is not packed, or a model that
            drops the keyword arguments of its forward.
        ValueError: attention sinks, bidirectional attention, a batch of more than one row.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError("s_aux: got attention sinks, which packed attention does not have")
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal: got False, expected a causal model")
    if query.shape[0] != 1:
        raise ValueError(f"input_ids: got {query.shape[0]} rows, expected 1 of packed sequences")
    options = {
        "scaling": scaling,
        "dropout": dropout,
        "sliding_window": sliding_window,
        "softcap": softcap,
    }
    if cache is not None:
        return cache.attend(module, query, key, value, attention_mask, **options, **kwargs)
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None:
        raise RuntimeError(
            f"{type(module).__name__} did not receive cu_seq_lens_q: call the model through "
            "PolicyModel; if you did, it drops the keyword arguments of its forward, and packed "
            "sequences would leak into each other"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = find_kernel(query, softcap, dropout)
    if kernel is None:
        lengths = kwargs.get("sequence_lengths") or tuple(cu_seqlens.diff().tolist())
        out = sequences_attention(
            query, key, value, lengths, scaling, sliding_window, softcap, dropout
        )
        return out.transpose(1, 2).contiguous(), None
    packed = (x[0].transpose(0, 1) for x in (query, key, value))  # each (T, heads, D)
    longest = kwargs["max_length_q"]
    return kernel(*packed, cu_seqlens, longest, scaling, sliding_window, softcap)[None], None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def sequences_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention within each packed sequence; query (1, heads, T, D), result likewise.

    A sequence without window or soft cap is one call of sdpa; else blocks of queries see only the
    keys that they need.
    """
    grouped = query.shape[1] != key.shape[1]
    outs, start = [], 0
    for length in lengths:
        q, k, v = (x[:, :, start : start + length] for x in (query, key, value))
        start += length
        if softcap is None and (window is None or length <= window):
            options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": grouped}
            outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, **options))
            continue
        block = max(QUERY_BLOCK, window or 0)
        for first in range(0, length, block):
            end = min(first + block, length)
            low = max(0, first - window + 1) if window else 0
            seen = _seen(first, end, low, window, query.device)
            outs.append(
                _masked(
                    q[:, :, first:end],
                    k[:, :, low:end],
                    v[:, :, low:end],
                    seen,
                    scaling,
                    softcap,
                    dropout,
                )
            )
    return torch.cat(outs, dim=2)


def _seen(first: int, end: int, low: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool for queries `first ... end` and keys `low ... end` of one sequence."""
    i = torch.arange(first, end, device=device)[:, None]
    j = torch.arange(low, end, device=device)
    return (j <= i) if window is None else (j <= i) & (i - j < window)


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scaling: float,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": groups > 1}
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, **options)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.tanh(query @ key.transpose(-1, -2) * scaling / softcap) * softcap
    scores = scores.masked_fill(~seen, float("-inf"))
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return F.dropout(weights.to(value.dtype), dropout, training=dropout > 0) @ value


# Kernels take q (T, heads, D), k and v (T, kv_heads, D), cu_seqlens, longest, scaling, window,
# softcap, and return (T, heads, D).


def find_kernel(query: Tensor, softcap: float | None, dropout: float) -> Callable | None:
    """The variable-length kernel that can run on such a query, or None for the portable form."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16) or dropout:
        return None
    head_dim = query.shape[-1]
    if head_dim > 256 or head_dim % 8:
        return None
    flash = flash_kernel()
    if flash is not None:
        return flash
    return varlen_kernel() if softcap is None else None


@cache
def flash_kernel() -> Callable | None:
    """flash-attn's variable-length function behind our signature, None where none imports."""
    newest = ("flash_attn.cute",) if torch.cuda.get_device_capability() >= (9, 0) else ()
    for name in ("flash_attn", "flash_attn_interface", *newest):  # versions 2, 3, 4
        try:
            return adapt_flash(importlib.import_module(name).flash_attn_varlen_func)
        except (ImportError, AttributeError, OSError):
            continue
    return None


def adapt_flash(function: Callable) -> Callable:
    """Our signature around a `flash_attn_varlen_func`, whose arguments differ between versions.

    A window of W tokens is (W - 1, 0) there: W - 1 keys before the query's own.
    """
    known = inspect.signature(function).parameters

    def kernel(q, k, v, cu_seqlens, longest, scaling, window, softcap):
        options: dict[str, Any] = {"softmax_scale": scaling, "causal": True}
        if window is not None:
            options["window_size"] = (window - 1, 0)
        if softcap is not None:
            if "softcap" not in known:
                raise ValueError(
                    "softcap: this flash-attn has no soft cap of the scores; update it"
                )
            options["softcap"] = softcap
        out = function(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            **options,
        )
        return out[0] if isinstance(out, tuple) else out

    return kernel


@cache
def varlen_kernel() -> Callable | None:
    """torch's `varlen_attn` behind our signature, None where torch lacks it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return adapt_varlen(varlen_attn)


def adapt_varlen(function: Callable) -> Callable:
    """Our signature around `varlen_attn`; torch 2.11's has no grouped queries: heads repeat."""
    grouped = "enable_gqa" in inspect.signature(function).parameters

    def kernel(q, k, v, cu_seqlens, longest, scaling, window, softcap):
        groups = q.shape[1] // k.shape[1]
        options: dict[str, Any] = {"enable_gqa": groups > 1} if grouped else {}
        if groups > 1 and not grouped:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        left = -1 if window is None else window - 1
        return function(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            scale=scaling,
            window_size=(left, 0),
            **options,
        )

    return kernel
