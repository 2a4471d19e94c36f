"""From the arguments of a public function to a `Call`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dgrpo.objectives.context import python_number
from dgrpo.ops import inputs, values
from dgrpo.ops.agreement import agree, agreed, local_part
from dgrpo.ops.call import Call, needs
from dgrpo.ops.shards import Shard
from dgrpo.ops.teacher_checks import check_teacher, check_teacher_head, check_teacher_values
from dgrpo.ops.teachers import TeacherHead, TopKTeacher


@dataclass(frozen=True)
class Options:
    """The keyword arguments that all public functions share; see `linear_dgrpo_loss`."""

    teacher: TeacherHead | TopKTeacher | None = None
    divergence: str = "reverse_kl"
    divergence_clip: float | None = None
    jsd_beta: float = 0.5
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    vocab_size: int | None = None
    policy_logits: str = "float32"
    rows: Tensor | None = None
    memory_budget: int = 2**30
    check: bool = False
    backend: str = "auto"
    group: dist.ProcessGroup | None = None
    vocab_start: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Tensor):
                object.__setattr__(self, field.name, python_number(value))


TEACHER_OPTIONS = {"teacher", "divergence", "divergence_clip", "jsd_beta", "teacher_temperature"}


def make_options(**given: Any) -> Options:
    """The options by name; an unknown one raises TypeError."""
    known = [field.name for field in fields(Options)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(
            f"{unknown[0]}: got an argument that does not exist, expected {', '.join(known)}"
        )
    return Options(**given)


class Prepared(NamedTuple):
    call: Call
    hidden: Tensor
    weight: Tensor  # the local part of a DTensor
    bias: Tensor | None
    per_token: dict[str, Tensor]  # shaped like targets, detached, in the accumulator's dtype


def prepare(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: Options,
    per_token: dict[str, object] | None = None,
    check_more: Callable[[], None] = lambda: None,
) -> Prepared:
    """Check all arguments and lay out the call. With `group=`, an error raises on every rank.

    per_token: arguments shaped like targets, by name; None = absent. check_more: further checks.
    """
    group = options.group
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: got {type(group).__name__}, expected a ProcessGroup or None")
    shard = None
    with agreed(group):
        if group is not None and inputs.is_dtensor(weight):
            weight = local_part(weight)
        checked = _check(hidden, weight, targets, options, per_token or {})
        check_more()
        if group is None:
            teacher_columns = _teacher_columns(options.teacher)
            columns = inputs.check_vocabulary(len(weight), teacher_columns, options.vocab_size)
        else:
            inputs.check_whole("vocab_size", options.vocab_size, least=1)
            inputs.check_whole("vocab_start", options.vocab_start, least=0)
    if group is not None:
        shard, columns = agree(
            group,
            weight.device,
            start=options.vocab_start,
            columns=len(weight),
            teacher_columns=_teacher_columns(options.teacher),
            vocab_size=options.vocab_size,
            tokens=targets.numel(),
            settings=_what_decides_collectives(hidden, weight, targets, options),
        )
    if options.check:
        with agreed(group):
            _check_values(hidden, weight, targets, options, checked, columns, shard)
    call = _lay_out(hidden, weight, targets, options, columns, shard)
    return Prepared(call, hidden, weight, options.bias, checked)


def _what_decides_collectives(
    hidden: Tensor, weight: Tensor, targets: Tensor, options: Options
) -> str:
    """All that must be equal on the ranks of a group, or one would wait for another. One sync."""
    given, teacher = options.rows, options.teacher
    unmasked = len(given) if given is not None else int((targets != inputs.IGNORE).sum())
    topk = teacher.token_ids.shape if isinstance(teacher, TopKTeacher) else None
    kinds = (type(teacher).__name__, topk, options.divergence, options.policy_logits)
    numbers = (options.memory_budget, options.vocab_size, options.check, weight.shape[1], unmasked)
    return repr((kinds, numbers, weight.dtype, needs(hidden, weight, options.bias)))


def _teacher_columns(teacher: object) -> int | None:
    known = isinstance(teacher, TeacherHead) and isinstance(teacher.weight, Tensor)
    return len(teacher.weight) if known else None


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, options: Options, per_token: dict[str, object]
) -> dict[str, Tensor]:
    inputs.check_head(hidden, weight, targets, options.bias)
    inputs.check_transform(options.temperature, options.logit_scale, options.logit_softcap)
    inputs.check_number("teacher_temperature", options.teacher_temperature, above=0)
    inputs.check_divergence(options.divergence, options.divergence_clip, options.jsd_beta)
    if options.policy_logits not in ("float32", "bfloat16"):
        raise ValueError(
            f"policy_logits: got {options.policy_logits!r}, expected 'float32' or 'bfloat16'"
        )
    if type(options.memory_budget) is not int:
        kind = type(options.memory_budget).__name__
        raise TypeError(f"memory_budget: got {kind}, expected an int (bytes)")
    if options.memory_budget <= 0:
        raise ValueError(f"memory_budget: got {options.memory_budget}, expected bytes above 0")
    if options.rows is not None:
        inputs.check_rows(options.rows, targets)
    if options.teacher is not None:
        check_teacher(options.teacher, targets, weight.device, options.teacher_temperature)
        if isinstance(options.teacher, TeacherHead) and not callable(options.teacher.weight):
            teacher = options.teacher
            check_teacher_head(teacher, teacher.weight, teacher.bias, weight.device)
    if options.group is None and options.vocab_start is not None:
        raise ValueError(f"vocab_start: got {options.vocab_start} without group, expected None")
    inputs.pick_backend(options.backend, weight.device, weight.dtype)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return {
        name: inputs.check_like_targets(name, value, targets).to(wide)
        for name, value in per_token.items()
        if value is not None
    }


def _check_values(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: Options,
    per_token: dict[str, Tensor],
    columns: int,
    shard: Shard | None,
) -> None:
    vocabulary = columns if shard is None else shard.total
    values.check_targets(targets, vocabulary, options.rows)
    taught = _taught(targets, per_token)
    check_teacher_values(options.teacher, targets, taught, vocabulary, columns)
    values.check_finite("hidden", hidden, where=targets != inputs.IGNORE)
    values.check_finite("weight", weight[:columns])
    values.check_bias("bias", None if options.bias is None else options.bias[:columns])
    values.check_per_token(per_token, targets)


def _taught(targets: Tensor, per_token: dict[str, Tensor]) -> Tensor:
    """Where a teacher's values can reach the loss: shaped like `targets`, bool."""
    taught = targets != inputs.IGNORE
    for name in ("token_weights", "teacher_coef"):
        if name in per_token:
            taught = taught & (per_token[name] != 0)
    return taught


def _lay_out(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: Options,
    columns: int,
    shard: Shard | None,
) -> Call:
    device = weight.device
    flat = targets.reshape(-1)
    dense = False
    rows = options.rows
    if rows is None:
        rows = (flat != inputs.IGNORE).nonzero()[:, 0]  # one sync, for CUDA targets
        dense = len(rows) == len(flat)
    host_rows = rows
    rows = rows.to(device, non_blocking=True)
    start, total = (0, columns) if shard is None else (shard.start, shard.total)
    picked = flat[rows]
    known = (picked >= 0) & (picked < total)
    dtype, teacher_dtype = weight.dtype, None
    if torch.is_autocast_enabled(device.type):
        dtype = teacher_dtype = torch.get_autocast_dtype(device.type)
    elif dtype == torch.float64:
        teacher_dtype = dtype
    teacher = options.teacher
    teacher_index = has_teacher = None
    if isinstance(teacher, TeacherHead):
        teacher_index, has_teacher = _teacher_rows(teacher, rows, host_rows, dense)
    return Call(
        shape=targets.shape,
        device=device,
        dtype=dtype,
        rows=rows,
        dense=dense,
        targets=picked - start,
        targets_known=known,
        backend=inputs.pick_backend(options.backend, device, dtype),
        columns=columns,
        temperature=options.temperature,
        logit_scale=options.logit_scale,
        logit_softcap=options.logit_softcap,
        round_policy=options.policy_logits == "bfloat16",
        memory_budget=options.memory_budget,
        divergence="none" if teacher is None else options.divergence,
        divergence_clip=options.divergence_clip,
        jsd_beta=options.jsd_beta,
        teacher_temperature=options.teacher_temperature,
        teacher=teacher,
        teacher_dtype=teacher_dtype,
        teacher_index=teacher_index,
        has_teacher=has_teacher,
        shard=shard,
        vocab_size=options.vocab_size,
    )


def _teacher_rows(
    teacher: TeacherHead, rows: Tensor, host_rows: Tensor, dense: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(n,) rows of the teacher's states where those lie, and which tokens have a teacher.

    States on the host are picked there: that takes the indices to the host (a sync, unless `rows`
    and `teacher.rows` are there already).
    """
    where = teacher.hidden.device
    picks = host_rows if host_rows.device == where else rows.to(where)
    if teacher.rows is None:
        return (None if dense else picks), None
    chosen = teacher.rows.reshape(-1).to(where)[picks]
    has = (chosen >= 0).to(rows.device, non_blocking=True)
    return chosen.clamp(min=0), has
