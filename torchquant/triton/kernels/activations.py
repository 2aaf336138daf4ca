"""Activation functions: torchquant/functional/activations.py and
hard_activations.py line by line, and their kernel.

As in that file, one line is one operation with one rounding. Its docstrings give the origin of the
formulas and their errors.
"""

import triton
import triton.language as tl

from torchquant.triton.kernels.language import absolute, copysign, divide, fma

_MAGIC = tl.constexpr(float.fromhex("0x1.8p+23"))
_LOG2_E = tl.constexpr(float.fromhex("0x1.715476p+0"))
_MINUS_LN2_HIGH = tl.constexpr(float.fromhex("-0x1.62e430p-1"))
_MINUS_LN2_LOW = tl.constexpr(float.fromhex("0x1.05c610p-29"))
_EXP_0 = tl.constexpr(float.fromhex("0x1.6a23d0p-10"))
_EXP_1 = tl.constexpr(float.fromhex("0x1.123a20p-7"))
_EXP_2 = tl.constexpr(float.fromhex("0x1.5558f2p-5"))
_EXP_3 = tl.constexpr(float.fromhex("0x1.555492p-3"))
_EXP_4 = tl.constexpr(float.fromhex("0x1.fffffcp-2"))
_LEAKY_SLOPE = tl.constexpr(float.fromhex("0x1.47ae14p-7"))  # 0.01 in fp32

_GELU_TANH_LINEAR = tl.constexpr(float.fromhex("0x1.988454p+0"))
_GELU_TANH_CUBIC = tl.constexpr(float.fromhex("0x1.2444f2p-4"))

_GELU_SLOPE = tl.constexpr(float.fromhex("0x1.60902ep-2"))
_MINUS_GELU_SLOPE = tl.constexpr(-float.fromhex("0x1.60902ep-2"))
_GELU_0 = tl.constexpr(float.fromhex("-0x1.d00b5cp-6"))
_GELU_1 = tl.constexpr(float.fromhex("0x1.2a5afcp-3"))
_GELU_2 = tl.constexpr(float.fromhex("-0x1.1860a4p-2"))
_GELU_3 = tl.constexpr(float.fromhex("0x1.88bb80p-3"))
_GELU_4 = tl.constexpr(float.fromhex("-0x1.48dc74p-5"))
_GELU_5 = tl.constexpr(float.fromhex("0x1.ce7566p-4"))
_GELU_6 = tl.constexpr(float.fromhex("0x1.de775cp-4"))
_GELU_7 = tl.constexpr(float.fromhex("0x1.1a2804p-3"))
_GELU_8 = tl.constexpr(float.fromhex("0x1.1944eep-3"))


@triton.jit
def _max(limit, x):
    return tl.where(x < limit, limit, x)  # x for NaN and for a zero of either sign


@triton.jit
def _min(limit, x):
    return tl.where(x > limit, limit, x)


@triton.jit
def _reduce_exp(x):
    """r and 2^n with ``x = n ln 2 + r`` and ``|r| <= ln(2) / 2``, for |x| <= 88 or NaN."""
    z = fma(x, _LOG2_E, _MAGIC)
    n = z - _MAGIC
    r = fma(n, _MINUS_LN2_HIGH, x)
    r = fma(n, _MINUS_LN2_LOW, r)
    # Unsigned: the shift removes the magic number's own bits.
    bits = (z.to(tl.uint32, bitcast=True) << 23) + 0x3F800000
    return r, bits.to(tl.float32, bitcast=True)


@triton.jit
def _exp_tail(r):
    """The polynomial in ``exp(r) = 1 + r + r^2 * tail``."""
    p = fma(r, _EXP_0, _EXP_1)
    p = fma(p, r, _EXP_2)
    p = fma(p, r, _EXP_3)
    return fma(p, r, _EXP_4)


@triton.jit
def _exp_reduced(r, power):
    p = _exp_tail(r)
    p = fma(p, r, 1.0)
    p = fma(p, r, 1.0)
    return p * power


@triton.jit
def _exp(x):
    r, power = _reduce_exp(x)
    return _exp_reduced(r, power)


@triton.jit
def relu(x):
    return _max(0.0, x)


@triton.jit
def relu6(x):
    a = _max(0.0, x)
    return _min(6.0, a)


@triton.jit
def _hardsigmoid_times_6(x):
    a = x + 3.0
    b = _max(0.0, a)
    return _min(6.0, b)


@triton.jit
def hardsigmoid(x):
    return divide(_hardsigmoid_times_6(x), 6.0)


@triton.jit
def hardswish(x):
    d = x * _hardsigmoid_times_6(x)
    return divide(d, 6.0)


@triton.jit
def leaky_relu(x):
    a = x * _LEAKY_SLOPE
    return tl.where(a >= x, a, x)


@triton.jit
def silu(x):
    a = _max(-87.0, x)
    g = _min(87.0, a)
    e = _exp(-g)
    d = e + 1.0
    return divide(a, d)


@triton.jit
def gelu_tanh(x):
    a = _max(-10.0, x)
    b = _min(10.0, a)
    s = b * b
    w = fma(s, _GELU_TANH_CUBIC, _GELU_TANH_LINEAR)
    g = b * w
    e = _exp(-g)
    d = e + 1.0
    return divide(a, d)


@triton.jit
def gelu(x):
    a = _min(13.0, absolute(x))
    h = a * a
    low = fma(a, a, -h)
    y = h * -0.5
    y_low = low * -0.5
    r, power = _reduce_exp(y)
    r = r + y_low
    e = _exp_reduced(r, power)
    d = fma(a, _GELU_SLOPE, 1.0)
    v = divide(a, d)
    t = fma(v, _MINUS_GELU_SLOPE, 1.0)
    p = fma(t, _GELU_0, _GELU_1)
    p = fma(p, t, _GELU_2)
    p = fma(p, t, _GELU_3)
    p = fma(p, t, _GELU_4)
    p = fma(p, t, _GELU_5)
    p = fma(p, t, _GELU_6)
    p = fma(p, t, _GELU_7)
    p = fma(p, t, _GELU_8)
    q = v * p
    q = q * e
    m = _max(0.0, x)
    return m - q


@triton.jit
def tanh(x):
    a = _min(10.0, absolute(x))
    y = a + a
    r, power = _reduce_exp(y)
    h = r * r
    p = _exp_tail(r)
    q = fma(h, p, r)
    c = power - 1.0
    t = fma(power, q, c)
    d = t + 2.0
    m = divide(t, d)
    return copysign(m, x)


@triton.jit
def sigmoid(x):
    a = _max(-87.0, x)
    g = _min(87.0, a)
    e = _exp(-g)
    d = e + 1.0
    return divide(1.0, d)


@triton.jit
def apply_activation(y, ACTIVATION: tl.constexpr):
    """Apply the activation of that name (functional.ACTIVATIONS) to an fp32 tensor."""
    if ACTIVATION == "relu":
        y = relu(y)
    elif ACTIVATION == "gelu":
        y = gelu(y)
    elif ACTIVATION == "gelu_tanh":
        y = gelu_tanh(y)
    elif ACTIVATION == "silu":
        y = silu(y)
    elif ACTIVATION == "tanh":
        y = tanh(y)
    elif ACTIVATION == "sigmoid":
        y = sigmoid(y)
    elif ACTIVATION == "relu6":
        y = relu6(y)
    elif ACTIVATION == "hardswish":
        y = hardswish(y)
    elif ACTIVATION == "hardsigmoid":
        y = hardsigmoid(y)
    elif ACTIVATION == "leaky_relu":
        y = leaky_relu(y)
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return y


@triton.jit
def activation_kernel(
    x,
    up,
    out,
    count,
    length,
    x_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``activation(x)`` or ``activation(x) * up`` of rows, which are contiguous in ``out``."""
    pid = tl.program_id(0)
    blocks = (length - 1) // COLUMNS + 1
    rows = (pid // blocks).to(tl.int32) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = (pid % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (rows < count) & (columns < length)
    rows = rows.to(tl.int64)
    v = tl.load(x + (rows * x_stride + columns), mask=inside, other=0.0).to(tl.float32)
    y = apply_activation(v, ACTIVATION)
    if GATED:
        y = y * tl.load(up + (rows * up_stride + columns), mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (rows * length + columns), y.to(out.dtype.element_ty), mask=inside)
