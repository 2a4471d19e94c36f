"""A call of the loss head after its arguments were checked: what the sweep runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dgrpo.ops.gemm import accumulator, writes_fp32
from dgrpo.ops.heads import Head, make_head
from dgrpo.ops.inputs import check_vocabulary
from dgrpo.ops.plan import Plan, make_plan
from dgrpo.ops.shards import Shard
from dgrpo.ops.teacher_checks import check_teacher_head
from dgrpo.ops.teachers import TeacherHead, TopKTeacher
from dgrpo_kernels.rows import STATS


class Need(NamedTuple):
    """Which gradients a sweep computes; each absent one spares a matrix product."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


def needs(*tensors: Tensor | None) -> Need:
    """Which of hidden, weight and bias need a gradient. To be asked outside `apply`."""
    enabled = torch.is_grad_enabled()
    return Need(*(enabled and t is not None and t.requires_grad for t in tensors))


@dataclass(frozen=True)
class Call:
    """Everything but hidden, weight and bias. `n` counts the unmasked tokens."""

    shape: torch.Size  # of `targets`
    device: torch.device
    dtype: torch.dtype  # of the matrix products
    rows: Tensor  # (n,) int64 flat indices of the unmasked tokens
    dense: bool  # rows are all tokens in order: slices do
    targets: Tensor  # (n,) int64, counted from the shard's first column
    targets_known: Tensor  # (n,) bool, in the vocabulary
    backend: ModuleType  # rows_torch or dgrpo_kernels.triton_rows
    columns: int  # of this rank's shard that are compared
    temperature: float
    logit_scale: float
    logit_softcap: float | None
    round_policy: bool
    memory_budget: int
    divergence: str  # "none" without a teacher
    divergence_clip: float | None
    jsd_beta: float
    teacher_temperature: float
    teacher: TeacherHead | TopKTeacher | None
    teacher_dtype: torch.dtype | None  # of its products; None = its weight's, at most fp32
    teacher_index: Tensor | None  # (n,) rows of the teacher, where its hidden states lie
    has_teacher: Tensor | None  # (n,) bool; None = all
    shard: Shard | None
    vocab_size: int | None

    @property
    def count(self) -> int:
        return len(self.rows)

    def select(self, part: slice) -> Tensor | slice:
        """The tokens of a part of the unmasked ones, as an index into the student's states."""
        return part if self.dense else self.rows[part]

    def new_stats(self) -> Tensor:
        """An empty `(11, n)` buffer of statistics."""
        return torch.zeros(STATS, self.count, dtype=accumulator(self.dtype), device=self.device)

    def scatter(self, values: Tensor) -> Tensor:
        """(n,) values to the shape of `targets`, 0 where masked."""
        if self.dense:
            return values.reshape(self.shape)
        full = values.new_zeros(self.shape.numel())
        return full.index_copy_(0, self.rows, values).view(self.shape)

    @contextmanager
    def heads(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[Heads]:
        """Student and teacher for one pass. A sharded teacher's head is gathered for its time."""
        student = make_head(
            hidden,
            weight,
            bias,
            columns=self.columns,
            dtype=self.dtype,
            scale=self.logit_scale,
            softcap=self.logit_softcap,
            temperature=self.temperature,
            holes=isinstance(self.teacher, TopKTeacher),
        )
        with ExitStack() as stack:
            teacher = None
            if isinstance(self.teacher, TeacherHead):
                teacher_weight, teacher_bias = stack.enter_context(self.teacher.open())
                if callable(self.teacher.weight):
                    check_teacher_head(self.teacher, teacher_weight, teacher_bias, self.device)
                    if self.shard is None:
                        check_vocabulary(len(weight), len(teacher_weight), self.vocab_size)
                teacher = make_head(
                    self.teacher.hidden,
                    teacher_weight,
                    teacher_bias,
                    columns=self.columns,
                    dtype=self.teacher_dtype or _no_wider_than_fp32(teacher_weight.dtype),
                    scale=self.teacher.logit_scale,
                    softcap=self.teacher.logit_softcap,
                    temperature=self.teacher_temperature,
                )
            yield Heads(student, teacher)

    def plan(self, student: Head, teacher: Head | None, gradients: bool) -> Plan:
        """Block sizes, from the widest shard so that all ranks of a group agree."""
        cuda = self.device.type == "cuda"
        return make_plan(
            self.count,
            self.columns if self.shard is None else self.shard.widest,
            student.weight.shape[1],
            dtype=self.dtype,
            teacher_width=None if teacher is None else teacher.weight.shape[1],
            gradients=gradients,
            budget=self.memory_budget,
            processors=_processors(self.device) if cuda else 0,
            lifts=not all(
                writes_fp32(product, head.weight)
                for head in (student, teacher)
                for product in ("mm", "addmm")
                if head is not None
            ),
        )


class Heads(NamedTuple):
    student: Head
    teacher: Head | None


def _no_wider_than_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else dtype


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
