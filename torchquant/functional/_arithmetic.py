"""fp32 operations with a fixed number of roundings, on any device.

The specification promises bits, so every rounding must happen exactly where it is written. Plain
torch needs help in two places: it has no fused multiply-add, and on CUDA it replaces the division
by a Python number with a multiplication by a rounded reciprocal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.functional._checks import require_dtype

_FP32 = (torch.float32,)


def fmaf(a: float | Tensor, b: float | Tensor, c: float | Tensor) -> Tensor:
    """Fused multiply-add ``a * b + c`` in fp32 with one rounding, exactly as C's ``fmaf``.

    The product of two fp32 numbers is exact in float64, but their sum with ``c`` is not, and
    rounding it to float64 first and to fp32 afterwards would round twice. The float64 sum is
    therefore rounded *to odd*: its error is computed (two-sum), and where it is not zero and the
    sum's last bit is even, the sum moves one step towards the exact value. A number rounded to odd
    with at least two spare bits stays on the same side of every fp32 midpoint (Boldo & Melquiond,
    "Emulation of FMA and correctly rounded sums", 2008).

    Args:
        a, b, c: fp32 tensors that broadcast, or Python numbers (rounded to fp32 first).

    Returns:
        fp32 tensor of the broadcast shape. Denormal results, overflow, infinities and NaN follow
        IEEE 754.

    Raises:
        TypeError: a tensor is not float32.

    Example:
        >>> x = torch.tensor(1.0 + 2.0**-23)
        >>> x * x - 1.0 == 2.0**-22, fmaf(x, x, -1.0) == 2.0**-22 + 2.0**-46
        (tensor(True), tensor(True))
    """
    product = _widen("a", a) * _widen("b", b)
    addend = _widen("c", c)
    total = product + addend
    # Two-sum (Knuth): error is exactly (product + addend) - total.
    addend_part = total - product
    error = (product - (total - addend_part)) + (addend - addend_part)

    bits = total.view(torch.int64)
    # Infinities and NaN have a NaN error and do not change.
    inexact = (error > 0) | (error < 0)
    to_odd = inexact & ((bits & 1) == 0)
    away_from_zero = (error > 0) == (total > 0)
    step = torch.where(away_from_zero, 1, -1)
    odd = torch.where(to_odd, bits + step, bits).view(torch.float64)
    return odd.to(torch.float32)


def at_least(limit: float, x: Tensor) -> Tensor:
    """The limit where ``x`` is less, otherwise ``x``: also NaN, and a zero of either sign."""
    return torch.where(x < limit, limit, x)


def at_most(limit: float, x: Tensor) -> Tensor:
    """The limit where ``x`` is greater, otherwise ``x``: also NaN, and a zero of either sign."""
    return torch.where(x > limit, limit, x)


def divide(numerator: Tensor, denominator: float | Tensor) -> Tensor:
    """One IEEE fp32 division, even if the denominator is a number and the device is CUDA."""
    if not isinstance(denominator, Tensor):
        denominator = torch.full((), denominator, dtype=torch.float32, device=numerator.device)
    return torch.true_divide(numerator, denominator)


def reciprocal(scale: Tensor) -> Tensor:
    """``1 / scale`` as one IEEE fp32 division."""
    return torch.true_divide(torch.ones_like(scale), scale)


def _widen(name: str, value: float | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        require_dtype("fmaf", name, value, _FP32)
        return value.to(torch.float64)
    return torch.tensor(value, dtype=torch.float32, device="cpu").to(torch.float64)
