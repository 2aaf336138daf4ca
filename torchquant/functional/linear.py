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

from torchquant.functional._arithmetic import fmaf, reciprocal
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
from torchquant.functional.activations import apply_activation, require_activation
from torchquant.functional.affine import quantize, quantize_per_token
from torchquant.scheme import quant_range

_INT8 = (torch.int8,)


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
        bias: fp32 ``[N]``; or int32 ``[N]`` of scale input_scale * weight_scale, unshifted (the
            zero points are compensated here); or None.
        input_scale: float, fp32 ``[1]``, or one per row: ``[..., 1]`` or input's leading shape.
        input_zero_point: int, int32 ``[1]`` or one per row.
        weight_scale: float, fp32 ``[1]`` or ``[N]``.
        weight_zero_point: None, int, int32 ``[1]`` or ``[N]``.
        output_scale: None for a float result, else float or fp32 ``[1]``: the result is an integer.
        output_zero_point: int or int32 ``[1]``, for an integer result.
        output_bits: 2 to 8; range of an integer result.
        output_dtype: float32, bfloat16, float16; with output_scale int8 (float32, the default, then
            stands for int8) or uint8.
        activation: "none", "relu", "gelu", "gelu_tanh", "silu", "tanh" or "sigmoid".

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
        output_bits=output_bits,
        output_dtype=output_dtype,
        activation=activation,
    )
    zx = _per_row(checked.input_zero_point, input)
    acc = _accumulate(input, zx, weight, checked.weight_zero_point)
    y = _to_real(acc, _per_row(checked.input_scale, input) * checked.weight_scale, bias)
    y = apply_activation(who, activation, y)
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


def static_linear(
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
    output_dtype: torch.dtype | None = None,
    activation: str = "none",
) -> Tensor:
    """Quantize float input to int8 with a fixed scale, then :func:`quantized_linear`.

    A row that holds NaN gives NaN in all its outputs (an integer output: its zero point); +-inf
    saturates. Other rows are untouched.

    Args:
        input: fp32, bf16 or fp16 ``[..., K]``.
        input_scale: float or fp32 ``[1]``.
        input_zero_point: int or int32 ``[1]``; the integers cover [-128, 127].
        output_dtype: by default input's dtype (with output_scale: int8).
        weight, bias, weight_scale, weight_zero_point, output_scale, output_zero_point, output_bits,
            activation: as in :func:`quantized_linear`.

    Returns:
        ``[..., N]`` of ``output_dtype``.

    Raises:
        TypeError, ValueError: as :func:`quantized_linear`.

    Example:
        >>> w = torch.tensor([[2, 4]], dtype=torch.int8)
        >>> x = torch.tensor([[1.0, 0.5], [float("nan"), 0.0]])
        >>> static_linear(x, w, input_scale=0.5, weight_scale=0.25)
        tensor([[1.],
                [nan]])
    """
    who = "static_linear"
    _check_float_input(who, input)
    scale = scale_tensor(who, "input_scale", input_scale, input.device, (1,))
    zero_point = zero_point_tensor(
        who, "input_zero_point", input_zero_point, input.device, -128, 127, (1,)
    )
    has_nan = input.isnan().any(-1, keepdim=True)
    if output_dtype is None:
        output_dtype = input.dtype if output_scale is None else torch.int8
    return quantized_linear(
        quantize(input, scale, zero_point),
        weight,
        bias,
        input_scale=torch.where(has_nan, float("nan"), scale),
        input_zero_point=zero_point,
        weight_scale=weight_scale,
        weight_zero_point=weight_zero_point,
        output_scale=output_scale,
        output_zero_point=output_zero_point,
        output_bits=output_bits,
        output_dtype=output_dtype,
        activation=activation,
    )


def dynamic_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: float | Tensor,
    weight_zero_point: int | Tensor | None = None,
    symmetric: bool = True,
    activation_bits: int = 8,
    output_dtype: torch.dtype | None = None,
    activation: str = "none",
) -> Tensor:
    """Quantize each row of float input with its own scale, then :func:`quantized_linear`.

    A row that holds NaN or +-inf gives NaN in all its outputs; other rows are untouched.

    Args:
        input: fp32, bf16 or fp16 ``[..., K]``.
        weight: int8 ``[N, K]``.
        bias: fp32 ``[N]`` or None.
        weight_scale, weight_zero_point, activation: as in :func:`quantized_linear`.
        symmetric, activation_bits: see :func:`torchquant.functional.quantize_per_token`.
        output_dtype: float32, bfloat16 or float16; by default input's dtype.

    Returns:
        ``[..., N]`` of ``output_dtype``.

    Raises:
        TypeError, ValueError: as :func:`quantized_linear`.

    Example:
        >>> w = torch.tensor([[2, 4]], dtype=torch.int8)
        >>> dynamic_linear(torch.tensor([[127.0, 1.0]]), w, weight_scale=0.5)
        tensor([[129.]])
    """
    who = "dynamic_linear"
    _check_float_input(who, input)
    check_weight(who, input, weight)
    _check_bias(who, bias, weight.shape[0], input.device, (torch.float32,))
    q, scale, zero_point = quantize_per_token(input, symmetric=symmetric, bits=activation_bits)
    return quantized_linear(
        q,
        weight,
        bias,
        input_scale=scale,
        input_zero_point=zero_point,
        weight_scale=weight_scale,
        weight_zero_point=weight_zero_point,
        output_dtype=input.dtype if output_dtype is None else output_dtype,
        activation=activation,
    )


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
    compensate zero points themselves; :func:`quantized_linear` does and wants the unshifted bias.

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
    require_dtype(who, "qweight", qweight, _INT8)
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


def _check_float_input(who: str, input: Tensor) -> None:
    require_dtype(who, "input", input, FLOAT_DTYPES)
    if input.dim() == 0:
        raise ValueError(f"{who}: input must have shape [..., K], got a 0-dimensional tensor")


def check_integer_input(who: str, input: Tensor) -> None:
    """Raise unless ``input`` is int8 or uint8 ``[..., K]``."""
    require_tensor(who, "input", input)
    if input.dtype not in (torch.int8, torch.uint8):
        raise TypeError(
            f"{who}: input must be int8 or uint8, got {describe(input)}; quantize it first "
            "(quantize), or use static_linear or dynamic_linear, which take float input"
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
    output_bits: int,
    output_dtype: torch.dtype,
    activation: str,
) -> CheckedLinear:
    """The arguments of an integer linear layer with ``features`` outputs; raises for wrong ones.

    One place for this specification and for the operator's wrapper: they refuse the same.
    """
    device = input.device
    _check_bias(who, bias, features, device, (torch.float32, torch.int32))
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
    qmin, qmax = quant_range(output_bits, signed=output_dtype == torch.int8)
    so = scale_tensor(who, "output_scale", output_scale, device, (1,))
    zo = zero_point_tensor(who, "output_zero_point", output_zero_point, device, qmin, qmax, (1,))
    return CheckedLinear(sx, zx, sw, zw, output_dtype, so, zo, qmin, qmax)


def _check_bias(
    who: str,
    bias: Tensor | None,
    features: int,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> None:
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
    """A parameter of one of :func:`_row_shapes` so that it broadcasts against ``[..., N]``."""
    if parameter.shape == (1,) or parameter.dim() == input.dim():
        return parameter
    return parameter.unsqueeze(-1)


def _accumulate(input: Tensor, zx: Tensor, weight: Tensor, zw: Tensor) -> Tensor:
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
    return fmaf(acc.to(torch.float32), scale, bias)


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
