"""fp32 operations whose roundings are those of torchquant.functional, for all Triton kernels.

What plain Triton would do instead: ``/`` is an approximate division, ``tl.maximum`` drops NaN, and
rounding to an integer is a function of libdevice, which the interpreter does not have.
"""
# Annotations must be objects here, not strings: the interpreter finds constexpr parameters by them.

import triton
import triton.language as tl

# The sum of this and |x| < 2^22 is x rounded half to even; its low bits are the integer.
_ROUNDING = tl.constexpr(float.fromhex("0x1.8p+23"))
_ROUNDING_BITS = tl.constexpr(0x4B400000)
_BITS_OF_2_TO_23 = tl.constexpr(0x4B000000)
_INTEGERS_FROM = tl.constexpr(float.fromhex("0x1p+23"))  # from here on fp32 holds integers only
_SIGN_BIT = tl.constexpr(-(2**31))
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_LEAST_SCALE = tl.constexpr(2.0**-126)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_NAN_BITS = tl.constexpr(0x7FC00000)


@triton.jit
def fma(a, b, c):
    """``a * b + c`` with one rounding, for fp32."""
    return tl.fma(a, b, c)


@triton.jit
def divide(a, b):
    """``a / b`` as one IEEE division, for fp32."""
    return tl.div_rn(a, b)


@triton.jit
def reciprocal(scale):
    """``1 / scale`` as one IEEE division, for an fp32 tensor or scalar."""
    return tl.div_rn(1.0, scale)


@triton.jit
def maximum(a, b):
    """The greater number; NaN if either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    """The lesser number; NaN if either is NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def absolute(x):
    """``|x|``: the sign bit cleared, also of NaN."""
    return (x.to(tl.int32, bitcast=True) & _MAGNITUDE).to(tl.float32, bitcast=True)


@triton.jit
def copysign(magnitude, sign):
    """``magnitude`` with the sign of ``sign``, for fp32."""
    bits = magnitude.to(tl.int32, bitcast=True) & _MAGNITUDE
    bits |= sign.to(tl.int32, bitcast=True) & _SIGN_BIT
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def is_finite(x):
    """Neither infinite nor NaN, for fp32."""
    return (x.to(tl.int32, bitcast=True) & _MAGNITUDE) < _INFINITY_BITS


@triton.jit
def rint(x):
    """Round half to even; NaN, infinities and the sign of zero are kept, as in ``torch.round``."""
    a = absolute(x)
    rounded = (a + _INTEGERS_FROM) - _INTEGERS_FROM
    return copysign(tl.where(a < _INTEGERS_FROM, rounded, a), x)


@triton.jit
def round_within(x, lo, hi):
    """``clamp(rint(x), lo, hi)``; NaN is kept, zero becomes +0.

    lo, hi: integers of magnitude up to 2^23, as fp32. Rounding commutes with the clamp, and up to
    2^23, adding 2^23 with the number's sign rounds the number half to even.
    """
    y = minimum(maximum(x, lo), hi)
    away = ((y.to(tl.int32, bitcast=True) & _SIGN_BIT) | _BITS_OF_2_TO_23).to(
        tl.float32, bitcast=True
    )
    return (y + away) - away


@triton.jit
def quantize(x, inverse, lo, hi, zero_point):
    """int32 ``clamp(rint(x * inverse), lo, hi) + zero_point``; NaN counts as 0 before the clamp.

    ``lo`` and ``hi`` are fp32 integers of magnitude up to 2^22, ``qmin - zero_point`` and ``qmax -
    zero_point``. The sum with the rounding constant contains the integer: no conversion is needed.
    """
    y = x * inverse
    y = tl.where(y == y, y, 0.0)
    y = tl.minimum(tl.maximum(y, lo), hi)
    return (y + _ROUNDING).to(tl.int32, bitcast=True) - _ROUNDING_BITS + zero_point


@triton.jit
def nan_like(x):
    """fp32 NaN of x's shape."""
    return (x.to(tl.int32, bitcast=True) | _MAGNITUDE).to(tl.float32, bitcast=True)


@triton.jit
def finish_scale(extent, scale):
    """The scale, at least 2^-126; 1 if the extent is zero; NaN if the scale is not finite."""
    scale = maximum(scale, _LEAST_SCALE)
    scale = tl.where(is_finite(scale), scale, nan_like(scale))
    return tl.where(extent == 0.0, 1.0, scale)
