"""Checks of the arguments that all public functions share. Each error: argument, got, expected."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from types import ModuleType

import torch
from torch import Tensor

from dgrpo.ops.teachers import TeacherHead, TopKTeacher
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
    if not (math.isfinite(value) and value >= least and value > above):
        bound = f" above {above:g}" if above > -math.inf else ""
        bound = f" of at least {least:g}" if least > -math.inf else bound
        raise ValueError(f"{name}: got {value}, expected a finite number{bound}")
    return float(value)


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


def check_teacher(
    teacher: object, targets: Tensor, device: torch.device, temperature: float
) -> None:
    """Shapes and dtypes of a teacher; its head's own are checked when it is opened."""
    if isinstance(teacher, TopKTeacher):
        if temperature != 1:
            raise ValueError(
                f"teacher_temperature: got {temperature} with a TopKTeacher, expected 1; its "
                "log-probabilities are of one temperature, which is set where they come from"
            )
        return _check_topk(teacher, targets)
    if not isinstance(teacher, TeacherHead):
        raise TypeError(
            f"teacher: got {type(teacher).__name__}, expected TeacherHead, TopKTeacher or None"
        )
    hidden = check_tensor("teacher.hidden", teacher.hidden)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"teacher.hidden: got shape {shape(hidden)}, expected (Nt, Ht)")
    if hidden.dtype not in FLOATS:
        raise TypeError(f"teacher.hidden: got {hidden.dtype}, expected a floating dtype")
    if hidden.device not in (device, torch.device("cpu")):
        raise ValueError(f"teacher.hidden: got {hidden.device}, expected {device} or the host")
    check_transform(1.0, teacher.logit_scale, teacher.logit_softcap, of="teacher.")
    rows = teacher.rows
    if rows is None:
        if hidden.shape[:-1].numel() != targets.numel():
            raise ValueError(
                f"teacher.hidden: got {hidden.shape[:-1].numel()} rows, expected "
                f"{targets.numel()}, one a token; or say with teacher.rows which belongs to which"
            )
        return None
    if check_tensor("teacher.rows", rows).dtype != torch.int64 or rows.shape != targets.shape:
        raise ValueError(
            f"teacher.rows: got {rows.dtype} of shape {shape(rows)}, expected torch.int64 of shape "
            f"{tuple(targets.shape)}, that of targets"
        )
    if rows.is_cpu:  # elsewhere asking would wait for the device: `check=True` does
        check_teacher_rows(teacher)
    return None


def check_teacher_rows(teacher: TeacherHead) -> None:
    """Raise for a row that the teacher does not have. A sync on a device."""
    count = teacher.hidden.shape[:-1].numel()
    outside = (teacher.rows < -1) | (teacher.rows >= count)
    if bool(outside.any()):
        raise ValueError(
            f"teacher.rows: got {int(teacher.rows[outside][0])}, expected -1 to {count - 1}"
        )


def check_teacher_head(teacher: TeacherHead, weight: object, device: torch.device) -> None:
    """Shape, dtype and device of a teacher's (opened) head."""
    if is_dtensor(weight):
        raise TypeError(
            "teacher.weight: got a DTensor, expected a tensor; pass a function that gathers it for "
            "the time of a pass (see TeacherHead)"
        )
    width = teacher.hidden.shape[-1]
    if check_tensor("teacher.weight", weight).dim() != 2 or weight.shape[1] != width:
        raise ValueError(
            f"teacher.weight: got shape {shape(weight)}, expected (V, {width}), with the width of "
            "teacher.hidden"
        )
    if weight.dtype not in FLOATS:
        raise TypeError(f"teacher.weight: got {weight.dtype}, expected a floating dtype")
    given = teacher.hidden.dtype
    exact = torch.promote_types(given, weight.dtype) == weight.dtype
    if not exact and not torch.is_autocast_enabled(device.type):
        raise TypeError(
            f"teacher.hidden: got {given}, expected {weight.dtype} like teacher.weight, or one "
            "that converts to it exactly; cast one of them, or call under autocast"
        )
    if weight.device != device:
        raise ValueError(f"teacher.weight: got {weight.device}, expected {device}, like weight")
    bias = teacher.bias
    if bias is not None and check_tensor("teacher.bias", bias).shape != weight.shape[:1]:
        raise ValueError(f"teacher.bias: got shape {shape(bias)}, expected ({len(weight)},)")


def _check_topk(teacher: TopKTeacher, targets: Tensor) -> None:
    ids = check_tensor("teacher.token_ids", teacher.token_ids)
    logprobs = check_tensor("teacher.logprobs", teacher.logprobs)
    if ids.dtype != torch.int64:
        raise TypeError(f"teacher.token_ids: got {ids.dtype}, expected torch.int64")
    tokens = (tuple(targets.shape), (targets.numel(),))
    if ids.dim() < 2 or tuple(ids.shape[:-1]) not in tokens:
        raise ValueError(
            f"teacher.token_ids: got shape {shape(ids)}, expected ({targets.numel()}, K)"
        )
    if logprobs.shape != ids.shape or not logprobs.is_floating_point():
        raise ValueError(
            f"teacher.logprobs: got {logprobs.dtype} of shape {shape(logprobs)}, expected a "
            f"floating dtype and shape {shape(ids)}, that of teacher.token_ids"
        )
    own = teacher.target_logprobs
    if own is not None and tuple(check_tensor("teacher.target_logprobs", own).shape) not in tokens:
        raise ValueError(
            f"teacher.target_logprobs: got shape {shape(own)}, expected {tuple(targets.shape)}"
        )
    for name in ("token_ids", "logprobs", "target_logprobs"):
        value = getattr(teacher, name)
        if value is not None and value.device != targets.device:
            raise ValueError(f"teacher.{name}: got {value.device}, expected {targets.device}")


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
    outside = (rows < 0) | (rows >= targets.numel()) if rows.is_cpu else rows.new_empty(0)
    if bool(outside.any()):
        raise ValueError(
            f"rows: got {int(rows[outside][0])}, expected 0 to {targets.numel() - 1}, the flat "
            "indices of the unmasked tokens"
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
