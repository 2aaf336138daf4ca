"""Convolutions on int8 weights, as their operators compute them.

With activations q of zero point zx, and the int8 weight w of an output channel o of a group::

    acc = sum_kh,kw,c (q[n, c, oh, ow] - zx) * w[o, c, kh, kw]    exact; padding adds nothing
    y   = fmaf(float(acc), fl(sx * sw[o]), bias[o])               with a bias
    y   = fl(float(acc) * fl(sx * sw[o]))                         without one
    y   = fl(y + r)                                               with a residual

The residual r is a float32 tensor, or ``fl(float(qr - zr) * sr)`` of an int8 one. The activation
function follows in float32, then one rounding to the output type, or
``clamp(rint(y * (1/so)) + zo)`` to int8.

Weights are symmetric: they have a scale per output channel and no zero point. Where an operator
takes the packed weight and ``weight_shape``, its specification takes the int8 weight
``[O, C / groups, kh, kw]``, or ``[O, C / groups, k]`` in one dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from torchquant.functional.affine import dequantize, quantize, quantize_per_token


def conv_static(
    input: Tensor,
    input_scale: float | Tensor,
    input_zero_point: int | Tensor | None,
    weight: Tensor,
    weight_scale: float | Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
    residual_scale: float | Tensor | None = None,
    residual_zero_point: int = 0,
    output_dtype: torch.dtype = torch.float32,
    output_scale: float | Tensor | None = None,
    output_zero_point: int = 0,
    output_qmin: int = -128,
    output_qmax: int = 127,
    input_qmin: int = -128,
    input_qmax: int = 127,
) -> Tensor:
    """A convolution on integers of given scale, or on float input quantized with it first.

    In float input a sample that holds NaN gives NaN in all its outputs (an int8 output: its zero
    point); +-inf saturates. Other samples are untouched.

    Args:
        input: int8 ``[N, C, H, W]`` or ``[N, C, L]``; or fp32, bf16 or fp16, which is quantized to
            int8 in ``[input_qmin, input_qmax]``.
        input_scale: float, fp32 ``[1]``; for int8 input also one per sample, ``[N]``.
        input_zero_point: None for 0, int, int32 ``[1]``; for int8 input also ``[N]``.
        weight: int8 ``[O, C / groups, kh, kw]`` or ``[O, C / groups, k]``.
        weight_scale: float, fp32 ``[1]`` or ``[O]``.
        bias: fp32, bf16 or fp16 ``[O]`` or None; added in fp32.
        stride, dilation: one int for each spatial dimension.
        padding: two ints for each spatial dimension, before and after, the first dimension first:
            top, bottom, left, right.
        groups: the number of groups; divides C and O.
        activation: "none" or a name in :data:`torchquant.functional.ACTIVATIONS`.
        residual: of the result's shape, added before the activation: fp32, or int8 with
            ``residual_scale`` and ``residual_zero_point``.
        residual_scale: float or fp32 ``[1]`` with an int8 residual, None otherwise.
        output_dtype: float32, bfloat16 or float16; int8 with ``output_scale``.
        output_scale: float or fp32 ``[1]`` for an int8 result; None for a float result.
        output_zero_point, output_qmin, output_qmax: of an int8 result.

    Returns:
        ``[N, O, H', W']`` or ``[N, O, L']`` of ``output_dtype``.

    Raises:
        TypeError: a dtype is wrong, or ``output_dtype`` is int8 without ``output_scale`` or a float
            type with it.
        ValueError: a shape, a device, a range, a number, or the activation's name is wrong.

    Example:
        >>> x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> w = torch.tensor([[[[2, 0], [0, 4]]]], dtype=torch.int8)
        >>> sizes = {"stride": [1, 1], "padding": [0, 0, 1, 0], "dilation": [1, 1], "groups": 1}
        >>> conv_static(x, 0.5, None, w, 0.25, **sizes)
        tensor([[[[3.0000, 4.5000]]]])
    """
    who = "conv_static"
    require_tensor(who, "input", input)
    sizes = conv_sizes(who, input.shape, weight, stride, padding, dilation, groups)
    require_device(who, "weight", weight, input.device)
    limits = (-128, 127)
    shapes: tuple[tuple[int, ...], ...] = ((1,),)
    if input.is_floating_point():
        require_dtype(who, "input", input, FLOAT_DTYPES)
        if not -128 <= input_qmin < input_qmax <= 127:
            raise ValueError(
                f"{who}: input_qmin < input_qmax must lie within -128 .. 127, "
                f"got {input_qmin} and {input_qmax}"
            )
        limits = (input_qmin, input_qmax)
    elif input.dtype != torch.int8:
        raise TypeError(
            f"{who}: input must be int8, float32, bfloat16 or float16, got {describe(input)}"
        )
    else:
        shapes += ((input.shape[0],),)
    scale = scale_tensor(who, "input_scale", input_scale, input.device, *shapes)
    zero = zero_point_tensor(
        who, "input_zero_point", input_zero_point, input.device, *limits, *shapes
    )
    q = input
    if input.is_floating_point():
        q = quantize(input, scale, zero, qmin=input_qmin, qmax=input_qmax, dtype=torch.int8)
        undefined = input.isnan().reshape(input.shape[0], input[:1].numel()).any(-1)
        scale = torch.where(undefined, float("nan"), scale)
    result = _integer_conv(who, q, scale, zero, weight, weight_scale, bias, sizes)
    if residual is not None:
        result = result + _residual_values(
            who, residual, residual_scale, residual_zero_point, result
        )
    elif residual_scale is not None:
        raise ValueError(
            f"{who}: residual_scale must come with a residual, got residual_scale alone"
        )
    require_activation(who, activation)
    return _finish(
        who,
        ACTIVATIONS[activation](result),
        output_dtype,
        output_scale,
        output_zero_point,
        (output_qmin, output_qmax),
    )


def conv_dynamic(
    input: Tensor,
    weight: Tensor,
    weight_scale: float | Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    symmetric: bool = True,
    activation: str = "none",
    output_dtype: torch.dtype | None = None,
    activation_bits: int = 8,
) -> Tensor:
    """A convolution on float input, each sample of which is quantized with a scale of its own.

    A sample that holds NaN or +-inf gives NaN in all its outputs; other samples are untouched.

    Args:
        input: fp32, bf16 or fp16 ``[N, C, H, W]`` or ``[N, C, L]``.
        weight, weight_scale, bias, stride, padding, dilation, groups, activation: as in
            :func:`conv_static`.
        symmetric, activation_bits: ``symmetric`` and ``bits`` of
            :func:`torchquant.functional.quantize_per_token`, of all elements of a sample.
        output_dtype: float32, bfloat16 or float16; by default input's dtype.

    Returns:
        ``[N, O, H', W']`` or ``[N, O, L']`` of ``output_dtype``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device, a number, or the activation's name is wrong.

    Example:
        >>> x = torch.tensor([[[127.0, 1.0, 0.0]]])
        >>> w = torch.tensor([[[2, 4]]], dtype=torch.int8)
        >>> sizes = {"stride": [1], "padding": [0, 0], "dilation": [1], "groups": 1}
        >>> conv_dynamic(x, w, 0.5, **sizes)
        tensor([[[129.,   1.]]])
    """
    who = "conv_dynamic"
    require_dtype(who, "input", input, FLOAT_DTYPES)
    sizes = conv_sizes(who, input.shape, weight, stride, padding, dilation, groups)
    require_device(who, "weight", weight, input.device)
    require_activation(who, activation)
    samples = input.reshape(input.shape[0], input[:1].numel())
    q, scale, zero = quantize_per_token(samples, symmetric=symmetric, bits=activation_bits)
    q, scale, zero = q.reshape(input.shape), scale.reshape(-1), zero.reshape(-1)
    y = _integer_conv(who, q, scale, zero, weight, weight_scale, bias, sizes)
    target = input.dtype if output_dtype is None else output_dtype
    return _finish(who, ACTIVATIONS[activation](y), target, None, 0, (0, 0))


class ConvSizes(NamedTuple):
    """A convolution's sizes in two dimensions; one dimension is the second, of height 1."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    output: tuple[int, int]


def conv_sizes(
    who: str,
    input_shape: Sequence[int],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvSizes:
    """The sizes of a convolution, or an error that names the argument that does not fit.

    Example:
        >>> w = torch.zeros(8, 4, 3, dtype=torch.int8)
        >>> conv_sizes("example", (2, 4, 10), w, [2], [1, 1], [1], 1).output
        (1, 5)
    """
    if not isinstance(weight, Tensor) or weight.dtype != torch.int8 or weight.dim() not in (3, 4):
        raise TypeError(
            f"{who}: weight must be int8 [O, C / groups, kh, kw] or [O, C / groups, k], "
            f"got {describe(weight)}"
        )
    spatial = weight.dim() - 2
    shape = "[N, C, H, W]" if spatial == 2 else "[N, C, L]"
    if len(input_shape) != weight.dim():
        raise ValueError(f"{who}: input must have shape {shape}, got {list(input_shape)}")
    for name, values, count, least in (
        ("stride", stride, spatial, 1),
        ("padding", padding, 2 * spatial, 0),
        ("dilation", dilation, spatial, 1),
    ):
        if len(values) != count or any(value < least for value in values):
            raise ValueError(
                f"{who}: {name} must be {count} ints of at least {least}, got {list(values)}"
            )
    outputs, channels = weight.shape[:2]
    if groups < 1 or outputs < 1 or outputs % groups or weight.numel() == 0:
        raise ValueError(
            f"{who}: weight must have no dimension of size 0 and its outputs be a multiple of "
            f"groups = {groups}, got {describe(weight)}"
        )
    if input_shape[1] != channels * groups:
        raise ValueError(
            f"{who}: input must have {channels * groups} channels for weight {list(weight.shape)} "
            f"and groups = {groups}, got {list(input_shape)}"
        )
    output = tuple(
        (size + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel - 1) - 1) // stride[i]
        + 1
        for i, (size, kernel) in enumerate(zip(input_shape[2:], weight.shape[2:], strict=True))
    )
    if min(output) < 1 or min(input_shape[2:]) < 1:
        raise ValueError(
            f"{who}: input must be at least as large as the kernel, got {list(input_shape)} with "
            f"padding {list(padding)} for weight {list(weight.shape)} with dilation "
            f"{list(dilation)}"
        )
    if spatial == 2:
        kernel = weight.shape[2:]
        return ConvSizes(
            (kernel[0], kernel[1]),
            (stride[0], stride[1]),
            (padding[0], padding[1], padding[2], padding[3]),
            (dilation[0], dilation[1]),
            groups,
            (output[0], output[1]),
        )
    return ConvSizes(
        (1, weight.shape[2]),
        (1, stride[0]),
        (0, 0, padding[0], padding[1]),
        (1, dilation[0]),
        groups,
        (1, output[0]),
    )


def accumulate_conv(input: Tensor, zero_point: Tensor, weight: Tensor, sizes: ConvSizes) -> Tensor:
    """``sum (q - zx) * w`` as float64 ``[N, O, H', W']``, in which integers are exact to 2^53.

    The sum is taken over the positions of the kernel, each a product of matrices in float64. No
    library is asked for a convolution, because it may choose an algorithm that rounds.

    Example:
        >>> q, w = torch.full((1, 1, 3), 2, dtype=torch.int8), torch.ones(1, 1, 2).to(torch.int8)
        >>> sizes = conv_sizes("example", q.shape, w, [1], [0, 0], [1], 1)
        >>> accumulate_conv(q, torch.zeros(1), w, sizes)
        tensor([[[[4., 4.]]]], dtype=torch.float64)
    """
    batch, channels = input.shape[:2]
    groups, (high, wide) = sizes.groups, sizes.output
    x = input.to(torch.float64) - zero_point.to(torch.float64).reshape(-1, *[1] * (input.dim() - 1))
    x = x.reshape(batch, channels, *((1,) if input.dim() == 3 else ()), *input.shape[2:])
    top, bottom, left, right = sizes.padding
    x = torch.nn.functional.pad(x, (left, right, top, bottom))
    w = weight.to(torch.float64).reshape(groups, -1, weight.shape[1], *sizes.kernel)
    total = x.new_zeros(batch, groups, w.shape[1], high * wide)
    for i in range(sizes.kernel[0]):
        for j in range(sizes.kernel[1]):
            first, second = i * sizes.dilation[0], j * sizes.dilation[1]
            part = x[
                :,
                :,
                first : first + (high - 1) * sizes.stride[0] + 1 : sizes.stride[0],
                second : second + (wide - 1) * sizes.stride[1] + 1 : sizes.stride[1],
            ]
            part = part.reshape(batch, groups, channels // groups, high * wide)
            total += torch.matmul(w[..., i, j], part)
    # A sum of one product may be -0.0, which no integer is.
    return total.reshape(batch, weight.shape[0], high, wide) + 0.0


def _integer_conv(
    who: str,
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: float | Tensor,
    bias: Tensor | None,
    sizes: ConvSizes,
) -> Tensor:
    """y of the formulas at the top of this file, without a residual; scale ``[1]`` or ``[N]``."""
    outputs, device = weight.shape[0], q.device
    sw = scale_tensor(who, "weight_scale", weight_scale, device, (1,), (outputs,))
    acc = accumulate_conv(q, zero_point, weight, sizes).to(torch.float32)
    factor = scale.reshape(-1, 1, 1, 1) * sw.reshape(1, -1, 1, 1)
    if bias is None:
        y = acc * factor
    else:
        require_dtype(who, "bias", bias, FLOAT_DTYPES)
        require_device(who, "bias", bias, device)
        if bias.shape != (outputs,):
            raise ValueError(f"{who}: bias must have shape [{outputs}], got {list(bias.shape)}")
        y = fmaf(acc, factor, bias.to(torch.float32).reshape(1, -1, 1, 1))
    return y if q.dim() == 4 else y.squeeze(2)


def _residual_values(
    who: str, residual: Tensor, scale: float | Tensor | None, zero_point: int, result: Tensor
) -> Tensor:
    require_dtype(who, "residual", residual, (torch.float32, torch.int8))
    require_device(who, "residual", residual, result.device)
    if residual.shape != result.shape:
        raise ValueError(
            f"{who}: residual must have the result's shape {list(result.shape)}, "
            f"got {describe(residual)}"
        )
    if (scale is None) != residual.is_floating_point():
        raise ValueError(
            f"{who}: residual_scale must be given exactly where residual is int8, "
            f"got {describe(residual)} {'without' if scale is None else 'with'} residual_scale"
        )
    if scale is None:
        return residual
    s = scale_tensor(who, "residual_scale", scale, result.device, (1,))
    z = zero_point_tensor(who, "residual_zero_point", zero_point, result.device, -128, 127, (1,))
    return dequantize(residual, s, z)


def _finish(
    who: str,
    y: Tensor,
    dtype: torch.dtype,
    scale: float | Tensor | None,
    zero_point: int,
    limits: tuple[int, int],
) -> Tensor:
    """One rounding to the output type."""
    if (scale is None) != dtype.is_floating_point or dtype not in (*FLOAT_DTYPES, torch.int8):
        raise TypeError(
            f"{who}: output_dtype must be float32, bfloat16 or float16, or int8 exactly where "
            f"output_scale is given, got {dtype_name(dtype)} "
            f"{'without' if scale is None else 'with'} output_scale"
        )
    if scale is None:
        return y.to(dtype)
    qmin, qmax = limits
    if not -128 <= qmin < qmax <= 127:
        raise ValueError(
            f"{who}: output_qmin < output_qmax must lie within -128 .. 127, got {qmin} and {qmax}"
        )
    so = scale_tensor(who, "output_scale", scale, y.device, (1,))
    zo = zero_point_tensor(who, "output_zero_point", zero_point, y.device, qmin, qmax, (1,))
    return quantize(y, so, zo, qmin=qmin, qmax=qmax, dtype=torch.int8)
