"""Variable-length attention kernels behind one signature, and the trial of a kernel with prefixes.

Kernels take q (T, heads, D), k and v (K, kv_heads, D), the ends and greatest lengths of the
sequences in q and in k, scaling, window, soft cap, and return (T, heads, D). The last query of a
sequence sees its last key.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from dgrpo.trainer.attention.packed import Prefixes, sequences_attention

log = logging.getLogger(__name__)


def find_kernel(query: Tensor, softcap: float | None, dropout: float) -> Callable | None:
    """The variable-length kernel that can run on such a query, or None for the portable form."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16) or dropout:
        return None
    if query.shape[-1] > 256 or query.shape[-1] % 8:
        return None
    return flash_kernel() or (varlen_kernel() if softcap is None else None)


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

    Kernels differ in where the diagonal is when there are more keys than queries, so each is tried
    once per process on a small example. A warning names one that fails.
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
        except Exception as error:  # a third-party kernel may raise anything
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
                raise ValueError("softcap: this flash-attn has no soft cap; update it")
            options["softcap"] = softcap
        options |= {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
        options |= {"max_seqlen_q": longest_q, "max_seqlen_k": longest_k}
        out = function(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out

    return kernel


@cache
def varlen_kernel() -> Callable:
    """torch's `varlen_attn` behind our signature."""
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
