"""Checks of what every call is given. Each error: argument, got, expected.

Those of a teacher stand in `teachers`, those of a divergence in `divergences`.
"""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real

import torch
from torch import Tensor

from dgrpo.objectives.context import Context
from dgrpo_kernels.rows import PolicyInputs

IGNORE = -100  # the target of a token without loss
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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


def check_like_targets(name: str, value: object, targets: Tensor) -> None:
    """Raise unless this is a real tensor shaped like `targets`, on its device."""
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


def check_transform(
    temperature: object, logit_scale: object, logit_softcap: object, of: str = ""
) -> None:
    check_number(f"{of}temperature", temperature, above=0)
    check_number(f"{of}logit_scale", logit_scale, above=0)
    if logit_softcap is not None:
        check_number(f"{of}logit_softcap", logit_softcap, above=0)


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


def check_policy(context: Context, targets: Tensor) -> None:
    """Raise for a field of a context that dGRPO's objective cannot use."""
    if context.advantages is None:
        raise TypeError("advantages: got None, expected a tensor shaped like targets")
    for name in PolicyInputs._fields:
        value = getattr(context, name)
        if name == "teacher_coef" and not isinstance(value, Tensor):
            check_number(name, value)
        elif value is not None and not (name == "teacher_coef" and value.dim() == 0):
            check_like_targets(name, value, targets)
    check_number("clip_low", context.clip_low, least=0)
    check_number("clip_high", context.clip_high, least=0)
    check_number("ref_coef", context.ref_coef)
    check_number("entropy_coef", context.entropy_coef)
    if context.clip_dual is not None:
        check_number("clip_dual", context.clip_dual, above=1)
    if context.is_cap is not None:
        check_number("is_cap", context.is_cap, above=0)
        if context.sampler_logprobs is None:
            raise ValueError(
                f"is_cap: got {context.is_cap} without sampler_logprobs, expected None"
            )
    if context.sampler_logprobs is not None and context.policy_weights is not None:
        raise ValueError(
            "policy_weights: got a tensor beside sampler_logprobs, expected one of the two; both "
            "define the importance weight u"
        )
    if context.ref_coef and context.ref_logprobs is None:
        raise ValueError(
            f"ref_logprobs: got None with ref_coef={context.ref_coef}, expected a tensor"
        )


# values, at the cost of host syncs: what `check=True` runs


def check_finite(name: str, value: Tensor, where: Tensor | None = None) -> None:
    """Raise for NaN and inf; `where` (bool, the leading dimensions) says what counts."""
    bad = ~torch.isfinite(value)
    if where is not None:
        bad = bad[where]
    count = int(bad.sum())
    if count:
        raise ValueError(
            f"{name}: got {count} values that are NaN or infinite, expected finite ones"
        )


def check_bias(name: str, bias: Tensor | None) -> None:
    """Raise for NaN and +inf; -inf forbids a column."""
    if bias is not None and bool((bias.isnan() | (bias == torch.inf)).any()):
        count = int((bias.isnan() | (bias == torch.inf)).sum())
        raise ValueError(
            f"{name}: got {count} values that are NaN or +inf, expected finite ones, or -inf for a "
            "column that is never chosen"
        )


def check_context_values(context: Context, counts: Tensor) -> None:
    """Raise for NaN and inf where `counts` (bool), but where nothing depends on the value.

    A token of weight 0 takes no part. One without advantage has no ratio, so its old and sampler
    log-probabilities may be infinite.
    """
    if context.token_weights is not None:
        check_finite("token_weights", context.token_weights, counts)
        counts = counts & (context.token_weights != 0)
    if isinstance(context.teacher_coef, Tensor) and not context.teacher_coef.dim():
        check_finite("teacher_coef", context.teacher_coef)
    for name, value in context.per_token().items():
        where = counts
        if name in ("old_logprobs", "sampler_logprobs"):
            where = counts & ((context.advantages != 0) | value.isnan())
        check_finite(name, value, where)


def check_targets(targets: Tensor, vocabulary: int, rows: Tensor | None) -> None:
    """Targets in the vocabulary or -100, and `rows` exactly the unmasked ones."""
    flat = targets.reshape(-1)
    outside = (flat != IGNORE) & ((flat < 0) | (flat >= vocabulary))
    if bool(outside.any()):
        raise ValueError(
            f"targets: got {int(flat[outside][0])}, expected {IGNORE} or 0 to {vocabulary - 1}"
        )
    if rows is not None:
        want = (flat != IGNORE).nonzero()[:, 0]
        if not torch.equal(rows.to(want.device).sort().values, want):
            raise ValueError(
                f"rows: got {len(rows)} indices that are not those of the {len(want)} unmasked "
                f"tokens, expected each token whose target is not {IGNORE} once"
            )
