"""The textbook affine round trip."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.compat._shared import no_nan, require_float, require_integer, scaled
from torchquant.scheme import quant_range


def quantize_func(
    x: Tensor, scales: float | Tensor, zero_point: int | Tensor, n_bits: int = 8
) -> Tensor:
    """Divide by the scale, add the zero point, round half to even, clamp to the signed range.

    Args:
        x: float tensor.
        scales, zero_point: numbers or tensors that broadcast against ``x``.
        n_bits: 2 to 8.

    Returns:
        int8 tensor. NaN becomes the zero point.

    Raises:
        TypeError: ``x`` is not a float tensor.
        ValueError: ``n_bits`` is outside 2..8.

    Example:
        >>> quantize_func(torch.tensor([-1.2136, 28.7341]), 180 / 255, 13)
        tensor([11, 54], dtype=torch.int8)
    """
    x = require_float("quantize_func", "x", x)
    alpha_q, beta_q = quant_range(n_bits)
    shifted = no_nan(x / scales + zero_point, zero_point)
    return torch.clamp(torch.round(shifted), alpha_q, beta_q).to(torch.int8)


def dequantize_func(x_q: Tensor, scales: float | Tensor, zero_point: int | Tensor) -> Tensor:
    """The reverse of :func:`quantize_func`: ``(x_q - zero_point) * scales``.

    Args:
        x_q: integer tensor.
        scales, zero_point: as in :func:`quantize_func`.

    Returns:
        Tensor of the dtype of ``scales``; float32 if ``scales`` is a number.

    Raises:
        TypeError: ``x_q`` is not an integer tensor.

    Example:
        >>> dequantize_func(torch.tensor([11, 54], dtype=torch.int8), 180 / 255, 13)
        tensor([-1.4118, 28.9412])
    """
    require_integer("dequantize_func", "x_q", x_q)
    return scaled(x_q.to(torch.int32) - zero_point, scales)
