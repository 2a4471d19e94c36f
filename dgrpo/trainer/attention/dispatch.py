"""Attention over packed sequences without padding, as an attention implementation of transformers.

`use_packed_attention(model)` switches a Hugging Face model to it. A forward pass brings
`packed_arguments(...)` and takes, in this order,

1. flash-attn (2, 3 or 4), where it imports, on a GPU in 16 bits;
2. `torch.nn.attention.varlen.varlen_attn` on a GPU in 16 bits, without a soft cap;
3. `packed.sequences_attention` anywhere: sdpa sequence by sequence, in blocks of queries where
   there is a window or a soft cap, so that no mask grows with the square of the length.

All take grouped queries, a sliding window (which may differ between layers) and, but for the
second, Gemma-2's soft cap of the scores. A kernel is given a prefix again for each of its branches,
if `takes_prefixes` finds that it can, else the portable form runs. Attention sinks, bidirectional
and chunked attention and padded batches raise. A pass with a `cache` of keys and values
(`dgrpo.trainer.rollout`) is handed to `cache.attend`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from dgrpo.trainer.attention.kernels import find_kernel, takes_prefixes
from dgrpo.trainer.attention.packed import Prefixes, sequences_attention

NAME = "dgrpo_packed"
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
    cu_seqlens: Tensor | None,
    lengths: tuple[int, ...] | None,
    cache: Any = None,
    prefixes: Prefixes | None = None,
) -> dict[str, Any]:
    """Keyword arguments for the forward pass of a model's body over packed sequences.

    `cu_seqlens` (S + 1,) int32 and `lengths` say where the sequences are, `prefixes` which of
    them others see; a decoding step with a `cache` has none of these.
    """
    longest = max(lengths) if lengths else None
    arguments = {} if cache is None else {"cache": cache}
    return arguments | {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens if prefixes is None else prefixes.cu_seqlens_k,
        "max_length_q": longest,
        "max_length_k": longest if prefixes is None else prefixes.longest_k,
        "sequence_lengths": lengths,
        "shared_prefixes": prefixes,
    }


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
    if cache is not None:
        kwargs |= {"scaling": scaling, "dropout": dropout}
        kwargs |= {"sliding_window": sliding_window, "softcap": softcap}
        return cache.attend(module, query, key, value, attention_mask, **kwargs)
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None:
        raise RuntimeError(
            f"{type(module).__name__} did not receive cu_seq_lens_q: call the model through "
            "PolicyModel; if you did, it drops the keyword arguments of its forward, and packed "
            "sequences would leak into each other"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    prefixes = kwargs.get("shared_prefixes")
    kernel = find_kernel(query, softcap, dropout)
    if kernel is not None and prefixes is not None:
        sizes = query.shape[1], key.shape[1], query.shape[-1]
        kinds = sliding_window is not None, softcap is not None
        if not takes_prefixes(kernel, query.device, query.dtype, *sizes, *kinds):
            kernel = None
    if kernel is None:
        lengths = kwargs.get("sequence_lengths") or tuple(cu_seqlens.diff().tolist())
        out = sequences_attention(
            query, key, value, lengths, scaling, sliding_window, softcap, dropout, prefixes
        )
        return out.transpose(1, 2).contiguous(), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # each (T, heads, D)
    if prefixes is not None:
        k, v = (prefixes.expand(x, kwargs["sequence_lengths"]) for x in (k, v))
    ends = [kwargs[f"{name}_{x}"] for name in ("cu_seq_lens", "max_length") for x in "qk"]
    return kernel(q, k, v, *ends, scaling, sliding_window, softcap)[None], None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
