"""Numbers to integers and back."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.functional._checks import require_tensor
from torchquant.ops._arguments import layout_arguments as _layout_arguments
from torchquant.ops._arguments import numbers_to_tensors as _numbers_to_tensors
from torchquant.ops._register import fake
from torchquant.scheme import PER_TENSOR, Granularity

__all__ = ["dequantize", "quantize", "quantize_per_token"]


def quantize(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor | None = None,
    *,
    qmin: int = -128,
    qmax: int = 127,
    granularity: Granularity = PER_TENSOR,
    dtype: torch.dtype = torch.int8,
) -> Tensor:
    """Round a float tensor to integers: ``clamp(rint(input / scale) + zero_point, qmin, qmax)``.

    Args:
        input: float32, bfloat16 or float16 ``[...]``; widened to float32 exactly.
        scale: float32 of ``granularity``'s shape, or a number for PerTensor.
        zero_point: int32 of scale's shape or ``[1]``, within [-2^22, 2^22], or a number; float32
            for a real-valued zero point (``rint((input - zero_point) / scale)``); None is 0.
        qmin, qmax: the integer range, within ``dtype``'s.
        granularity: which elements share a scale.
        dtype: int8 or uint8.

    Returns:
        ``dtype`` of input's shape. NaN becomes the zero point; infinities saturate.

    Raises:
        TypeError: the type or dtype of an argument is wrong.
        ValueError: a shape, an axis, a device, the range, or a number is not allowed.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (2018); the division is a multiplication by ``1 / scale``.

    Example:
        >>> quantize(torch.tensor([-1.0, 0.26, 9.0]), 0.5)
        tensor([-2,  1, 18], dtype=torch.int8)
    """
    require_tensor("quantize", "input", input)
    scale, zero_point = _numbers_to_tensors("quantize", scale, zero_point, input, qmin, qmax)
    return torch.ops.torchquant.quantize.default(  # type: ignore[no-any-return]
        input,
        scale,
        zero_point,
        qmin,
        qmax,
        **_layout_arguments("quantize", granularity, input),
        dtype=dtype,
    )


@fake("quantize")
def _(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.int8,
) -> Tensor:
    return torch.empty(input.shape, dtype=dtype, device=input.device)


def dequantize(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor | None = None,
    *,
    granularity: Granularity = PER_TENSOR,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute the float values that integers represent: ``(input - zero_point) * scale``.

    Args:
        input: int8 or uint8 ``[...]``.
        scale, zero_point, granularity: as for :func:`quantize`; with a real-valued zero point the
            result is ``input * scale + zero_point``.
        dtype: float32, bfloat16 or float16; the float32 result is rounded to it once.

    Returns:
        ``dtype`` of input's shape.

    Example:
        >>> dequantize(torch.tensor([-2, 1, 18], dtype=torch.int8), 0.5)
        tensor([-1.0000,  0.5000,  9.0000])
    """
    require_tensor("dequantize", "input", input)
    limit = 2**22
    scale, zero_point = _numbers_to_tensors("dequantize", scale, zero_point, input, -limit, limit)
    layout = _layout_arguments("dequantize", granularity, input)
    return torch.ops.torchquant.dequantize.default(  # type: ignore[no-any-return]
        input, scale, zero_point, **layout, dtype=dtype
    )


@fake("dequantize")
def _(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    return torch.empty(input.shape, dtype=dtype, device=input.device)


def quantize_per_token(input: Tensor, *, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize every row (token) to int8 with its own range.

    Args:
        input: float32, bfloat16 or float16 ``[..., K]``.
        symmetric: True: range [-127, 127], zero point 0; False: range [-128, 127] and a zero point.

    Returns:
        ``(q, scale, zero_point)``: int8 ``[..., K]``, float32 ``[..., 1]``, int32 ``[..., 1]``. A
        row that holds NaN or an infinity has scale NaN and zeros for q.

    Example:
        >>> q, scale, zero_point = quantize_per_token(torch.tensor([[-2.0, 0.0, 1.0]]))
        >>> q, scale.shape
        (tensor([[-127,    0,   64]], dtype=torch.int8), torch.Size([1, 1]))
    """
    return torch.ops.torchquant.quantize_per_token.default(input, symmetric)  # type: ignore[no-any-return]


@fake("quantize_per_token")
def _(input: Tensor, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    token = (*input.shape[:-1], 1)
    return (
        torch.empty(input.shape, dtype=torch.int8, device=input.device),
        torch.empty(token, dtype=torch.float32, device=input.device),
        torch.empty(token, dtype=torch.int32, device=input.device),
    )
