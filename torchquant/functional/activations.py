"""Activation functions with the same bits everywhere.

The results of ``exp`` and ``erf`` differ between math libraries, versions and vector widths. These
functions are therefore sequences of fp32 operations with the same result on every IEEE machine
(multiply, fused multiply-add, add, subtract, divide, compare, integer shift); the kernels run
the same sequence. **One line is one operation with one rounding**: do not reorder or merge them.

Errors against the true function (float64), largest found in sweeps over all binades; the tests hold
the bounds:

=========  ==============================================  ================================
function   relative, in units in the last place            absolute
=========  ==============================================  ================================
silu       2.5 for x >= -87                                1.3e-7 * max(1, abs(x))
gelu       5 for x >= -13                                  1e-7 * max(1, abs(x))
gelu_tanh  3 for x >= -1; grows to 256 towards x = -10     1.3e-7 * max(1, abs(x))
tanh       3 everywhere                                    1e-7
sigmoid    2.5 for x >= -87                                1e-7
=========  ==============================================  ================================

Further out on the negative side the result is a constant of magnitude below 2e-36, also for -inf,
instead of a denormal: the bits must not depend on whether a thread flushes denormals. For silu and
the two gelus +inf gives +inf; tanh is odd and reaches 1 exactly, sigmoid reaches 1 at +inf. NaN
gives NaN, and -0.0 gives -0.0 (sigmoid: 0.5).

The polynomials were fitted for this library (least maximum of the relative error, coefficients
rounded to fp32 one after the other and the rest fitted again).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from torchquant.functional._arithmetic import at_least, at_most, fmaf
from torchquant.functional._checks import (
    FLOAT_DTYPES,
    describe,
    dtype_name,
    require_device,
    require_dtype,
)
from torchquant.functional.hard_activations import (
    hardsigmoid,
    hardswish,
    leaky_relu,
    relu,
    relu6,
)

_MAGIC = float.fromhex("0x1.8p+23")  # adding it rounds to an integer, which lands in the low bits
_LOG2_E = float.fromhex("0x1.715476p+0")
_MINUS_LN2_HIGH = float.fromhex("-0x1.62e430p-1")
_MINUS_LN2_LOW = float.fromhex("0x1.05c610p-29")
# exp(r) = 1 + r + r^2 * (...) on [-ln2/2, ln2/2], relative error 3e-9
_EXP = tuple(
    float.fromhex(text)
    for text in (
        "0x1.6a23d0p-10",
        "0x1.123a20p-7",
        "0x1.5558f2p-5",
        "0x1.555492p-3",
        "0x1.fffffcp-2",
        "0x1p0",
        "0x1p0",
    )
)

_SILU_LIMIT = 87.0  # exp(-87) and exp(87) are normal numbers
_GELU_TANH_LIMIT = 10.0  # where 2u = 87.3
_GELU_TANH_LINEAR = float.fromhex("0x1.988454p+0")  # 2 * sqrt(2 / pi)
_GELU_TANH_CUBIC = float.fromhex("0x1.2444f2p-4")  # 2 * sqrt(2 / pi) * 0.044715

_TANH_LIMIT = 10.0  # tanh(x) rounds to 1 from x = 9.011 on
_SIGMOID_LIMIT = 87.0  # as for silu

_GELU_LIMIT = 13.0  # exp(-13^2 / 2), times what multiplies it, is a normal number
_GELU_SLOPE = float.fromhex("0x1.60902ep-2")
# (1 + slope * a) * Phi(-a) * exp(a^2 / 2) in t = 1 / (1 + slope * a), a in [0, 13], error 2.3e-8
_GELU = tuple(
    float.fromhex(text)
    for text in (
        "-0x1.d00b5cp-6",
        "0x1.2a5afcp-3",
        "-0x1.1860a4p-2",
        "0x1.88bb80p-3",
        "-0x1.48dc74p-5",
        "0x1.ce7566p-4",
        "0x1.de775cp-4",
        "0x1.1a2804p-3",
        "0x1.1944eep-3",
    )
)


def silu(input: Tensor) -> Tensor:
    """SiLU, ``x / (1 + exp(-x))``, in a fixed sequence of fp32 operations.

    Args:
        input: fp32 tensor of any shape.

    Returns:
        fp32 tensor of the same shape; -1.43e-36 for every x <= -87.

    Raises:
        TypeError: ``input`` is not float32.

    Example:
        >>> silu(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.2689,  0.0000,  0.7311])
    """
    require_dtype("silu", "input", input, (torch.float32,))
    a = at_least(-_SILU_LIMIT, input)
    g = at_most(_SILU_LIMIT, a)
    e = _exp(-g)
    d = e + 1.0
    return a / d


def gelu_tanh(input: Tensor) -> Tensor:
    """GELU by its tanh form, ``x / (1 + exp(-2u))`` with ``u = sqrt(2/pi) (x + 0.044715 x^3)``.

    The same function as ``torch.nn.functional.gelu(x, approximate="tanh")``
    (Hendrycks & Gimpel 2016); ``0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u))`` saves the cancellation.

    Args:
        input: fp32 tensor of any shape.

    Returns:
        fp32 tensor of the same shape; -1.2e-37 for every x <= -10.

    Raises:
        TypeError: ``input`` is not float32.

    Example:
        >>> gelu_tanh(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.1588,  0.0000,  0.8412])
    """
    require_dtype("gelu_tanh", "input", input, (torch.float32,))
    a = at_least(-_GELU_TANH_LIMIT, input)
    b = at_most(_GELU_TANH_LIMIT, a)
    s = b * b
    w = fmaf(s, _GELU_TANH_CUBIC, _GELU_TANH_LINEAR)
    g = b * w
    e = _exp(-g)
    d = e + 1.0
    return a / d


def gelu(input: Tensor) -> Tensor:
    """Exact GELU, ``x * Phi(x)`` with the normal distribution function Phi.

    ``x * Phi(x) = max(x, 0) - |x| * Phi(-|x|)``: the tail is computed directly, so nothing cancels
    for negative x. ``Phi(-a) = exp(-a^2 / 2) * P(t) / (1 + c a)`` with ``t = 1 / (1 + c a)``, the
    shape of Abramowitz & Stegun 7.1.26 with a polynomial fitted to fp32 accuracy. The rounding
    error of ``a^2`` is carried along; without it the tail would be off by 30 units in the last
    place.

    Args:
        input: fp32 tensor of any shape.

    Returns:
        fp32 tensor of the same shape; -8e-38 for every x <= -13.

    Raises:
        TypeError: ``input`` is not float32.

    Example:
        >>> gelu(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.1587,  0.0000,  0.8413])
    """
    require_dtype("gelu", "input", input, (torch.float32,))
    a = at_most(_GELU_LIMIT, input.abs())
    h = a * a
    low = fmaf(a, a, -h)
    y = h * -0.5
    y_low = low * -0.5
    e = _exp(y, y_low)
    d = fmaf(a, _GELU_SLOPE, 1.0)
    v = a / d
    t = fmaf(v, -_GELU_SLOPE, 1.0)
    p = _horner(_GELU, t)
    q = v * p
    q = q * e
    m = at_least(0.0, input)
    return m - q


def tanh(input: Tensor) -> Tensor:
    """Hyperbolic tangent, ``t / (t + 2)`` with ``t = exp(2 abs(x)) - 1``, and the sign of x.

    t must not be computed as a difference, which would cancel near 0. With ``2 abs(x) = n ln 2 +
    r``, ``t = 2^n (exp(r) - 1) + (2^n - 1)``: the polynomial gives ``exp(r) - 1`` directly, and for
    n = 0, where t is small, the second term is exactly 0. An error in a large t hardly counts,
    because the quotient is near 1.

    Args:
        input: fp32 tensor of any shape.

    Returns:
        fp32 tensor of the same shape, within [-1, 1]; -1 or 1 for abs(x) > 9.02; x itself for
        abs(x) < 2^-25, denormals included.

    Raises:
        TypeError: ``input`` is not float32.

    Example:
        >>> tanh(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.7616,  0.0000,  0.7616])
    """
    require_dtype("tanh", "input", input, (torch.float32,))
    a = at_most(_TANH_LIMIT, input.abs())
    y = a + a
    r, power = _reduce_exp(y)
    h = r * r
    p = _horner(_EXP[:-2], r)
    q = fmaf(h, p, r)
    c = power - 1.0
    t = fmaf(power, q, c)
    d = t + 2.0
    m = t / d
    return torch.copysign(m, input)


def sigmoid(input: Tensor) -> Tensor:
    """Logistic function, ``1 / (1 + exp(-x))``, in a fixed sequence of fp32 operations.

    Args:
        input: fp32 tensor of any shape.

    Returns:
        fp32 tensor of the same shape, within [0, 1]; 1.65e-38 for every x <= -87.

    Raises:
        TypeError: ``input`` is not float32.

    Example:
        >>> sigmoid(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.2689, 0.5000, 0.7311])
    """
    require_dtype("sigmoid", "input", input, (torch.float32,))
    a = at_least(-_SIGMOID_LIMIT, input)
    g = at_most(_SIGMOID_LIMIT, a)
    e = _exp(-g)
    d = e + 1.0
    return torch.true_divide(torch.ones_like(d), d)


def identity(input: Tensor) -> Tensor:
    """No activation.

    Args:
        input: fp32 tensor of any shape.

    Returns:
        ``input``.

    Example:
        >>> identity(torch.tensor([-1.0]))
        tensor([-1.])
    """
    return input


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "none": identity,
        "relu": relu,
        "gelu": gelu,
        "gelu_tanh": gelu_tanh,
        "silu": silu,
        "tanh": tanh,
        "sigmoid": sigmoid,
        "relu6": relu6,
        "hardswish": hardswish,
        "hardsigmoid": hardsigmoid,
        "leaky_relu": leaky_relu,
    }
)


def activation(input: Tensor, activation: str, *, dtype: torch.dtype | None = None) -> Tensor:
    """The activation function of that name, of any float type.

    Args:
        input: float32, bfloat16 or float16 of any shape; widened to float32 exactly.
        activation: none, relu, gelu, gelu_tanh, silu, tanh, sigmoid, relu6, hardswish, hardsigmoid
            or leaky_relu.
        dtype: float32, bfloat16 or float16, rounded to once; by default input's.

    Returns:
        Of input's shape.

    Raises:
        TypeError: input or ``dtype`` is not one of the three float types.
        ValueError: no activation has that name.

    Example:
        >>> activation(torch.tensor([-1.0, 0.0, 1.0]), "gelu")
        tensor([-0.1587,  0.0000,  0.8413])
    """
    require_dtype("activation", "input", input, FLOAT_DTYPES)
    require_activation("activation", activation)
    target = input.dtype if dtype is None else dtype
    if target not in FLOAT_DTYPES:
        raise TypeError(
            f"activation: dtype must be float32, bfloat16 or float16, got {dtype_name(target)}"
        )
    return ACTIVATIONS[activation](input.to(torch.float32)).to(target)


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up``: the middle of a gated feed-forward layer.

    Args:
        gate, up: float32, bfloat16 or float16 of one shape and dtype; widened to float32 exactly.
        activation: as in :func:`activation`.

    Returns:
        Of gate's shape and dtype. The product is taken in float32 and rounded once.

    Raises:
        TypeError: gate is not of a float type, or up has another dtype.
        ValueError: the shapes or devices differ, or no activation has that name.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).

    Example:
        >>> gated_activation(torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 2.0]), "silu")
        tensor([-0.5379,  1.4621])
    """
    who = "gated_activation"
    require_dtype(who, "gate", gate, FLOAT_DTYPES)
    require_dtype(who, "up", up, (gate.dtype,))
    require_device(who, "up", up, gate.device, "gate")
    if up.shape != gate.shape:
        raise ValueError(f"{who}: up must have gate's shape {list(gate.shape)}, got {describe(up)}")
    require_activation(who, activation)
    product = ACTIVATIONS[activation](gate.to(torch.float32)) * up.to(torch.float32)
    return product.to(gate.dtype)


def require_activation(who: str, activation: str) -> None:
    """Raise unless ``activation`` names one."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{who}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    p = fmaf(coefficients[0], x, coefficients[1])
    for coefficient in coefficients[2:]:
        p = fmaf(p, x, coefficient)
    return p


def _reduce_exp(x: Tensor) -> tuple[Tensor, Tensor]:
    """r and 2^n with ``x = n ln 2 + r`` and ``|r| <= ln(2) / 2``, for |x| <= 88 or NaN.

    ``z`` holds n = rint(x * log2(e)) in its low bits. Shifting them into the exponent field
    gives 2^n without a float-to-integer conversion, which is undefined for NaN in C++.
    """
    z = fmaf(x, _LOG2_E, _MAGIC)
    n = z - _MAGIC
    r = fmaf(n, _MINUS_LN2_HIGH, x)
    r = fmaf(n, _MINUS_LN2_LOW, r)
    # int64 keeps the shift free of overflow; the magic number's own bits leave at the top.
    bits = ((z.view(torch.int32).to(torch.int64) << 23) + 0x3F800000) & 0xFFFFFFFF
    bits = torch.where(bits >= 2**31, bits - 2**32, bits)
    return r, bits.to(torch.int32).view(torch.float32)


def _exp(x: Tensor, x_low: Tensor | None = None) -> Tensor:
    """``exp(x + x_low)`` for |x| <= 88 or NaN."""
    r, power = _reduce_exp(x)
    if x_low is not None:
        r = r + x_low
    p = _horner(_EXP, r)
    return p * power
