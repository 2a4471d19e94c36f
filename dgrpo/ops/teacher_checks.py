"""Checks of a teacher: shapes and dtypes before each call, its values with `check=True`."""

from __future__ import annotations

import torch
from torch import Tensor

from dgrpo.ops.inputs import FLOATS, IGNORE, check_tensor, check_transform, is_dtensor, shape
from dgrpo.ops.teachers import TeacherHead, TopKTeacher
from dgrpo.ops.values import check_bias, check_finite


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
    if rows.is_cpu and targets.is_cpu:  # elsewhere asking would wait: `check=True` does
        check_teacher_rows(teacher, targets)
    return None


def check_teacher_rows(teacher: TeacherHead, targets: Tensor) -> None:
    """Raise for a row of a token with loss that the teacher does not have. A sync on a device."""
    count = teacher.hidden.shape[:-1].numel()
    rows = teacher.rows[(targets != IGNORE).to(teacher.rows.device)]
    outside = (rows < -1) | (rows >= count)
    if bool(outside.any()):
        raise ValueError(f"teacher.rows: got {int(rows[outside][0])}, expected -1 to {count - 1}")


def check_teacher_head(
    teacher: TeacherHead, weight: object, bias: Tensor | None, device: torch.device
) -> None:
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


def check_teacher_values(
    teacher: TeacherHead | TopKTeacher | None,
    targets: Tensor,
    taught: Tensor,
    vocabulary: int,
    columns: int,
) -> None:
    """Raise for a teacher's values that would reach the loss and cannot be used.

    `taught` (bool, like `targets`) says at which tokens they do; `columns` are the compared ones of
    this shard, `vocabulary` those of all shards.
    """
    taught = taught.reshape(-1)
    if isinstance(teacher, TeacherHead):
        states = teacher.hidden.reshape(-1, teacher.hidden.shape[-1])
        used = taught.to(states.device)
        if teacher.rows is not None:
            check_teacher_rows(teacher, targets)
            chosen = teacher.rows.reshape(-1).to(states.device)[used]
            used = torch.zeros(len(states), dtype=torch.bool, device=states.device)
            used[chosen[chosen >= 0]] = True
        check_finite("teacher.hidden", states, used)
        with teacher.open() as (weight, bias):
            check_finite("teacher.weight", weight[:columns])
            check_bias("teacher.bias", None if bias is None else bias[:columns])
    if isinstance(teacher, TopKTeacher):
        ids, logprobs = (x.flatten(0, -2)[taught] for x in (teacher.token_ids, teacher.logprobs))
        if bool(((ids < -1) | (ids >= vocabulary)).any()):
            raise ValueError(
                f"teacher.token_ids: got an id outside, expected -1 (padding) to {vocabulary - 1}"
            )
        ordered = ids.sort(-1).values
        if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
            raise ValueError("teacher.token_ids: got an id twice in a row, expected each once")
        given = logprobs.masked_fill(ids < 0, -torch.inf)
        if bool(given.isnan().any()) or bool((given.double().exp().sum(-1) > 1 + 1e-3).any()):
            raise ValueError(
                "teacher.logprobs: got NaN or a row whose probabilities exceed 1, expected "
                "log-probabilities (nats)"
            )
        own = teacher.target_logprobs
        if own is not None:
            own = own.reshape(-1)[taught]
            bad = own.isnan() | (own > 1e-3)
            if bool(bad.any()):
                raise ValueError(
                    f"teacher.target_logprobs: got {int(bad.sum())} values that are NaN or above "
                    "0, expected log-probabilities (nats)"
                )
