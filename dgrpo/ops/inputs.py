"""Checks of the arguments that all public functions share. Each error: argument, got, expected."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from types import ModuleType

import torch
from torch import Tensor

from dgrpo_kernels.rows import DIVERGENCES

IGNORE = -100  # the target of a token without loss
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PUBLIC_DIVERGENCES = tuple(name for name in DIVERGENCES if name not in ("none", "bucket"))


def shape(value: Tensor) -> str:
    return str(tuple(value.shape))


def is_dtensor(value: object) -> bool:
    """Without importing DTensor, which is slow and can only be there if someone else did."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
    return value


def check_number(
    name: str, value: object, *, least: float = -math.inf, above: float = -math.inf
) -> float:
    """A finite number >= `least` and > `above`, as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number >= least and number > above):
        bound = f" above {above:g}" if above > -math.inf else ""
        bound = f" of at least {least:g}" if least > -math.inf else bound
        raise ValueError(f"{name}: got {value}, expected a finite number{bound}")
    return number


def check_whole(name: str, value: object, least: int) -> None:
    """An int of at least `least`, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int or None")
    if value is not None and value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")


def check_head(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """Shapes, dtypes and devices of the student's side."""
    for name, value in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        check_tensor(name, value)
    for name, value in (("hidden", hidden), ("targets", targets), ("bias", bias)):
        if is_dtensor(value):
            raise TypeError(f"{name}: got a DTensor, expected a tensor; pass its local part")
    if is_dtensor(weight):
        raise TypeError(
            "weight: got a DTensor, expected a tensor; call the loss inside FusedHead.forward, "
            "where FSDP has gathered the weight, or pass group= with a Shard(0) weight "
            "(full_tensor() would lose gradients)"
        )
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden: got shape {shape(hidden)}, expected (N, H) or (B, T, H)")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: got shape {shape(weight)}, expected (V, H), neither of them 0")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden: got width {hidden.shape[-1]}, expected {weight.shape[1]}, the width of weight"
        )
    for name, value in (("hidden", hidden), ("weight", weight)):
        if value.dtype not in FLOATS:
            raise TypeError(f"{name}: got {value.dtype}, expected bf16, fp16, fp32 or fp64")
    if torch.float64 in (hidden.dtype, weight.dtype) and weight.device.type != "cpu":
        raise TypeError(f"weight: got fp64 on {weight.device}, expected fp64 on the CPU only")
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise TypeError(
            f"hidden: got {hidden.dtype}, expected {weight.dtype} like weight; cast one of them, "
            "or call under autocast"
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: got {targets.dtype}, expected torch.int64")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets: got shape {shape(targets)}, expected {tuple(hidden.shape[:-1])}, that of "
            "hidden without its width; hidden[n] predicts targets[n]"
        )
    if bias is not None and check_tensor("bias", bias).shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {shape(bias)}, expected ({weight.shape[0]},)")
    for name, value in (("hidden", hidden), ("targets", targets), ("bias", bias)):
        if value is not None and value.device != weight.device:
            raise ValueError(
                f"{name}: got a tensor on {value.device}, expected {weight.device}, where weight is"
            )


def check_like_targets(name: str, value: object, targets: Tensor) -> Tensor:
    """A real tensor shaped like `targets`, on its device."""
    check_tensor(name, value)
    if value.shape != targets.shape:
        raise ValueError(
            f"{name}: got shape {shape(value)}, expected {tuple(targets.shape)}, that of targets"
        )
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: got {value.dtype}, expected a floating dtype")
    if value.device != targets.device:
        raise ValueError(
            f"{name}: got a tensor on {value.device}, expected {targets.device}, where targets is"
        )
    return value.detach()


def check_transform(
    temperature: object, logit_scale: object, logit_softcap: object, of: str = ""
) -> None:
    check_number(f"{of}temperature", temperature, above=0)
    check_number(f"{of}logit_scale", logit_scale, above=0)
    if logit_softcap is not None:
        check_number(f"{of}logit_softcap", logit_softcap, above=0)


def check_divergence(divergence: object, clip: object, jsd_beta: object) -> None:
    if divergence not in PUBLIC_DIVERGENCES:
        raise ValueError(
            f"divergence: got {divergence!r}, expected one of {', '.join(PUBLIC_DIVERGENCES)}"
        )
    if divergence == "clipped_forward_kl":
        if clip is None:
            raise ValueError(
                "divergence_clip: got None, expected a positive number (nats a column) with "
                "divergence='clipped_forward_kl'"
            )
        check_number("divergence_clip", clip, above=0)
    elif clip is not None:
        raise ValueError(
            f"divergence_clip: got {clip}, expected None with divergence={divergence!r}; it "
            "belongs to 'clipped_forward_kl'"
        )
    check_number("jsd_beta", jsd_beta)
    if divergence == "jsd" and not 0 < jsd_beta < 1:
        other = "forward_kl" if jsd_beta <= 0 else "reverse_kl"
        raise ValueError(
            f"jsd_beta: got {jsd_beta}, expected 0 < jsd_beta < 1; at the end of that range use "
            f"divergence={other!r}"
        )


def check_vocabulary(columns: int, teacher_columns: int | None, vocab_size: int | None) -> int:
    """The number of compared columns."""
    sizes = [columns] if teacher_columns is None else [columns, teacher_columns]
    if vocab_size is None:
        if len(set(sizes)) > 1:
            raise ValueError(
                f"vocab_size: got None with a weight of {columns} rows and a teacher of "
                f"{teacher_columns}, expected the number of columns that both share, at most "
                f"{min(sizes)}"
            )
        return columns
    check_whole("vocab_size", vocab_size, least=1)
    if not 0 < vocab_size <= min(sizes):
        raise ValueError(f"vocab_size: got {vocab_size}, expected 1 to {min(sizes)}")
    return vocab_size


def check_rows(rows: object, targets: Tensor) -> None:
    check_tensor("rows", rows)
    if rows.dtype != torch.int64 or rows.dim() != 1 or len(rows) > targets.numel():
        raise ValueError(
            f"rows: got {rows.dtype} of shape {shape(rows)}, expected torch.int64 of shape (n,), "
            f"the flat indices of the unmasked tokens, n at most {targets.numel()}"
        )
    if not rows.is_cpu:  # asking would wait for the device: `check=True` does
        return
    outside = (rows < 0) | (rows >= targets.numel())
    if bool(outside.any()):
        raise ValueError(
            f"rows: got {int(rows[outside][0])}, expected 0 to {targets.numel() - 1}, the flat "
            "indices of the unmasked tokens"
        )
    counts = torch.bincount(rows, minlength=1)
    if int(counts.max()) > 1:
        raise ValueError(
            f"rows: got {int(counts.argmax())} more than once, expected each unmasked token once"
        )


def pick_backend(backend: object, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module of row kernels: Triton on GPUs, torch elsewhere."""
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend: got {backend!r}, expected 'auto', 'triton' or 'torch'")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        from dgrpo.ops import rows_torch

        return rows_torch
    try:
        import triton

        from dgrpo_kernels import triton_rows
    except ImportError as error:
        if backend == "auto":
            from dgrpo.ops import rows_torch

            return rows_torch
        raise ValueError("backend: got 'triton', which is not installed; use 'torch'") from error
    if dtype == torch.float64:
        raise ValueError("backend: got 'triton' for fp64, expected 'torch' (or 'auto' on the CPU)")
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"backend: got 'triton' for tensors on {device}, expected 'torch' or 'auto' (Triton "
            "runs on the CPU only in its interpreter, TRITON_INTERPRET=1)"
        )
    return triton_rows
