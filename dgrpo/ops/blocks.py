"""Blocks of rows: how many at a time from a budget in bytes, and each model's logits in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dgrpo.ops.call import Call
from dgrpo.ops.gemm import accumulator, project, writes_fp32
from dgrpo.ops.options import Options
from dgrpo.ops.teachers import TeacherHead
from dgrpo_kernels.rows import ROW_MULTIPLE, Logits

LOGITS_SHARE = 0.3  # of the budget; the rest holds G, whose width saves reads and writes of dW
MOST_LOGIT_ROWS = 4096
MOST_GRAD_ROWS = 32768
TILE = (128, 256)  # of the vendor's GEMM, to count its waves


def padded(columns: int) -> int:
    """The row stride of a block of `columns`, in elements."""
    return -(-columns // ROW_MULTIPLE) * ROW_MULTIPLE


@dataclass(frozen=True)
class Plan:
    """Blocks of `grad_rows` rows of G, each in parts of `logit_rows` rows of fp32 logits."""

    count: int  # rows in all
    logit_rows: int  # R
    grad_rows: int  # M, a multiple of R
    scratch: int  # bytes for lifting operands where the GEMM cannot

    def blocks(self) -> Iterator[tuple[slice, list[slice]]]:
        """Each block's rows and, within it, those of its parts; both count from the first row."""
        for start in range(0, self.count, self.grad_rows):
            stop = min(start + self.grad_rows, self.count)
            starts = range(start, stop, self.logit_rows)
            yield slice(start, stop), [slice(s, min(s + self.logit_rows, stop)) for s in starts]


def make_plan(
    count: int,
    columns: int,
    width: int,
    *,
    dtype: torch.dtype,
    teacher_width: int | None = None,
    gradients: bool = True,
    budget: int = 2**30,
    processors: int = 0,
    lifts: bool = False,
) -> Plan:
    """Split `count` rows of `columns` logits so that all transient memory fits `budget` bytes.

    width, teacher_width: of the hidden states (None = no teacher logits). processors: streaming
    multiprocessors, so that G's rows fill whole waves of the dHidden GEMM (0 = unknown). lifts:
    operands are lifted to fp32. A budget below one row's need is exceeded by it. The sizes do not
    depend on `count`, but that no block is larger than it.
    """
    size = dtype.itemsize
    wide = max(size, 4)
    stride = padded(columns)
    logit_row = wide * stride * (1 if teacher_width is None else 2)
    logit_row += (teacher_width or 0) * (size + 4 * lifts)
    grad_row = size * stride + width * (size + wide + 4 * lifts) if gradients else width * size
    scratch = max(budget // 8, 1) if lifts else 0
    budget -= scratch
    share = LOGITS_SHARE if gradients else 0.9
    rows = min(int(budget * share) // logit_row, budget // (logit_row + grad_row))
    rows = max(1, min(rows, MOST_LOGIT_ROWS))
    rows = 1 << (rows.bit_length() - 1)
    limit = max(budget - rows * logit_row, 0) // grad_row
    limit = min(max(limit // rows, 1), MOST_GRAD_ROWS // rows)
    multiples = range(max(limit // 2, 1), limit + 1) if processors else [limit]
    best = max(multiples, key=lambda n: (_fill(n * rows, width, processors), n))
    rows = max(1, min(rows, count))
    return Plan(count, rows, max(rows, min(best * rows, -(-count // rows) * rows)), scratch)


def _fill(rows: int, width: int, processors: int) -> float:
    """The share of the last wave's processors that have work, in the dHidden GEMM."""
    if not processors:
        return 1.0
    tiles = -(-rows // TILE[0]) * -(-width // TILE[1])
    return tiles / (-(-tiles // processors) * processors)


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
        else:
            picked = hidden[rows] if isinstance(rows, slice) else hidden.index_select(0, rows)
        if picked.is_cpu and self.weight.is_cuda:
            picked = picked.pin_memory()
        return picked.to(self.weight.device, self.weight.dtype, non_blocking=True)

    def logits(self, hidden: Tensor, buffer: Tensor, scratch: int) -> Logits:
        """Project `hidden` (R, H) into `buffer` (>= R, padded V)."""
        raw = buffer[: len(hidden), : len(self.weight)]
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
        lifts=not all(writes_fp32(p, head.weight) for head in heads for p in ("mm", "addmm")),
    )


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def logits_buffer(rows: int, columns: int, like: Tensor) -> Tensor:
    """Space for `rows` rows of logits in the accumulator's dtype."""
    return torch.empty(rows, padded(columns), dtype=accumulator(like.dtype), device=like.device)
