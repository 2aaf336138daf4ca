"""Building blocks of linear quantization.

The layer built from them is ``torchquant.quantized_linear``, which runs on the kernels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from torchquant.compat._shared import finite_range, no_nan, require_float, require_integer, scaled
from torchquant.functional import shift_bias
from torchquant.scheme import quant_range


def get_quantized_range(bitwidth: int) -> tuple[int, int]:
    """Least and greatest signed integer of 2 to 8 bits.

    Example:
        >>> get_quantized_range(2)
        (-2, 1)
    """
    return quant_range(bitwidth)


def linear_quantize(
    tensor: Tensor, bitwidth: int, scale: float | Tensor, zero_point: int | Tensor
) -> Tensor:
    """``clamp(round(tensor / scale) + zero_point)``: divide, round half to even, shift, clamp.

    Args:
        tensor: float tensor.
        bitwidth: 2 to 8.
        scale, zero_point: numbers or tensors that broadcast against ``tensor``.

    Returns:
        int8 tensor. NaN becomes the zero point.

    Raises:
        TypeError: ``tensor`` is not a float tensor.
        ValueError: ``bitwidth`` is outside 2..8.

    Example:
        >>> linear_quantize(torch.tensor([0.0523, 0.6364, -0.25]), 2, 1 / 3, -1)
        tensor([-1,  1, -2], dtype=torch.int8)
    """
    tensor = require_float("linear_quantize", "tensor", tensor)
    qmin, qmax = quant_range(bitwidth)
    shifted = torch.round(tensor / scale) + zero_point
    return torch.clamp(no_nan(shifted, zero_point), qmin, qmax).to(torch.int8)


def linear_dequantize(q: Tensor, scale: float | Tensor, zero_point: int | Tensor) -> Tensor:
    """``(q - zero_point) * scale``.

    Args:
        q: integer tensor.
        scale, zero_point: numbers or tensors that broadcast against ``q``.

    Returns:
        Tensor of the dtype of ``scale``; float32 if ``scale`` is a number.

    Raises:
        TypeError: ``q`` is not an integer tensor.

    Example:
        >>> linear_dequantize(torch.tensor([1, -2], dtype=torch.int8), 0.5, -1)
        tensor([ 1.0000, -0.5000])
    """
    require_integer("linear_dequantize", "q", q)
    return scaled(q.to(torch.int32) - zero_point, scale)


def scale_and_zero_point(
    tensor: Tensor | None = None,
    bitwidth: int = 8,
    *,
    min: float | None = None,
    max: float | None = None,
) -> tuple[float, int]:
    """Scale and zero point from a tensor's observed range, or from ``min`` and ``max``.

    The range is *not* widened to contain 0; the arithmetic is in float64. In
    :mod:`torchquant.functional` the equivalent is ``choose_qparams(..., preserve_range=True)``, in
    fp32.

    Args:
        tensor: float tensor whose range is used; omit it if ``min`` and ``max`` are given.
        bitwidth: 2 to 8.
        min, max: the range.

    Returns:
        ``(scale, zero_point)``, the zero point clamped to the integer range. A range of zero gives
        ``(1.0, 0)``.

    Raises:
        TypeError: ``tensor`` is not a float tensor.
        ValueError: both tensor and a range are given, or neither is; the range is not finite.

    Example:
        >>> scale_and_zero_point(min=-0.25, max=0.75, bitwidth=2)
        (0.3333333333333333, -1)
    """
    who = "scale_and_zero_point"
    if (tensor is None) == (min is None and max is None):
        raise ValueError(f"{who}: pass either tensor, or min and max")
    if tensor is not None:
        min, max = finite_range(who, "tensor", tensor)
    if min is None or max is None or not -math.inf < min <= max < math.inf:
        raise ValueError(
            f"{who}: min and max must be finite with min <= max, got min = {min}, max = {max}"
        )
    qmin, qmax = quant_range(bitwidth)
    if min == max:
        return 1.0, 0
    scale = (max - min) / (qmax - qmin)
    zero_point = round(qmin - min / scale)
    return scale, sorted((qmin, zero_point, qmax))[1]


def linear_quantize_weight_per_channel(
    weight: Tensor, bitwidth: int
) -> tuple[Tensor, Tensor, Literal[0]]:
    """Quantize a weight symmetrically with one scale for each output channel (axis 0).

    ``scale = max|w| / qmax`` per channel (1 if the channel is zero), zero point 0.

    Args:
        weight: float tensor ``[N, ...]``.
        bitwidth: 2 to 8.

    Returns:
        ``(q int8 of weight's shape, scale fp32 [N, 1, ...], 0)``; the scale broadcasts against the
        weight, ``scale.flatten()`` is what ``quantized_linear`` takes.

    Raises:
        TypeError: ``weight`` is not a float tensor.
        ValueError: ``bitwidth`` is outside 2..8, or the weight has no dimension.

    Example:
        >>> q, scale, zero_point = linear_quantize_weight_per_channel(torch.eye(2) * 3, 2)
        >>> q.tolist(), scale.tolist(), zero_point
        ([[1, 0], [0, 1]], [[3.0], [3.0]], 0)
    """
    who = "linear_quantize_weight_per_channel"
    w = require_float(who, "weight", weight)
    if weight.dim() == 0:
        raise ValueError(f"{who}: weight must have shape [N, ...], got a 0-dimensional tensor")
    _, qmax = quant_range(bitwidth)
    magnitude = w.abs().amax(tuple(range(1, w.dim())), keepdim=True) if w.dim() > 1 else w.abs()
    scale = torch.where(magnitude == 0, 1.0, magnitude / qmax)
    return linear_quantize(w, bitwidth, scale, 0), scale, 0


def linear_quantize_bias(
    bias: Tensor, weight_scale: float | Tensor, input_scale: float | Tensor
) -> tuple[Tensor, Tensor, Literal[0]]:
    """Quantize a bias to int32 with scale ``weight_scale * input_scale`` and zero point 0.

    Args:
        bias: fp32 ``[N]``.
        weight_scale: number or tensor with 1 or N elements.
        input_scale: number or tensor with 1 element.

    Returns:
        ``(q int32 [N], scale fp32 [1] or [N], 0)``, saturated; NaN becomes 0.

    Raises:
        TypeError: ``bias`` is not a float tensor.
        ValueError: ``bias`` is not ``[N]``.

    Example:
        >>> linear_quantize_bias(torch.tensor([1.0, -0.26]), 0.25, 0.5)
        (tensor([ 8, -2], dtype=torch.int32), tensor([0.1250]), 0)
    """
    who = "linear_quantize_bias"
    bias = require_float(who, "bias", bias)
    if bias.dim() != 1:
        raise ValueError(f"{who}: bias must have shape [N], got {list(bias.shape)}")
    scale = torch.as_tensor(weight_scale, dtype=torch.float32).reshape(-1) * input_scale
    steps = torch.round(bias / scale).to(torch.float64)
    limits = torch.iinfo(torch.int32)
    return no_nan(steps, 0).clamp(limits.min, limits.max).to(torch.int32), scale, 0


def shift_quantized_linear_bias(
    quantized_bias: Tensor, quantized_weight: Tensor, input_zero_point: int
) -> Tensor:
    """Fold the input's zero point into the bias; see :func:`torchquant.functional.shift_bias`.

    Example:
        >>> weight = torch.tensor([[1, 1], [1, -2]], dtype=torch.int8)
        >>> shift_quantized_linear_bias(torch.tensor([3, -2], dtype=torch.int32), weight, -2)
        tensor([ 7, -4], dtype=torch.int32)
    """
    return shift_bias(quantized_bias, quantized_weight, input_zero_point)
