"""The keyword arguments that all public functions share, in one frozen object."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dgrpo.objectives.context import python_number
from dgrpo.ops.divergences import PARAMETERS
from dgrpo.ops.teachers import TeacherHead, TopKTeacher

DIVERGENCE_OPTIONS = ("divergence", *PARAMETERS)
TEACHER_OPTIONS = ("teacher", "teacher_temperature", *DIVERGENCE_OPTIONS)


@dataclass(frozen=True)
class Options:
    """The keyword arguments that all public functions share; see `linear_dgrpo_loss`."""

    teacher: TeacherHead | TopKTeacher | None = None
    divergence: str = "reverse_kl"
    divergence_clip: float | None = None
    jsd_beta: float = 0.5
    jeffreys_weight: float | Tensor = 0.5
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
