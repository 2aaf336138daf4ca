"""Linear layers on integers: what the kernels must produce, bit for bit.

With activations x, weights w and their zero points zx, zw, for row m and output n::

    acc = sum_k (x[m,k] - zx[m]) * (w[n,k] - zw[n])               exact
    y   = fmaf(float(acc), fl(sx[m] * sw[n]), bias[n])            float bias
    y   = fl(float(acc) * fl(sx[m] * sw[n]))                      no bias
    y   = fl(float(acc + bias[n]) * fl(sx[m] * sw[n]))            int32 bias of scale sx*sw

then the activation function in fp32, then one rounding to the output type, or
``clamp(rint(y * (1/so)) + zo)`` to int8 or uint8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchquant.functional._arithmetic import fmaf
from torchquant.functional._checks import (
    FLOAT_DTYPES,
    describe,
    dtype_name,
    require_device,
    require_dtype,
    require_tensor,
    scale_tensor,
    zero_point_tensor,
)
from torchquant.functional.activations import ACTIVATIONS, require_activation
from torchquant.functional.affine import quantize
from torchquant.scheme import quant_range


def quantized_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: float | Tensor,
    input_zero_point: int | Tensor = 0,
    weight_scale: float | Tensor,
    weight_zero_point: int | Tensor | None = None,
    output_scale: float | Tensor | None = None,
    output_zero_point: int | Tensor = 0,
    output_bits: int = 8,
    output_dtype: torch.dtype = torch.float32,
    activation: str = "none",
) -> Tensor:
    """Integer linear layer, the specification in plain torch.

    Args:
        input: int8 or uint8 ``[..., K]``.
        weight: int8 ``[N, K]``.
        bias: fp32, bf16 or fp16 ``[N]``, added in fp32; or int32 ``[N]`` of scale
            input_scale * weight_scale, unshifted (the zero points are compensated here); or None.
        input_scale: float, fp32 ``[1]``, or one per row: ``[..., 1]`` or input's leading shape.
        input_zero_point: int, int32 ``[1]`` or one per row.
        weight_scale: float, fp32 ``[1]`` or ``[N]``.
        weight_zero_point: None, int, int32 ``[1]`` or ``[N]``.
        output_scale: float or fp32 ``[1]`` for an integer result; None for a float result.
        output_zero_point: int or int32 ``[1]``, for an integer result.
        output_bits: 2 to 8; range of an integer result.
        output_dtype: float32, bfloat16, float16; with output_scale uint8 or int8 (the default,
            float32, then means int8).
        activation: "none", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "relu6",
            "hardswish", "hardsigmoid" or "leaky_relu".

    Returns:
        ``[..., N]`` of ``output_dtype``. NaN before an integer output becomes its zero point.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, bits or combination of options.

    Example:
        >>> x = torch.tensor([[10, -20]], dtype=torch.int8)
        >>> w = torch.tensor([[3, 1], [0, -128]], dtype=torch.int8)
        >>> quantized_linear(x, w, torch.tensor([0.5, 0.0]), input_scale=0.5, weight_scale=0.25)
        tensor([[  1.7500, 320.0000]])
    """
    who = "quantized_linear"
    check_integer_input(who, input)
    check_weight(who, input, weight)
    checked = check_quantized_linear(
        who,
        input,
        weight.shape[0],
        bias,
        input_scale=input_scale,
        input_zero_point=input_zero_point,
        weight_scale=weight_scale,
        weight_zero_point=weight_zero_point,
        output_scale=output_scale,
        output_zero_point=output_zero_point,
        output_range=output_bits,
        output_dtype=output_dtype,
        activation=activation,
    )
    return integer_linear(input, weight, bias, checked, activation)


def integer_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, checked: CheckedLinear, activation: str
) -> Tensor:
    """The arithmetic at the top of this file, from arguments that were checked."""
    zx = _per_row(checked.input_zero_point, input)
    acc = accumulate(input, zx, weight, checked.weight_zero_point)
    y = _to_real(acc, _per_row(checked.input_scale, input) * checked.weight_scale, bias)
    y = ACTIVATIONS[activation](y)
    if checked.output_scale is None:
        return y.to(checked.output_dtype)
    return quantize(
        y,
        checked.output_scale,
        checked.output_zero_point,
        qmin=checked.output_qmin,
        qmax=checked.output_qmax,
        dtype=checked.output_dtype,
    )


def check_integer_input(who: str, input: Tensor) -> None:
    """Raise unless ``input`` is int8 or uint8 ``[..., K]``."""
    require_tensor(who, "input", input)
    if input.dtype not in (torch.int8, torch.uint8):
        raise TypeError(
            f"{who}: input must be int8 or uint8, got {describe(input)}; quantize it first "
            "(quantize), or use linear_static or linear_dynamic, which take float input"
        )
    if input.dim() == 0:
        raise ValueError(f"{who}: input must have shape [..., K], got a 0-dimensional tensor")


def check_weight(who: str, input: Tensor, weight: Tensor) -> None:
    """Raise unless ``weight`` is int8 ``[N, K]`` for an input ``[..., K]``."""
    inner = input.shape[-1]
    wanted = f"{who}: weight must be int8 [N, K] with K = {inner}"
    if not isinstance(weight, Tensor) or weight.dtype != torch.int8:
        raise TypeError(f"{wanted}, got {describe(weight)}")
    if weight.dim() != 2 or weight.shape[1] != inner:
        raise ValueError(f"{wanted}, got {describe(weight)}")
    require_device(who, "weight", weight, input.device)


class CheckedLinear(NamedTuple):
    """:func:`quantized_linear`'s arguments, checked; numbers made tensors."""

    input_scale: Tensor
    input_zero_point: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    output_dtype: torch.dtype
    output_scale: Tensor | None
    output_zero_point: Tensor
    output_qmin: int
    output_qmax: int


def check_quantized_linear(
    who: str,
    input: Tensor,
    features: int,
    bias: Tensor | None,
    *,
    input_scale: float | Tensor,
    input_zero_point: int | Tensor,
    weight_scale: float | Tensor,
    weight_zero_point: int | Tensor | None,
    output_scale: float | Tensor | None,
    output_zero_point: int | Tensor,
    output_range: int | tuple[int, int],
    output_dtype: torch.dtype,
    activation: str,
) -> CheckedLinear:
    """The arguments of an integer linear layer with ``features`` outputs, numbers as tensors.

    ``output_range`` of an integer result is its number of bits, or its least and greatest value.
    The specification and the operator's wrapper share these checks, so both refuse the same.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device, a number, or the activation's name is wrong.
    """
    device = input.device
    check_bias(who, bias, features, device, (*FLOAT_DTYPES, torch.int32))
    rows, channels = _row_shapes(input), ((1,), (features,))
    sx = scale_tensor(who, "input_scale", input_scale, device, *rows)
    limits = torch.iinfo(input.dtype)
    zx = zero_point_tensor(
        who, "input_zero_point", input_zero_point, device, limits.min, limits.max, *rows
    )
    sw = scale_tensor(who, "weight_scale", weight_scale, device, *channels)
    zw = zero_point_tensor(
        who, "weight_zero_point", weight_zero_point, device, -128, 127, *channels
    )
    output_dtype = _output_dtype(who, output_scale, output_dtype)
    require_activation(who, activation)
    if output_scale is None:
        return CheckedLinear(sx, zx, sw, zw, output_dtype, None, zx, 0, 0)
    if isinstance(output_range, tuple):
        qmin, qmax = output_range
    else:
        qmin, qmax = quant_range(output_range, signed=output_dtype == torch.int8)
    so = scale_tensor(who, "output_scale", output_scale, device, (1,))
    zo = zero_point_tensor(who, "output_zero_point", output_zero_point, device, qmin, qmax, (1,))
    return CheckedLinear(sx, zx, sw, zw, output_dtype, so, zo, qmin, qmax)


def check_bias(
    who: str,
    bias: Tensor | None,
    features: int,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Raise unless ``bias`` is None or ``[features]`` of one of ``dtypes``."""
    if bias is None:
        return
    require_dtype(who, "bias", bias, dtypes)
    require_device(who, "bias", bias, device)
    if bias.shape != (features,):
        raise ValueError(
            f"{who}: bias must have shape [N] with N = {features}, got {list(bias.shape)}"
        )


def _row_shapes(input: Tensor) -> tuple[tuple[int, ...], ...]:
    leading = tuple(input.shape[:-1])
    return (1,), (*leading, 1), leading


def _per_row(parameter: Tensor, input: Tensor) -> Tensor:
    """Reshape a parameter of one of :func:`_row_shapes` to broadcast against ``[..., N]``."""
    if parameter.shape == (1,) or parameter.dim() == input.dim():
        return parameter
    return parameter.unsqueeze(-1)


def accumulate(input: Tensor, zx: Tensor, weight: Tensor, zw: Tensor) -> Tensor:
    """``sum_k (x - zx) * (w - zw)`` as float64, in which integers are exact to 2^53.

    A matrix product in float64 rounds nothing while 255 * 255 * K stays below 2^53, whatever order
    it adds in, and is far faster than one in int64.
    """
    x = input.to(torch.float64) - zx.to(torch.float64)
    w = weight.to(torch.float64) - zw.to(torch.float64).unsqueeze(-1)
    # A sum of one product may be -0.0, which no integer is.
    return torch.matmul(x, w.t()) + 0.0


def _to_real(acc: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return acc.to(torch.float32) * scale
    if bias.dtype == torch.int32:
        return (acc + bias.to(torch.float64)).to(torch.float32) * scale
    return fmaf(acc.to(torch.float32), scale, bias.to(torch.float32))


def _output_dtype(
    who: str, output_scale: float | Tensor | None, output_dtype: torch.dtype
) -> torch.dtype:
    if output_scale is None:
        if output_dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{who}: output_dtype must be float32, bfloat16 or float16 without output_scale, "
                f"got {dtype_name(output_dtype)}; pass output_scale for an integer result"
            )
        return output_dtype
    if output_dtype == torch.float32:
        return torch.int8
    if output_dtype not in (torch.int8, torch.uint8):
        raise TypeError(
            f"{who}: output_dtype must be int8 or uint8 with output_scale, "
            f"got {dtype_name(output_dtype)}; leave output_scale out for a float result"
        )
    return output_dtype
