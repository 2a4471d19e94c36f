"""Launches compiled for GPUs that are not here.

Each launcher is called with CPU tensors while a stand-in for Triton's driver names the target, so
that exactly what would run is compiled: signature, specialisation, block size and warps.
"""

from __future__ import annotations

import os

# The interpreter's functions do not compile; it is chosen when triton is first imported.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # said aloud, or triton 3.9 warns

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dgrpo.objectives import Context
from dgrpo_kernels import ROW_MULTIPLE, STATS, Logits, PolicyRows
from dgrpo_kernels import triton_rows as kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ROWS, TOPK = 4, 64
VOCAB = 152064  # Qwen2.5's; divisible by 16
ODD_VOCAB = 50257  # GPT-2's; divisible by nothing
FULL = ("reverse_kl", "forward_kl", "clipped_forward_kl", "jsd", "jeffreys")


class AheadOfTime:
    """Stands in for Triton's driver: one target, nothing to launch on."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        """What Triton compiles for."""
        return self.target

    def get_current_device(self) -> GPUTarget:
        """The key of Triton's cache of compiled kernels."""
        return self.target

    def get_current_stream(self, device: Any) -> int:
        """No stream is ever used."""
        return 0


@contextmanager
def compiling(target: GPUTarget, programs: list[int] | None = None) -> Iterator[list[Any]]:
    """Launches within compile for `target` instead; yields the list of what was compiled.

    programs: filled with the number of programs of each launch, where it is given.
    """
    compiled, run, driver = [], JITFunction.run, triton.runtime.driver
    before = driver._active

    def compile_only(self: JITFunction, *args: Any, **options: Any) -> None:
        if programs is not None:
            programs.append(math.prod(options["grid"]))
        compiled.append(run(self, *args, **{**options, "warmup": True}))

    JITFunction.run = compile_only
    driver.set_active(AheadOfTime(target))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = before


class Variant(NamedTuple):
    """A launch to compile, under the name that the table shows."""

    name: str
    launch: Callable[[], None]
    blocks: int = 1  # of logits that it reads: with a teacher 2
    bias: bool = False  # reads as many numbers again, from the cache


def block(
    vocab: int, bias: bool = False, softcap: bool = False, holes: bool | None = None
) -> Logits:
    """A block of raw logits with a padded row stride. holes: None = those of a bias."""
    width = -(-vocab // ROW_MULTIPLE) * ROW_MULTIPLE
    raw = torch.empty(ROWS, width)[:, :vocab]
    soft = 30.0 if softcap else None
    holes = bias if holes is None else holes
    return Logits(raw, torch.empty(width) if bias else None, softcap=soft, holes=holes)


def statistics() -> torch.Tensor:
    return torch.empty(STATS, ROWS)


def targets() -> torch.Tensor:
    return torch.zeros(ROWS, dtype=torch.int64)


def stats_variant(
    divergence: str,
    vocab: int = VOCAB,
    bias: bool = False,
    softcap: bool = False,
    holes: bool | None = None,
    **rest: Any,
) -> Variant:
    """`row_stats`; without a teacher for the divergence "none"."""
    z = block(vocab, bias, softcap, holes)
    t = None if divergence == "none" else z
    launch = partial(
        kernels.row_stats, z, t, targets(), statistics(), divergence=divergence, **rest
    )
    label = f"row_stats {_label(divergence, vocab, bias, softcap, rest)}"
    return Variant(label, launch, 1 if t is None else 2, bias)


def divergence_variant(
    divergence: str,
    vocab: int = VOCAB,
    bias: bool = False,
    softcap: bool = False,
    holes: bool | None = None,
) -> Variant:
    """`row_divergence`, the second pass of the clipped forward KL and of the JSD."""
    z = block(vocab, bias, softcap, holes)
    launch = partial(
        kernels.row_divergence, z, z, statistics(), divergence=divergence, parameter=1.0
    )
    return Variant(
        f"row_divergence {_label(divergence, vocab, bias, softcap, {})}", launch, 2, bias
    )


def grad_variant(
    divergence: str,
    vocab: int = VOCAB,
    bias: bool = False,
    softcap: bool = False,
    holes: bool | None = None,
    policy: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **rest: Any,
) -> Variant:
    """`row_grad`, also with dGRPO fused in, of the least ("plain") or the most ("full") inputs."""
    z = block(vocab, bias, softcap, holes)
    z = z._replace(holes=True) if divergence == "bucket" else z
    t = z if divergence in FULL else None
    reads = {"blocks": 1 if t is None else 2, "bias": bias}
    out = torch.empty(ROWS, z.raw.stride(0), dtype=dtype)[:, :vocab]
    options = {"divergence": divergence, "parameter": 1.0, **rest}
    label = _label(divergence, vocab, bias, softcap, {str(dtype)[6:]: True, **rest})
    if policy is None:
        launch = partial(
            kernels.row_grad, z, t, targets(), statistics(), torch.empty(3, ROWS), out, **options
        )
        return Variant(f"row_grad {label}", launch, **reads)
    rows = policy_rows(policy)
    launch = partial(
        kernels.row_grad, z, t, targets(), statistics(), None, out, policy=rows, **options
    )
    return Variant(f"row_grad {label} dgrpo {policy}", launch, **reads)


def fused_variant(policy: str, vocab: int = VOCAB, dtype: torch.dtype = torch.bfloat16) -> Variant:
    """`row_fused`, of the least ("plain") or the most ("full") inputs, 4 programs per row."""
    z = block(vocab, holes=False)
    out = torch.empty(ROWS, z.raw.stride(0), dtype=dtype)[:, :vocab]
    rows = policy_rows(policy)
    launch = partial(kernels.row_fused, z, z, targets(), statistics(), out, policy=rows, group=4)
    return Variant(f"row_fused reverse_kl {vocab} dgrpo {policy}", launch, blocks=2)


def policy_rows(policy: str) -> PolicyRows:
    """The objective's rows, with all optional inputs for "full"."""
    given = torch.empty(ROWS) if policy == "full" else None
    context = Context(torch.empty(ROWS), torch.empty(ROWS), *(given,) * 4, ref_coef=0.1)
    return PolicyRows(torch.empty(7, ROWS), torch.empty(7, ROWS), context)


def topk_variants(vocab: int = VOCAB) -> list[Variant]:
    """Taking a top-k teacher's columns out of a row, and putting their gradients back."""
    z = block(vocab, bias=True)
    ids = torch.zeros(ROWS, TOPK, dtype=torch.int64)
    grad = z.raw.bfloat16()
    return [
        Variant(f"topk_take {vocab}", partial(kernels.topk_take, z.raw, z.bias, ids)),
        Variant(f"topk_put {vocab}", partial(kernels.topk_put, grad, ids, torch.empty(ROWS, TOPK))),
    ]


def _label(divergence: str, vocab: int, bias: bool, softcap: bool, rest: dict[str, Any]) -> str:
    flags = {"bias": bias, "softcap": softcap, **rest}
    return " ".join([divergence, str(vocab), *(name for name, on in flags.items() if on)])


def common_variants() -> list[Variant]:
    """Every divergence with and without a teacher, plain and with every option at once."""
    everything = {"bias": True, "softcap": True, "round_policy": True, "vocab": ODD_VOCAB}
    return [
        *(stats_variant(name) for name in ("none", "reverse_kl", "forward_kl", "jsd")),
        *(divergence_variant(name) for name in FULL[2:]),
        *(grad_variant(name) for name in ("none", *FULL, "bucket")),
        *(grad_variant(name, policy="plain") for name in ("none", "reverse_kl")),
        stats_variant("reverse_kl", **everything),
        grad_variant("jsd", **everything),
        grad_variant("reverse_kl", policy="full", **everything),
        grad_variant("reverse_kl", dtype=torch.float16),
        grad_variant("reverse_kl", dtype=torch.float32),
        grad_variant("reverse_kl", vocab=1000),
        stats_variant("none", holes=True),
        *topk_variants(),
    ]


def core_variants() -> list[Variant]:
    """The heaviest few, for the targets that are not compiled in full."""
    everything = {"bias": True, "softcap": True, "round_policy": True, "vocab": ODD_VOCAB}
    return [
        stats_variant("reverse_kl", **everything),
        divergence_variant("jsd", ODD_VOCAB, bias=True, softcap=True),
        divergence_variant("clipped_forward_kl", bias=True, softcap=True),
        grad_variant("jsd", softcap=True, round_policy=True),
        grad_variant("reverse_kl", policy="full"),
        grad_variant("jsd", **everything),
    ]


def loop_variants() -> list[Variant]:
    """The launches whose inner loops are counted, named KERNEL-VARIANT.

    "plain": reverse KL to a teacher; no holes, bias, soft cap or rounded policy. "policy": the
    same with dGRPO fused in. "full": all of that at once.
    """
    plain, full = {"holes": False}, {"bias": True, "softcap": True}
    named = {
        "row_stats-plain": stats_variant("reverse_kl", **plain),
        "row_stats-forward_kl": stats_variant("forward_kl", **plain),
        "row_stats-no_teacher": stats_variant("none", **plain),
        "row_stats-full": stats_variant("reverse_kl", **full, round_policy=True),
        "row_divergence-clipped_forward_kl": divergence_variant("clipped_forward_kl", **plain),
        "row_divergence-jsd": divergence_variant("jsd", **plain),
        "row_grad-plain": grad_variant("reverse_kl", **plain),
        "row_grad-policy": grad_variant("reverse_kl", policy="plain", **plain),
        "row_grad-forward_kl": grad_variant("forward_kl", **plain),
        "row_grad-jsd": grad_variant("jsd", **plain),
        "row_grad-no_teacher": grad_variant("none", policy="plain", **plain),
        "row_fused-policy": fused_variant("plain"),
        "row_grad-full": grad_variant("reverse_kl", policy="full", **full, round_policy=True),
    }
    return [variant._replace(name=name) for name, variant in named.items()]


def all_variants() -> list[Variant]:
    """Every combination of options."""
    found = [stats_variant("none", holes=True), stats_variant("none", softcap=True, holes=True)]
    heads = [(VOCAB, *flags) for flags in itertools.product((False, True), repeat=2)]
    for vocab, bias, softcap in [*heads, (ODD_VOCAB, True, True), (1000, True, True)]:
        head = {"vocab": vocab, "bias": bias, "softcap": softcap}
        found += [divergence_variant(name, **head) for name in FULL[2:]]
        for rounded in (False, True):
            options = {**head, "round_policy": rounded}
            found += [stats_variant(name, **options) for name in ("none", *FULL)]
            for name, policy in itertools.product(
                ("none", *FULL, "bucket"), (None, "plain", "full")
            ):
                found.append(grad_variant(name, policy=policy, **options))
    for name, dtype in itertools.product(("none", *FULL), (torch.float16, torch.float32)):
        found += [grad_variant(name, policy=policy, dtype=dtype) for policy in (None, "full")]
    return found + topk_variants() + topk_variants(ODD_VOCAB)
