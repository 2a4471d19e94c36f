"""What turns a raw matrix product into logits, shared by all row kernels.

Per element: add the bias, scale, cap softly, divide by the temperature, in this order. Flags known
when a kernel is compiled delete what a call does not need (`Logits` says how they follow):

    FORM   RAW: scale and temperature are 1; SCALED: one product; CAPPED: all of it
    HOLES  some logits may be -inf: a bias forbids tokens, a top-k teacher's columns are taken out
    MASKED this block of columns may pass the end of the row
"""

import triton
import triton.language as tl

from dgrpo_kernels import rows

LOWEST: tl.constexpr = tl.constexpr(-1e30)  # below every logit; finite, so that it subtracts
FLOOR: tl.constexpr = tl.constexpr(rows.FLOOR)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
SCALED: tl.constexpr = tl.constexpr(rows.SCALED)
CAPPED: tl.constexpr = tl.constexpr(rows.CAPPED)


@triton.jit
def exp(x):
    """exp of differences of logits. In base 2: `tl.exp` takes three instructions more."""
    return tl.exp2(x * LOG2E)


@triton.jit
def tanh(x):
    # exp alone: libdevice is missing in the interpreter. Of -2|x|, so that nothing overflows.
    e = exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def load_raw(ptr, bias_ptr, cols, row_stride, MASKED: tl.constexpr):
    """Raw logits with bias at `cols`. Masked by the padded stride, so that loads stay wide."""
    if MASKED:
        x = tl.load(ptr + cols, mask=cols < row_stride, other=0.0)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + cols, mask=cols < row_stride, other=0.0)
    else:
        x = tl.load(ptr + cols)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + cols)
    return x


@triton.jit
def logits_of(x, scale, softcap, inv_temperature, FORM: tl.constexpr, HOLES: tl.constexpr):
    """Logits of raw values with their bias; -inf stays."""
    z = x
    if FORM == SCALED:
        z = x * (scale * inv_temperature)
    if FORM == CAPPED:
        z = softcap * tanh(x * scale / softcap) * inv_temperature
        if HOLES:
            z = tl.where(x == float("-inf"), float("-inf"), z)
    return z


@triton.jit
def within(z, cols, V, HOLES: tl.constexpr, MASKED: tl.constexpr):
    """Logits with those beyond V below every other, so that they add nothing to a sum."""
    if MASKED:
        z = tl.where(cols < V, z, float("-inf") if HOLES else LOWEST)
    return z


@triton.jit
def chain(x, scale, softcap, inv_temperature, FORM: tl.constexpr):
    """d logit / d raw, at raw logits with their bias added."""
    factor = scale * inv_temperature
    if FORM == CAPPED:
        y = tanh(x * scale / softcap)
        factor = factor * (1.0 - y * y)
    return factor


@triton.jit
def rounded(x):
    """To bf16 and back: what an engine that keeps bf16 logits sees."""
    return x.to(tl.bfloat16).to(tl.float32)
