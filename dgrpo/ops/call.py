"""A call of the loss head, from its arguments to what the sweep runs on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dgrpo.objectives.context import Context
from dgrpo.objectives.dgrpo_loss import dgrpo
from dgrpo.ops import checks, rows_torch
from dgrpo.ops.divergences import DIVERGENCES, SLOPES, Divergence, check_divergence
from dgrpo.ops.gemm import accumulator
from dgrpo.ops.options import Options
from dgrpo.ops.teachers import TeacherHead, TopKTeacher
from dgrpo.ops.vocab_parallel import Shard, agree, agreed, local_part
from dgrpo_kernels.rows import STATS, PolicyInputs


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
    """Checked options and context, and what follows from them. `n` counts the unmasked tokens."""

    options: Options
    context: Context | None
    shape: torch.Size  # of `targets`
    device: torch.device
    dtype: torch.dtype  # of the matrix products
    rows: Tensor  # (n,) int64 flat indices of the unmasked tokens
    dense: bool  # rows are all tokens in order: slices do
    targets: Tensor  # (n,) int64, counted from the shard's first column
    targets_known: Tensor  # (n,) bool, in the vocabulary
    backend: ModuleType  # rows_torch or dgrpo_kernels.triton_rows
    shard: Shard  # the compared columns that this rank has
    parameter: float | Tensor | None  # of the divergence, a number or (n,)
    teacher_dtype: torch.dtype | None  # of its products; None = its weight's, at most fp32
    teacher_index: Tensor | None  # (n,) rows of the teacher, where its hidden states lie
    has_teacher: Tensor | None  # (n,) bool; None = all

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def topk(self) -> TopKTeacher | None:
        """The teacher, if it is one of top-k log-probabilities."""
        teacher = self.options.teacher
        return teacher if isinstance(teacher, TopKTeacher) else None

    @property
    def divergence(self) -> str:
        """To the teacher, "none" without one."""
        return "none" if self.options.teacher is None else self.options.divergence

    @property
    def formulas(self) -> Divergence:
        """The plain formulas of the divergence."""
        return SLOPES[self.divergence]

    @property
    def round_policy(self) -> bool:
        return self.options.policy_logits == "bfloat16"

    def select(self, part: slice) -> Tensor | slice:
        """The tokens of a part of the unmasked ones, as an index into the student's states."""
        return part if self.dense else self.rows[part]

    def parameter_at(self, part: slice) -> float | Tensor | None:
        """The divergence's parameter at those of the unmasked tokens."""
        return self.parameter[part] if isinstance(self.parameter, Tensor) else self.parameter

    def new_stats(self) -> Tensor:
        """An empty `(11, n)` buffer of statistics."""
        return torch.zeros(STATS, self.count, dtype=accumulator(self.dtype), device=self.device)

    def scatter(self, values: Tensor) -> Tensor:
        """(n,) values to the shape of `targets`, 0 where masked. Differentiable."""
        if self.dense:
            return values.reshape(self.shape)
        full = values.new_zeros(self.shape.numel())
        return full.index_copy_(0, self.rows, values).view(self.shape)


def prepare(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: Options,
    context: Context | None = None,
    objective: object = dgrpo,
) -> tuple[Call, Tensor]:
    """Check all arguments and lay out the call; returns it and this rank's part of the weight.

    With `group=`, an error raises on every rank. context: only that of dGRPO's own objective is
    checked here, and brought to the dtype of the statistics.
    """
    group = options.group
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: got {type(group).__name__}, expected a ProcessGroup or None")
    with agreed(group):
        if group is not None and checks.is_dtensor(weight):
            weight = local_part(weight)
        _check(hidden, weight, targets, options)
        pick_backend(options.backend, weight.device, weight.dtype)
        if not callable(objective):
            raise TypeError(f"objective: got {type(objective).__name__}, expected a function")
        ours = context if objective is dgrpo else None
        if ours is not None:
            checks.check_policy(ours, targets)
            context = ours = _widened(ours, accumulator(weight.dtype))
        shard = Shard.whole(len(weight), options)
    if group is not None:
        shard = agree(weight, targets, options, needs(hidden, weight, options.bias))
    if options.check:
        with agreed(group):
            _check_values(hidden, weight, targets, options, ours, shard.total, shard.columns)
    return _lay_out(weight, targets, options, context, shard), weight


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, options: Options) -> None:
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


def _check_values(
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
        parameter = DIVERGENCES[options.divergence].of(options)
        if isinstance(parameter, Tensor):
            DIVERGENCES[options.divergence].check_values(parameter[taught])
    checks.check_finite("hidden", hidden, where=with_loss)
    checks.check_finite("weight", weight[:columns])
    checks.check_bias("bias", None if options.bias is None else options.bias[:columns])


def _widened(context: Context, dtype: torch.dtype) -> Context:
    """The context with dGRPO's inputs detached, in `dtype`."""
    wide = {}
    for name in PolicyInputs._fields:
        value = getattr(context, name)
        if isinstance(value, Tensor):
            wide[name] = value.detach().to(dtype) if value.dim() else value.detach()
    return replace(context, **wide)


def _lay_out(
    weight: Tensor, targets: Tensor, options: Options, context: Context | None, shard: Shard
) -> Call:
    device = weight.device
    flat = targets.reshape(-1)
    dense = False
    rows = options.rows
    if rows is None:
        rows = (flat != checks.IGNORE).nonzero()[:, 0]  # one sync, for CUDA targets
        dense = len(rows) == len(flat)
    host_rows = rows
    if rows.is_cpu and device.type == "cuda":
        rows = rows.pin_memory()  # or the copy would wait for the device
    rows = rows.to(device, non_blocking=True)
    picked = flat[rows]
    dtype, teacher_dtype = weight.dtype, None
    if torch.is_autocast_enabled(device.type):
        dtype = teacher_dtype = torch.get_autocast_dtype(device.type)
    elif dtype == torch.float64:
        teacher_dtype = dtype
    teacher_index = has_teacher = parameter = None
    if options.teacher is not None:
        teacher_index, has_teacher = options.teacher.picks(rows, host_rows, dense)
        parameter = DIVERGENCES[options.divergence].of(options)
        if isinstance(parameter, Tensor):
            parameter = parameter.detach().reshape(-1)[rows].to(accumulator(dtype))
    if context is not None and context.token_weights is None:
        mean = context.advantages.new_full((), 1 / max(len(rows), 1))
        context = replace(context, token_weights=mean.expand(targets.shape))
    return Call(
        options=options,
        context=context,
        shape=targets.shape,
        device=device,
        dtype=dtype,
        rows=rows,
        dense=dense,
        targets=picked - shard.start,
        targets_known=(picked >= 0) & (picked < shard.total),
        backend=pick_backend(options.backend, device, dtype),
        shard=shard,
        parameter=parameter,
        teacher_dtype=teacher_dtype,
        teacher_index=teacher_index,
        has_teacher=has_teacher,
    )


def pick_backend(backend: object, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module of row kernels: Triton on GPUs, torch elsewhere."""
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend: got {backend!r}, expected 'auto', 'triton' or 'torch'")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return rows_torch
    try:
        import triton

        from dgrpo_kernels import triton_rows
    except ImportError as error:
        if backend == "auto":
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
