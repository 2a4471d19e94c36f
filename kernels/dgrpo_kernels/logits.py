"""What turns a raw matrix product into logits, shared by all row kernels.

Per element: add the bias, scale, cap softly, divide by the temperature, in this order.
"""

import triton
import triton.language as tl

from dgrpo_kernels import rows

LOWEST: tl.constexpr = tl.constexpr(-1e30)  # below every logit; finite, so that it subtracts
FLOOR: tl.constexpr = tl.constexpr(rows.FLOOR)


@triton.jit
def tanh(x):
    # exp alone: libdevice is missing in the interpreter. Of -2|x|, so that nothing overflows.
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def transform(x, scale, softcap, inv_temperature, SOFTCAP: tl.constexpr):
    """Raw logits, bias added, to logits."""
    x = x * scale
    if SOFTCAP:
        x = softcap * tanh(x / softcap)
    return x * inv_temperature


@triton.jit
def chain(x, scale, softcap, inv_temperature, SOFTCAP: tl.constexpr):
    """d logit / d raw, at raw logits with their bias added."""
    factor = scale * inv_temperature
    if SOFTCAP:
        y = tanh(x * scale / softcap)
        factor = factor * (1.0 - y * y)
    return factor


@triton.jit
def load_row(ptr, bias_ptr, cols, row_stride, V):
    """Raw logits with bias at `cols`; -inf beyond V. Masked by the padded stride: wide loads."""
    x = tl.load(ptr + cols, mask=cols < row_stride, other=0.0)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols, mask=cols < row_stride, other=0.0)
    return tl.where(cols < V, x, float("-inf"))


@triton.jit
def logits_of(x, scale, softcap, inv_temperature, SOFTCAP: tl.constexpr):
    """Logits of raw values, where -inf (padding, a column taken out) stays -inf."""
    z = transform(x, scale, softcap, inv_temperature, SOFTCAP)
    return tl.where(x == float("-inf"), float("-inf"), z)


@triton.jit
def rounded(x):
    """To bf16 and back: what an engine that keeps bf16 logits sees."""
    return x.to(tl.bfloat16).to(tl.float32)
