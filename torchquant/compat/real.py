"""8 bits with a real-valued zero point."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchquant.compat._shared import finite_range, require_integer


class QuantizedReal(NamedTuple):
    """Integers with their scale and the real value of integer 0."""

    q: Tensor
    scale: float
    zero_point: float


def quantize_midpoint(x: Tensor) -> QuantizedReal:
    """8 bits signed around the middle of the range: ``round((x - zero_point) / scale)``.

    ``scale = (max - min) / 255`` and ``zero_point = (max + min) / 2``, in float64. Per channel, per
    head and per token: ``functional.choose_qparams(..., real_zero_point="midpoint")``.

    Args:
        x: float tensor, finite and not empty.

    Returns:
        ``(q int8, scale, zero_point)``.

    Raises:
        TypeError: ``x`` is not a float tensor.
        ValueError: ``x`` is empty or holds NaN or infinity.

    Example:
        >>> quantize_midpoint(torch.tensor([0.0, 0.5, 255.0]))
        QuantizedReal(q=tensor([-128, -127,  127], dtype=torch.int8), scale=1.0, zero_point=127.5)
    """
    least, greatest, scale = _real_range("quantize_midpoint", x)
    zero_point = (greatest + least) / 2
    q = torch.clamp(torch.round((x.to(torch.float64) - zero_point) / scale), -128, 127)
    return QuantizedReal(q.to(torch.int8), scale, zero_point)


def quantize_minimum(x: Tensor) -> QuantizedReal:
    """8 bits unsigned from the minimum upwards: ``round((x - min) / scale)``.

    ``scale = (max - min) / 255``, in float64. Per channel, per head and per token:
    ``functional.choose_qparams(..., real_zero_point="minimum")``.

    Args:
        x: float tensor, finite and not empty.

    Returns:
        ``(q uint8, scale, zero_point)``.

    Raises:
        TypeError: ``x`` is not a float tensor.
        ValueError: ``x`` is empty or holds NaN or infinity.

    Example:
        >>> quantize_minimum(torch.tensor([1.0, 2.0], dtype=torch.float64)).q
        tensor([  0, 255], dtype=torch.uint8)
    """
    least, _, scale = _real_range("quantize_minimum", x)
    q = torch.clamp(torch.round((x.to(torch.float64) - least) / scale), 0, 255)
    return QuantizedReal(q.to(torch.uint8), scale, least)


def dequantize_real(
    q: Tensor, scale: float, zero_point: float, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The reverse of :func:`quantize_midpoint` and :func:`quantize_minimum`, in float64.

    Args:
        q: integer tensor.
        scale, zero_point: as those functions return them.
        dtype: float type of the result, to which it is rounded once.

    Returns:
        ``q * scale + zero_point``.

    Raises:
        TypeError: ``q`` is not an integer tensor.

    Example:
        >>> dequantize_real(torch.tensor([0, 255], dtype=torch.uint8), 1 / 255, 1.0)
        tensor([1., 2.])
    """
    require_integer("dequantize_real", "q", q)
    return (q.to(torch.float64) * scale + zero_point).to(dtype)


def _real_range(who: str, x: Tensor) -> tuple[float, float, float]:
    least, greatest = finite_range(who, "x", x)
    return least, greatest, (greatest - least) / 255 or 1.0
