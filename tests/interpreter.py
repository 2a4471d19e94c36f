"""Makes Triton's CPU interpreter right for bfloat16 (triton 3.6.0 to 3.9.0).

The interpreter keeps bf16 as uint16 bit patterns and, left alone, computes with those patterns as
with integers, and truncates fp32 -> bf16 where hardware rounds to nearest even.
`mend_interpreter` lifts bf16 operands to fp32 around every operation and rounds the result back. It
also lets triton 3.6.0 turn a scalar tensor into a loop bound under numpy >= 2.4.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
LIFTED = ("binary_op", "unary_op", "create_fma", "create_clampf", "create_erf", "create_rsqrt")


def mend_interpreter() -> None:
    """Patches `triton.runtime.interpreter` for this process; a second call changes nothing."""
    if getattr(interpreter, "bf16_is_mended", False):
        return
    interpreter.bf16_is_mended = True
    builder = interpreter.InterpreterBuilder
    interpreter._convert_float = _rounding(interpreter._convert_float)
    for name in LIFTED:
        setattr(builder, name, _lifting(getattr(builder, name)))
    # A product accumulates in fp32 and is not rounded.
    dot = builder.create_dot
    builder.create_dot = lambda self, a, b, *rest: dot(self, lift(a), lift(b), *rest)
    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = lambda self, value: Handle(to_bf16(np.array([value])), tl.bfloat16)
    interpreter.ReduceOps.apply_impl = _reducing(interpreter.ReduceOps.apply_impl)
    interpreter._patch_lang_tensor = _indexing(interpreter._patch_lang_tensor)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Rounds fp32 values to nearest-even bf16, as uint16 bit patterns; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    to_even = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    rounded = np.where(np.isnan(values), (bits >> 16) | 0x40, (bits + to_even) >> 16)
    return rounded.astype(np.uint16).reshape(np.shape(values))


def from_bf16(patterns: np.ndarray) -> np.ndarray:
    """The fp32 values of uint16 bit patterns; exact."""
    bits = np.ascontiguousarray(patterns).view(np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(np.shape(patterns))


def is_bf16(value: Any) -> bool:
    """Whether an operand is a handle of bf16 values (not of pointers to some)."""
    return (
        isinstance(value, Handle)
        and value.dtype.scalar == tl.bfloat16
        and value.data.dtype == np.uint16
    )


def lift(value: Any) -> Any:
    """A bf16 handle as fp32; anything else as it is."""
    return Handle(from_bf16(value.data), tl.float32) if is_bf16(value) else value


def _lifting(operation: Callable) -> Callable:
    def lifted(self: Any, *operands: Any, **named: Any) -> Any:
        if not any(map(is_bf16, operands)):
            return operation(self, *operands, **named)
        result = operation(self, *map(lift, operands), **named)
        if result.data.dtype == np.float32:  # a comparison gives bool
            result = Handle(to_bf16(result.data), tl.bfloat16)
        return result

    return lifted


def _rounding(convert: Callable) -> Callable:
    def rounded(values: np.ndarray, source: tl.dtype, target: tl.dtype, mode: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            return to_bf16(values)
        if (source, target) == (tl.bfloat16, tl.float32):
            return from_bf16(values)
        return convert(values, source, target, mode)

    return rounded


def _reducing(apply_impl: Callable) -> Callable:
    def cast(value: Any, handle: Handle) -> tl.tensor:
        shape = value.type.shape if value.type.is_block() else None
        return tl.tensor(handle, tl.block_type(handle.dtype, shape) if shape else handle.dtype)

    def reduced(self: Any, values: Any) -> Any:
        if isinstance(values, tuple) or values.dtype != tl.bfloat16:
            return apply_impl(self, values)
        result = apply_impl(self, cast(values, lift(values.handle)))
        return cast(result, Handle(to_bf16(result.handle.data), tl.bfloat16))

    return reduced


def _indexing(patch: Callable) -> Callable:
    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    return patched
