"""Biases as integers, for kernels that add them to the int32 accumulators."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.functional._arithmetic import reciprocal
from torchquant.functional._checks import require_dtype, scale_tensor, zero_point_tensor


def quantize_bias(
    bias: Tensor, input_scale: float | Tensor, weight_scale: float | Tensor
) -> Tensor:
    """Bias as int32 with scale ``fl(input_scale * weight_scale)`` and zero point 0.

    Args:
        bias: fp32 ``[N]``.
        input_scale: float or fp32 ``[1]``.
        weight_scale: float, fp32 ``[1]`` or ``[N]``.

    Returns:
        int32 ``[N]``, saturated to its range; NaN gives 0.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.

    Example:
        >>> quantize_bias(torch.tensor([1.0, -0.26]), 0.5, 0.25)
        tensor([ 8, -2], dtype=torch.int32)
    """
    who = "quantize_bias"
    require_dtype(who, "bias", bias, (torch.float32,))
    if bias.dim() != 1:
        raise ValueError(f"{who}: bias must have shape [N], got {list(bias.shape)}")
    sx = scale_tensor(who, "input_scale", input_scale, bias.device, (1,))
    sw = scale_tensor(who, "weight_scale", weight_scale, bias.device, (1,), tuple(bias.shape))
    # fp32 cannot hold 2^31 - 1: the clamp is in float64, the product's one rounding stays fp32.
    steps = torch.round(bias * reciprocal(sx * sw)).to(torch.float64)
    limits = torch.iinfo(torch.int32)
    return torch.nan_to_num(steps, nan=0.0).clamp(limits.min, limits.max).to(torch.int32)


def shift_bias(qbias: Tensor, qweight: Tensor, input_zero_point: int | Tensor) -> Tensor:
    """Fold the input's zero point into an int32 bias: ``qbias - zx * sum_k qweight``.

    With it ``sum_k x * w + shifted`` equals ``sum_k (x - zx) * w + qbias``. For kernels that do not
    compensate zero points themselves; :func:`quantized_linear` does, and takes the unshifted bias.

    Args:
        qbias: int32 ``[N]``.
        qweight: int8 ``[N, K]``, symmetric.
        input_zero_point: int or int32 ``[1]``.

    Returns:
        int32 ``[N]``.

    Raises:
        TypeError, ValueError: wrong dtype or shape, or a sum that does not fit into int32.

    Example:
        >>> w = torch.tensor([[1, 1], [1, -2]], dtype=torch.int8)
        >>> shift_bias(torch.tensor([3, -2], dtype=torch.int32), w, -2)
        tensor([ 7, -4], dtype=torch.int32)
    """
    who = "shift_bias"
    require_dtype(who, "qbias", qbias, (torch.int32,))
    require_dtype(who, "qweight", qweight, (torch.int8,))
    if qweight.dim() != 2 or qbias.shape != qweight.shape[:1]:
        raise ValueError(
            f"{who}: qbias must have shape [N] and qweight [N, K], "
            f"got {list(qbias.shape)} and {list(qweight.shape)}"
        )
    limits = torch.iinfo(torch.int32)
    zx = zero_point_tensor(
        who, "input_zero_point", input_zero_point, qbias.device, limits.min, limits.max, (1,)
    )
    shifted = qbias.to(torch.int64) - zx.to(torch.int64) * qweight.to(torch.int64).sum(1)
    if bool(((shifted < limits.min) | (shifted > limits.max)).any()):
        raise ValueError(
            f"{who}: the shifted bias must fit into int32, got {shifted.abs().max().item()}; "
            "pass the unshifted bias to quantized_linear instead"
        )
    return shifted.to(torch.int32)
