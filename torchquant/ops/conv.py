"""Convolutions on packed weights in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchquant._extension import load
from torchquant.ops._arguments import layout_of
from torchquant.ops._arguments import packed_shape as linear_packed_shape
from torchquant.ops._register import fake

_C = load()
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling

__all__ = ["conv_dynamic", "conv_static", "pack_conv_weight", "unpack_conv_weight"]


def pack_conv_weight(weight: Tensor, groups: int) -> Tensor:
    """Reorder an int8 weight of a convolution into the layout of its device's kernels.

    All CPUs share one layout. To move a weight between types of devices, move the result of
    :func:`unpack_conv_weight` and pack it again.

    Args:
        weight: int8 ``[O, C / groups, kh, kw]`` or ``[O, C / groups, k]``, any strides.
        groups: the number of groups; divides O.

    Returns:
        int8 ``[rows, bytes]``: on the CPU the layout of csrc/formats/int8_conv.h, on CUDA the
        weight itself as ``[O, (C / groups) * kh * kw]``.

    Raises:
        TypeError: weight is not int8.
        ValueError: weight has another number of dimensions or a dimension of size 0, or groups does
            not divide O.

    Example:
        >>> pack_conv_weight(torch.zeros(20, 8, 3, 3, dtype=torch.int8), 1).shape
        torch.Size([2, 2176])
    """
    return torch.ops.torchquant.pack_conv_weight.default(weight, groups)  # type: ignore[no-any-return]


@fake("pack_conv_weight")
def _(weight: Tensor, groups: int) -> Tensor:
    outputs, inputs = weight.shape[0], weight.shape[1:].numel()
    if layout_of(weight.device) == "rows":
        return torch.empty((outputs, inputs), dtype=torch.int8, device=weight.device)
    if weight.shape[1] == 1 and groups > 1:  # csrc/formats/int8_depthwise.h
        quads = (weight.shape[2] + 3) // 4 * weight.shape[3] if weight.dim() == 4 else inputs
        shape = ((outputs + 63) // 64, 256 * quads + 320)
        return torch.empty(shape, dtype=torch.int8, device=weight.device)
    rows, width = linear_packed_shape(outputs // groups, inputs, weight.device)
    return torch.empty((groups * rows, width), dtype=torch.int8, device=weight.device)


def unpack_conv_weight(packed: Tensor, weight_shape: Sequence[int], groups: int) -> Tensor:
    """Recover the int8 weight of ``weight_shape`` from :func:`pack_conv_weight`'s result.

    Args:
        packed: :func:`pack_conv_weight` of the weight.
        weight_shape: ``[O, C / groups, kh, kw]`` or ``[O, C / groups, k]``.
        groups: as for :func:`pack_conv_weight`.

    Returns:
        int8 of ``weight_shape``, contiguous.

    Raises:
        TypeError: packed is not int8.
        ValueError: packed was made for a weight of another shape.

    Example:
        >>> w = torch.arange(-6, 6, dtype=torch.int8).reshape(2, 2, 3)
        >>> torch.equal(unpack_conv_weight(pack_conv_weight(w, 1), [2, 2, 3], 1), w)
        True
    """
    return torch.ops.torchquant.unpack_conv_weight.default(packed, weight_shape, groups)  # type: ignore[no-any-return]


@fake("unpack_conv_weight")
def _(packed: Tensor, weight_shape: Sequence[int], groups: int) -> Tensor:
    return torch.empty(tuple(weight_shape), dtype=torch.int8, device=packed.device)


def conv_static(
    input: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor | None,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_zero_point: int = 0,
    output_dtype: torch.dtype = torch.float32,
    output_scale: Tensor | None = None,
    output_zero_point: int = 0,
    output_qmin: int = -128,
    output_qmax: int = 127,
    input_qmin: int = -128,
    input_qmax: int = 127,
) -> Tensor:
    """Run a convolution on integers, or on float input that is quantized inside the call.

    Args:
        input: int8 ``[N, C, H, W]`` or ``[N, C, L]``; or float32, bfloat16, float16, which is
            quantized per tensor to int8 in ``[input_qmin, input_qmax]`` first. Fastest in
            ``torch.channels_last``.
        input_scale: float32, one value or (int8 input) one per sample, ``[N]``.
        input_zero_point: int32, one value or (int8 input) one per sample, or None.
        packed: :func:`pack_conv_weight` of the int8 weight.
        weight_scale: float32 ``[O]`` or ``[1]``.
        bias: float32, bfloat16 or float16 ``[O]``, added in float32; or None.
        weight_shape: ``[O, C / groups, kh, kw]`` or ``[O, C / groups, k]``.
        stride, dilation: one int for each spatial dimension.
        padding: two ints for each spatial dimension, before and after, the first dimension first:
            top, bottom, left, right. What is padded adds nothing.
        groups: the number of groups.
        activation: none, relu, gelu, gelu_tanh, silu, tanh or sigmoid, applied in float32.
        residual: of the result's shape, added in float32 before the activation: float32, or int8
            with ``residual_scale`` (one value) and ``residual_zero_point``.
        output_dtype: float32, bfloat16, float16; int8 with ``output_scale``.
        output_scale: float32 of one value: the result is quantized with it, ``output_zero_point``,
            ``output_qmin`` and ``output_qmax``.

    Returns:
        ``[N, O, H', W']`` or ``[N, O, L']`` of ``output_dtype``, in ``torch.channels_last`` if
        input is, otherwise contiguous; the bits of :func:`torchquant.functional.conv_static`.

    Gradients: to a float ``input`` (straight through), ``bias`` and a float ``residual``.

    Raises:
        TypeError: a tensor or ``output_dtype`` has a wrong dtype.
        ValueError: a shape, a device, a number or the activation's name is wrong, or ``packed`` was
            made for a weight of another shape.

    Example:
        >>> x = torch.tensor([[[10, 20, 30]]], dtype=torch.int8)
        >>> w = torch.tensor([[[1, 2]]], dtype=torch.int8)
        >>> sizes = {"stride": [1], "padding": [1, 0], "dilation": [1], "groups": 1}
        >>> packed, step, one = pack_conv_weight(w, 1), torch.tensor([0.5]), torch.ones(1)
        >>> conv_static(x, step, None, packed, one, weight_shape=[1, 1, 2], **sizes)
        tensor([[[10., 25., 40.]]])
    """
    # torch.ops takes 5 us to parse this many arguments, so plain tensors bypass it.
    # torch.compile has to see the operator.
    fast = type(input) is Tensor and not _is_dynamo_compiling()
    call = _C.conv_static if fast else torch.ops.torchquant.conv_static.default
    return call(  # type: ignore[no-any-return]
        input,
        input_scale,
        input_zero_point,
        packed,
        weight_scale,
        bias,
        weight_shape,
        stride,
        padding,
        dilation,
        groups,
        activation,
        residual,
        residual_scale,
        residual_zero_point,
        output_dtype,
        output_scale,
        output_zero_point,
        output_qmin,
        output_qmax,
        input_qmin,
        input_qmax,
    )


@fake("conv_static")
def _(
    input: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor | None,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_zero_point: int = 0,
    output_dtype: torch.dtype = torch.float32,
    output_scale: Tensor | None = None,
    output_zero_point: int = 0,
    output_qmin: int = -128,
    output_qmax: int = 127,
    input_qmin: int = -128,
    input_qmax: int = 127,
) -> Tensor:
    return _empty_result(input, weight_shape, stride, padding, dilation, output_dtype)


def conv_dynamic(
    input: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    symmetric: bool = True,
    activation: str = "none",
    output_dtype: torch.dtype | None = None,
    activation_bits: int = 8,
) -> Tensor:
    """Run a convolution on float input, which is quantized per sample inside the call.

    Args:
        input: float32, bfloat16 or float16 ``[N, C, H, W]`` or ``[N, C, L]``.
        packed, weight_scale, bias, weight_shape, stride, padding, dilation, groups, activation: as
            in :func:`conv_static`.
        symmetric: True: a sample's integers in [-127, 127]; False: in [-128, 127] with a zero point
            per sample. Fewer ``activation_bits`` use the signed range of that many bits.
        output_dtype: float32, bfloat16 or float16; input's when None.
        activation_bits: 2 to 8.

    Returns:
        ``[N, O, H', W']`` or ``[N, O, L']`` of ``output_dtype``, in ``torch.channels_last`` if
        input is, otherwise contiguous; the bits of :func:`torchquant.functional.conv_dynamic`. A
        sample with NaN or an infinity gives NaN in all its outputs; other samples do not change.

    Gradients: to ``input`` (straight through) and ``bias``.

    Raises:
        TypeError: a tensor or ``output_dtype`` has a wrong dtype.
        ValueError: a shape, a device, a number or the activation's name is wrong, or ``packed`` was
            made for a weight of another shape.

    Example:
        >>> w = torch.tensor([[[[100]], [[0]]], [[[0]], [[50]]]], dtype=torch.int8)
        >>> packed, scale = pack_conv_weight(w, 1), torch.full((2,), 0.01)
        >>> sizes = {"stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 1}
        >>> x = torch.ones(1, 2, 1, 1)
        >>> conv_dynamic(x, packed, scale, weight_shape=w.shape, **sizes).flatten()
        tensor([1.0000, 0.5000])
    """
    return torch.ops.torchquant.conv_dynamic.default(  # type: ignore[no-any-return]
        input,
        packed,
        weight_scale,
        bias,
        weight_shape,
        stride,
        padding,
        dilation,
        groups,
        symmetric,
        activation,
        output_dtype,
        activation_bits,
    )


@fake("conv_dynamic")
def _(
    input: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    symmetric: bool = True,
    activation: str = "none",
    output_dtype: torch.dtype | None = None,
    activation_bits: int = 8,
) -> Tensor:
    dtype = output_dtype or input.dtype
    return _empty_result(input, weight_shape, stride, padding, dilation, dtype)


def _empty_result(
    input: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    sizes = [
        (size + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel - 1) - 1) // stride[i]
        + 1
        for i, (size, kernel) in enumerate(zip(input.shape[2:], weight_shape[2:], strict=True))
    ]
    form = torch.contiguous_format
    if input.dim() == 4:
        form = torch._prims_common.suggest_memory_format(input)
    return torch.empty(
        (input.shape[0], weight_shape[0], *sizes),
        dtype=dtype,
        device=input.device,
        memory_format=form,
    )
