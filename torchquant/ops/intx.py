"""Weights of 2 to 8 bits in the kernels' layout, and linear layers on them in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant._extension import load
from torchquant.ops._arguments import layout_of
from torchquant.ops._register import fake

_C = load()
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling

__all__ = [
    "linear_dynamic_intx",
    "linear_intx",
    "linear_static_intx",
    "pack_intx_weight",
    "unpack_intx_weight",
]


def pack_intx_weight(
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    *,
    bits: int,
    group_size: int | None = None,
) -> Tensor:
    """Store integers of 2 to 8 bits and their scales in the layout of their device's kernels.

    All CPUs share one layout. To move a weight between types of devices, move the results of
    :func:`unpack_intx_weight` and pack them again.

    Args:
        weight: int8 ``[N, K]``, integers of ``bits`` bits, any strides.
        weight_scale: float32 ``[N]``; with ``group_size`` ``[N, ceil(K / group_size)]``.
        weight_zero_point: int8 of weight_scale's shape, integers of ``bits`` bits; or None.
        bits: 2 to 8.
        group_size: inputs that share a scale; None: one scale per output channel.

    Returns:
        uint8 ``[rows, bytes]``: on the CPU the layout of csrc/formats/intx_tiles.h, on CUDA rows of
        bits, scales and zero points.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, bits or group_size is wrong, or (on the CPU) an integer has more bits.

    Example:
        >>> w = torch.zeros(16, 128, dtype=torch.int8)
        >>> pack_intx_weight(w, torch.ones(16, 4), bits=4, group_size=32).shape  # 0.5 + 0.125 bytes
        torch.Size([1, 1344])
    """
    return torch.ops.torchquant.pack_intx_weight.default(  # type: ignore[no-any-return]
        weight, weight_scale, weight_zero_point, bits, group_size
    )


def packed_intx_shape(
    outputs: int,
    inputs: int,
    bits: int,
    group_size: int | None,
    has_zero_point: bool,
    device: torch.device,
) -> tuple[int, int]:
    """Shape of :func:`pack_intx_weight`'s result on a device."""
    group = inputs if group_size is None else group_size
    groups = (inputs + group - 1) // group
    if layout_of(device) == "rows":
        return outputs, (inputs * bits + 7) // 8 + groups * (5 if has_zero_point else 4)
    last = inputs - (groups - 1) * group
    blocks = (groups - 1) * ((group + 31) // 32) + (last + 31) // 32
    zeros = (groups * 16 + 63) // 64 * 64 if has_zero_point else 0
    return (outputs + 15) // 16, groups * 64 + blocks * 64 * bits + zeros + 64


@fake("pack_intx_weight")
def _(
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bits: int,
    group_size: int | None = None,
) -> Tensor:
    outputs, inputs = weight.shape
    has_zero_point = weight_zero_point is not None
    shape = packed_intx_shape(outputs, inputs, bits, group_size, has_zero_point, weight.device)
    return torch.empty(shape, dtype=torch.uint8, device=weight.device)


def unpack_intx_weight(
    packed: Tensor,
    out_features: int,
    in_features: int,
    *,
    bits: int,
    group_size: int | None = None,
    has_zero_point: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Recover integers, scales and zero points from :func:`pack_intx_weight`'s result.

    Args:
        packed: :func:`pack_intx_weight`'s result.
        out_features, in_features: N and K.
        bits, group_size: as for :func:`pack_intx_weight`.
        has_zero_point: whether the weight was packed with zero points.

    Returns:
        ``(weight, weight_scale, weight_zero_point)``; the zero points are 0 if there were none.

    Raises:
        TypeError: packed is not uint8.
        ValueError: packed was made for other arguments.

    Example:
        >>> w, scale = torch.tensor([[1, -8, 7]], dtype=torch.int8), torch.ones(1, 2)
        >>> packed = pack_intx_weight(w, scale, bits=4, group_size=2)
        >>> torch.equal(unpack_intx_weight(packed, 1, 3, bits=4, group_size=2)[0], w)
        True
    """
    return torch.ops.torchquant.unpack_intx_weight.default(  # type: ignore[no-any-return]
        packed, out_features, in_features, bits, group_size, has_zero_point
    )


@fake("unpack_intx_weight")
def _(
    packed: Tensor,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int | None = None,
    has_zero_point: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.empty((out_features, in_features), dtype=torch.int8, device=packed.device)
    shape: tuple[int, ...] = (out_features,)
    if group_size is not None:
        shape = (out_features, (in_features + group_size - 1) // group_size)
    scale = torch.empty(shape, dtype=torch.float32, device=packed.device)
    return weight, scale, torch.empty(shape, dtype=torch.int8, device=packed.device)


def linear_dynamic_intx(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    bits: int,
    group_size: int | None = None,
    has_zero_point: bool = False,
    symmetric: bool = True,
    activation: str = "none",
    output_dtype: torch.dtype | None = None,
    activation_bits: int = 8,
) -> Tensor:
    """Run a linear layer on float input, which is quantized per token inside the call.

    Args:
        input: float32, bfloat16 or float16 ``[..., K]``.
        packed: :func:`pack_intx_weight` of the ``[N, K]`` weight.
        bias: float32, bfloat16 or float16 ``[N]``, added in float32; or None.
        out_features: N.
        bits, group_size, has_zero_point: as the weight was packed.
        symmetric: True: activations in [-127, 127]; False: in [-128, 127] with a zero point per
            token. Fewer ``activation_bits`` use the signed range of that many bits.
        activation: none, relu, gelu, gelu_tanh, silu, tanh, sigmoid, relu6, hardswish, hardsigmoid
            or leaky_relu, applied in float32.
        output_dtype: float32, bfloat16 or float16; input's when None.
        activation_bits: 2 to 8.

    Returns:
        ``[..., N]``; the bits of :func:`torchquant.functional.linear_dynamic_intx`. A row with NaN
        or an infinity gives NaN in all its outputs; other rows do not change.

    Gradients: to ``input`` (straight through) and ``bias``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device, a number or the activation's name is wrong, or packed was
            made for other arguments.

    Example:
        >>> w = torch.tensor([[1, -2, 3, 4]], dtype=torch.int8)
        >>> packed = pack_intx_weight(w, torch.tensor([[0.5, 2.0]]), bits=4, group_size=2)
        >>> x = torch.tensor([[127.0, 0.0, 1.0, 1.0]])
        >>> linear_dynamic_intx(x, packed, out_features=1, bits=4, group_size=2)
        tensor([[77.5000]])
    """
    return torch.ops.torchquant.linear_dynamic_intx.default(  # type: ignore[no-any-return]
        input,
        packed,
        bias,
        out_features,
        bits,
        group_size,
        has_zero_point,
        symmetric,
        activation,
        output_dtype,
        activation_bits,
    )


@fake("linear_dynamic_intx")
def _(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int | None,
    has_zero_point: bool = False,
    symmetric: bool = True,
    activation: str = "none",
    output_dtype: torch.dtype | None = None,
    activation_bits: int = 8,
) -> Tensor:
    dtype = input.dtype if output_dtype is None else output_dtype
    return torch.empty((*input.shape[:-1], out_features), dtype=dtype, device=input.device)


def linear_static_intx(
    input: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor | None,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    bits: int,
    group_size: int | None = None,
    has_zero_point: bool = False,
    activation: str = "none",
    output_dtype: torch.dtype = torch.float32,
    input_qmin: int = -128,
    input_qmax: int = 127,
) -> Tensor:
    """Run a linear layer on float input, which is quantized with a given scale inside the call.

    Args:
        input: float32, bfloat16 or float16 ``[..., K]``; quantized to int8 in
            ``[input_qmin, input_qmax]``.
        input_scale: float32 of one value.
        input_zero_point: int32 of one value, or None.
        packed, bias, out_features, bits, group_size, has_zero_point, activation: as in
            :func:`linear_dynamic_intx`.
        output_dtype: float32, bfloat16 or float16.
        input_qmin, input_qmax: ``-128 <= input_qmin < input_qmax <= 127``.

    Returns:
        ``[..., N]`` of ``output_dtype``; the bits of
        :func:`torchquant.functional.linear_static_intx`. A row with NaN gives NaN in all its
        outputs, an infinity saturates; other rows do not change.

    Gradients: to ``input`` (straight through where its integer lies in the range, zero elsewhere)
    and ``bias``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device, a range, a number or the activation's name is wrong, or
            packed was made for other arguments.

    Example:
        >>> w = torch.tensor([[1, -2, 3, 4]], dtype=torch.int8)
        >>> packed = pack_intx_weight(w, torch.tensor([[0.5, 2.0]]), bits=4, group_size=2)
        >>> x, scale = torch.tensor([[1.0, 0.0, 2.0, 0.0]]), torch.tensor([0.5])
        >>> linear_static_intx(x, scale, None, packed, out_features=1, bits=4, group_size=2)
        tensor([[12.5000]])
    """
    # As in linear_static: torch.ops takes long to parse this many arguments.
    fast = type(input) is Tensor and not _is_dynamo_compiling()
    call = _C.linear_static_intx if fast else torch.ops.torchquant.linear_static_intx.default
    return call(  # type: ignore[no-any-return]
        input,
        input_scale,
        input_zero_point,
        packed,
        bias,
        out_features,
        bits,
        group_size,
        has_zero_point,
        activation,
        output_dtype,
        input_qmin,
        input_qmax,
    )


@fake("linear_static_intx")
def _(
    input: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor | None,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int | None,
    has_zero_point: bool = False,
    activation: str = "none",
    output_dtype: torch.dtype = torch.float32,
    input_qmin: int = -128,
    input_qmax: int = 127,
) -> Tensor:
    shape = (*input.shape[:-1], out_features)
    return torch.empty(shape, dtype=output_dtype, device=input.device)


def linear_intx(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    bits: int,
    group_size: int | None = None,
    has_zero_point: bool = False,
    activation: str = "none",
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Run a linear layer on float input, which is not quantized: only the weight is.

    Args:
        input: float32, bfloat16 or float16 ``[..., K]``; products and sums are float32.
        packed: :func:`pack_intx_weight` of the ``[N, K]`` weight.
        bias: float32, bfloat16 or float16 ``[N]``, added in float32; or None.
        out_features: N.
        bits, group_size, has_zero_point: as the weight was packed.
        activation: none, relu, gelu, gelu_tanh, silu, tanh, sigmoid, relu6, hardswish, hardsigmoid
            or leaky_relu, applied in float32.
        output_dtype: float32, bfloat16 or float16; input's when None.

    Returns:
        ``[..., N]``. On the CPU it has the bits of :func:`torchquant.functional.linear_intx`; on
        CUDA it is the device's fp32 product with the dequantized weight, whose sums have another
        order. NaN and infinities follow IEEE 754 and stay in their row.

    Gradients: to ``input`` and ``bias``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device, a number or the activation's name is wrong, or packed was
            made for other arguments.

    Example:
        >>> w = torch.tensor([[1, -2, 3, 4]], dtype=torch.int8)
        >>> packed = pack_intx_weight(w, torch.tensor([[0.5, 2.0]]), bits=4, group_size=2)
        >>> x = torch.tensor([[0.5, 0.0, 1.0, 1.0]])
        >>> linear_intx(x, packed, out_features=1, bits=4, group_size=2)
        tensor([[14.2500]])
    """
    return torch.ops.torchquant.linear_intx.default(  # type: ignore[no-any-return]
        input,
        packed,
        bias,
        out_features,
        bits,
        group_size,
        has_zero_point,
        activation,
        output_dtype,
    )


@fake("linear_intx")
def _(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int | None,
    has_zero_point: bool = False,
    activation: str = "none",
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    dtype = input.dtype if output_dtype is None else output_dtype
    return torch.empty((*input.shape[:-1], out_features), dtype=dtype, device=input.device)
