"""Each model's hidden states and head, and its logits of a block of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dgrpo.ops import rows_torch
from dgrpo.ops.call import Call
from dgrpo.ops.gemm import accumulator, project, writes_fp32
from dgrpo.ops.options import Options
from dgrpo.ops.plan import CPU_RIDGE, Plan, make_plan, padded, ridge_of
from dgrpo.ops.teachers import TeacherHead
from dgrpo_kernels.rows import Logits


@dataclass(frozen=True)
class Head:
    """Hidden states and head of a student or a teacher, detached, and how its logits come about."""

    hidden: Tensor  # (N, H) or (B, T, H), any strides, on the device or (a teacher's) on the host
    weight: Tensor  # (V, H), the compared columns, in the dtype of the products
    bias: Tensor | None  # (padded V,) in the accumulator's dtype
    scale: float
    softcap: float | None
    temperature: float
    holes: bool  # some logits may be -inf

    def gather(self, rows: Tensor | slice) -> Tensor:
        """Hidden states of the tokens `rows`, (R, H) on the device; streams from the host."""
        hidden = self.hidden
        if hidden.dim() == 3:
            if isinstance(rows, slice):
                rows = torch.arange(rows.start, rows.stop, device=hidden.device)
            picked = hidden[rows // hidden.shape[1], rows % hidden.shape[1]]
        elif isinstance(rows, slice):
            picked = hidden[rows]
        else:  # from the host straight into pinned memory, for the asynchronous copy below
            streams = hidden.is_cpu and self.weight.is_cuda
            picked = hidden.new_empty(len(rows), hidden.shape[1], pin_memory=streams)
            torch.index_select(hidden, 0, rows, out=picked)
        if picked.is_cpu and self.weight.is_cuda and not picked.is_pinned():
            picked = picked.pin_memory()
        return picked.to(self.weight.device, self.weight.dtype, non_blocking=True)

    def logits(self, hidden: Tensor, raw: Tensor, scratch: int) -> Logits:
        """Project `hidden` (R, H) into `raw` (R, V)."""
        project(hidden, self.weight, raw, scratch)
        return Logits(raw, self.bias, self.scale, self.softcap, self.temperature, self.holes)


@contextmanager
def open_heads(
    call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[Head, Head | None]]:
    """Student and teacher for one pass. A sharded teacher's head is gathered for its time."""
    options, teacher = call.options, call.options.teacher
    student = _head(call, hidden, weight, bias, call.dtype, options, options.temperature)
    with ExitStack() as stack:
        theirs = None
        if isinstance(teacher, TeacherHead):
            own_weight, own_bias = stack.enter_context(teacher.open())
            if callable(teacher.weight):
                teacher.check_head(own_weight, own_bias, call.device)
                call.shard.fits(weight, own_weight, options)
            dtype = call.teacher_dtype or own_weight.dtype
            if call.teacher_dtype is None and dtype == torch.float64:
                dtype = torch.float32
            theirs = _head(
                call, teacher.hidden, own_weight, own_bias, dtype, teacher,
                options.teacher_temperature,
            )  # fmt: skip
        yield student, theirs


def _head(
    call: Call,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    owner: Options | TeacherHead,  # has logit_scale and logit_softcap
    temperature: float,
) -> Head:
    """Cut a head to the compared columns and cast what the products take."""
    columns = call.shard.columns
    weight = weight.detach()[:columns].to(dtype)
    if bias is not None:
        bias = bias.detach()[:columns].to(weight.device, accumulator(dtype))
        bias = F.pad(bias, (0, padded(columns) - columns))
    hidden = hidden.detach()
    if not hidden.shape[:-1].numel():  # no teacher rows: keep one dummy row to index
        hidden = hidden.new_zeros(1, hidden.shape[-1])
    if hidden.dim() == 3 and hidden.is_contiguous():
        hidden = hidden.flatten(0, 1)
    cap = None if owner.logit_softcap is None else float(owner.logit_softcap)
    holes = bias is not None or (owner is call.options and call.topk is not None)
    return Head(hidden, weight, bias, float(owner.logit_scale), cap, float(temperature), holes)


def plan_of(call: Call, student: Head, teacher: Head | None, gradients: bool) -> Plan:
    """Block sizes, from the widest shard so that all ranks of a group agree."""
    cuda, heads = call.device.type == "cuda", (student,) if teacher is None else (student, teacher)
    return make_plan(
        call.count,
        call.shard.widest,
        student.weight.shape[1],
        dtype=call.dtype,
        teacher_width=None if teacher is None else teacher.weight.shape[1],
        gradients=gradients,
        budget=call.options.memory_budget,
        processors=_processors(call.device) if cuda else 0,
        ridge=ridge_of(call.device) if cuda else CPU_RIDGE,
        temporaries=rows_torch.TEMPORARIES if cuda and call.backend is rows_torch else 0,
        lifts=not all(writes_fp32(p, head.weight) for head in heads for p in ("mm", "addmm")),
    )


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
