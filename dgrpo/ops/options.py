"""The keyword arguments that all public functions share, in one frozen object, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dgrpo.objectives.context import Context, python_number
from dgrpo.ops import checks
from dgrpo.ops.divergences import check_divergence
from dgrpo.ops.teachers import TeacherHead, TopKTeacher

DIVERGENCE_OPTIONS = ("divergence", "divergence_clip", "jsd_beta")
TEACHER_OPTIONS = ("teacher", "teacher_temperature", *DIVERGENCE_OPTIONS)


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

    @classmethod
    def of(cls, **given: Any) -> Options:
        """The options by name; an unknown one raises TypeError."""
        known = [field.name for field in fields(cls)]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise TypeError(
                f"{unknown[0]}: got an argument that does not exist, expected {', '.join(known)}"
            )
        return cls(**given)

    def without_teacher(self) -> Options:
        """The same options for scoring, which compares with no teacher."""
        defaults = {field.name: field.default for field in fields(self)}
        return replace(self, **{name: defaults[name] for name in TEACHER_OPTIONS})


def check_call(hidden: Tensor, weight: Tensor, targets: Tensor, options: Options) -> None:
    """Raise for shapes, dtypes, devices and options that do not fit. No host sync."""
    checks.check_head(hidden, weight, targets, options.bias)
    checks.check_transform(options.temperature, options.logit_scale, options.logit_softcap)
    checks.check_number("teacher_temperature", options.teacher_temperature, above=0)
    check_divergence(options, targets)
    if options.policy_logits not in ("float32", "bfloat16"):
        raise ValueError(
            f"policy_logits: got {options.policy_logits!r}, expected 'float32' or 'bfloat16'"
        )
    budget = options.memory_budget
    if type(budget) is not int:
        raise TypeError(f"memory_budget: got {type(budget).__name__}, expected an int (bytes)")
    if budget <= 0:
        raise ValueError(f"memory_budget: got {budget}, expected bytes above 0")
    if options.rows is not None:
        checks.check_rows(options.rows, targets)
    teacher = options.teacher
    if teacher is not None:
        if not isinstance(teacher, TeacherHead | TopKTeacher):
            kind = type(teacher).__name__
            raise TypeError(f"teacher: got {kind}, expected TeacherHead, TopKTeacher or None")
        teacher.check(targets, weight.device, options.teacher_temperature)
    if options.group is None and options.vocab_start is not None:
        raise ValueError(f"vocab_start: got {options.vocab_start} without group, expected None")
    if options.group is not None:
        checks.check_whole("vocab_size", options.vocab_size, least=1)
        checks.check_whole("vocab_start", options.vocab_start, least=0)


def check_call_values(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: Options,
    context: Context | None,
    vocabulary: int,
    columns: int,
) -> None:
    """Raise for values that would reach the loss and cannot be used, at the cost of host syncs.

    context: of dGRPO's objective, None for another's. `columns` are those of this shard that are
    compared, `vocabulary` those of all shards.
    """
    checks.check_targets(targets, vocabulary, options.rows)
    taught = with_loss = targets != checks.IGNORE
    if context is not None:
        checks.check_context_values(context, with_loss)
        for name in ("token_weights", "teacher_coef"):
            taught = taught & (context.per_token().get(name, taught) != 0)
    if options.teacher is not None:
        options.teacher.check_values(targets, taught, vocabulary, columns)
    checks.check_finite("hidden", hidden, where=with_loss)
    checks.check_finite("weight", weight[:columns])
    checks.check_bias("bias", None if options.bias is None else options.bias[:columns])
