"""Attention over packed sequences without padding, as an attention implementation of transformers.

`use_packed_attention(model)` switches a Hugging Face model to it. A forward pass brings
`packed_arguments(...)` and takes, in this order,

1. flash-attn (2, 3 or 4), where it imports, on a GPU in 16 bits;
2. `torch.nn.attention.varlen.varlen_attn`, where it runs: a GPU, 16 bits, no soft cap;
3. `packed.sequences_attention`: sdpa sequence by sequence, in blocks of queries where there
   is a sliding window or a soft cap, so that no mask grows with the square of the length. It runs
   anywhere.

All know grouped queries, a sliding window (which may differ from layer to layer) and, the second
apart, Gemma-2's soft cap of the scores. All know prefixes: a kernel is given one again for each of
its branches, if `takes_prefixes` finds that it can, else the portable form runs. Attention sinks,
bidirectional and chunked attention raise. A pass with a `cache` of keys and values
(`dgrpo.trainer.rollout`) is handed to `cache.attend`. Padded batches are not taken: no mask is
ever made.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from dgrpo.trainer.attention.packed import Prefixes, sequences_attention

log = logging.getLogger(__name__)

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
    arguments = {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens if prefixes is None else prefixes.cu_seqlens_k,
        "max_length_q": longest,
        "max_length_k": longest if prefixes is None else prefixes.longest_k,
        "sequence_lengths": lengths,
        "shared_prefixes": prefixes,
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


# Kernels take q (T, heads, D), k and v (K, kv_heads, D), ends and greatest lengths of the sequences
# in q and in k, scaling, window, softcap, and return (T, heads, D). The last query of a sequence
# sees its last key.


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
def takes_prefixes(
    kernel: Callable,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    windowed: bool,
    capped: bool,
) -> bool:
    """Whether a kernel agrees with the portable form where branches see a prefix, gradients too.

    They may differ in where the diagonal is when there are more keys than queries, so each is tried
    once in a process on a small example. A warning tells of one that fails.
    """
    lengths, window, softcap = (11, 3, 17, 1, 5), 6 if windowed else None, 2.0 if capped else None
    prefixes = Prefixes.of(lengths, (3, 0, 0, 0, 0)).to(device)
    cu_q = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    generator = torch.Generator().manual_seed(0)
    shapes = [(n, sum(lengths), head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    *states, direction = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes
    )

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        k, v = (prefixes.expand(x, lengths) for x in (k, v))
        ends = cu_q, prefixes.cu_seqlens_k, max(lengths), prefixes.longest_k
        return kernel(q, k, v, *ends, head_dim**-0.5, window, softcap).transpose(0, 1)

    def portable(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"window": window, "softcap": softcap, "prefixes": prefixes}
        return sequences_attention(q[None], k[None], v[None], lengths, head_dim**-0.5, **options)[0]

    def run(function: Callable, kind: torch.dtype) -> list[Tensor]:
        inputs = [x.detach().to(kind).requires_grad_() for x in states]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, direction.to(kind))]

    # Hooks of its own: those of activation checkpointing must not see this graph.
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.enable_grad(), hooks, torch.autocast(device.type, enabled=False):
        try:
            pairs = zip(run(ours, dtype), run(portable, torch.float32), strict=True)
            errors = [float((got - want).norm() / want.norm()) for got, want in pairs]
            problem = "" if max(errors) < 0.03 else f"relative errors {errors}"
        except Exception as error:  # whatever a kernel of others raises
            problem = str(error)
    if problem:
        log.warning(
            "attention kernel %s: cannot read a prompt once for several completions (%s); plain "
            "torch is used for these, batch.share_prompts=false keeps the kernel",
            getattr(kernel, "__qualname__", kernel),
            problem,
        )
    return not problem


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

    def kernel(q, k, v, cu_q, cu_k, longest_q, longest_k, scaling, window, softcap):
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
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
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

    def kernel(q, k, v, cu_q, cu_k, longest_q, longest_k, scaling, window, softcap):
        groups = q.shape[1] // k.shape[1]
        options: dict[str, Any] = {"enable_gqa": groups > 1} if grouped else {}
        if groups > 1 and not grouped:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        left = -1 if window is None else window - 1
        ends = cu_q, cu_k, longest_q, longest_k
        return function(q, k, v, *ends, scale=scaling, window_size=(left, 0), **options)

    return kernel
