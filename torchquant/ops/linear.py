"""Weights in the kernels' layout, raw integer sums, and linear layers in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchquant._extension import load
from torchquant.ops._arguments import packed_shape
from torchquant.ops._register import fake

_C = load()
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling

__all__ = [
    "int8_mm",
    "linear_dynamic",
    "linear_dynamic_split",
    "linear_static",
    "pack_weight",
    "unpack_weight",
]


def pack_weight(weight: Tensor) -> Tensor:
    """Reorder an int8 weight into the layout of its device's kernels.

    All CPUs share one layout, and all GPUs another. To move a weight between devices, move the
    result of :func:`unpack_weight` and pack it again.

    Args:
        weight: int8 ``[out_features, in_features]``, any strides.

    Returns:
        int8, with in_features padded to a multiple of 64 and the column sums stored next to the
        weights. On the CPU ``[ceil(out_features / 16), tile bytes]``, the layout of
        csrc/formats/int8_tiles.h; on CUDA ``[rows, padded in_features]``, the layout of
        csrc/formats/int8_rows.h.

    Example:
        >>> pack_weight(torch.zeros(20, 100, dtype=torch.int8)).shape
        torch.Size([2, 2176])
    """
    return torch.ops.torchquant.pack_weight.default(weight)  # type: ignore[no-any-return]


@fake("pack_weight")
def _(weight: Tensor) -> Tensor:
    shape = packed_shape(weight.shape[0], weight.shape[1], weight.device)
    return torch.empty(shape, dtype=torch.int8, device=weight.device)


def unpack_weight(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """Recover the int8 ``[out_features, in_features]`` weight from :func:`pack_weight`'s result.

    Example:
        >>> w = torch.arange(-6, 6, dtype=torch.int8).reshape(3, 4)
        >>> torch.equal(unpack_weight(pack_weight(w), 3, 4), w)
        True
    """
    return torch.ops.torchquant.unpack_weight.default(packed, out_features, in_features)  # type: ignore[no-any-return]


@fake("unpack_weight")
def _(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    return torch.empty((out_features, in_features), dtype=torch.int8, device=packed.device)


def int8_mm(input: Tensor, packed: Tensor, out_features: int) -> Tensor:
    """Raw int32 accumulators of an integer product: ``input @ weight.T``.

    Args:
        input: int8 or uint8 ``[..., K]``, K at most 65,793 (so that every sum fits int32).
        packed: :func:`pack_weight` of the int8 ``[out_features, K]`` weight.
        out_features: N.

    Returns:
        int32 ``[..., N]``, exact.

    Example:
        >>> x = torch.full((1, 3), 100, dtype=torch.int8)
        >>> int8_mm(x, pack_weight(torch.full((2, 3), -128, dtype=torch.int8)), 2)
        tensor([[-38400, -38400]], dtype=torch.int32)
    """
    return torch.ops.torchquant.int8_mm.default(input, packed, out_features)  # type: ignore[no-any-return]


@fake("int8_mm")
def _(input: Tensor, packed: Tensor, out_features: int) -> Tensor:
    return torch.empty((*input.shape[:-1], out_features), dtype=torch.int32, device=input.device)


def linear_dynamic(
    input: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_features: int,
    symmetric: bool = True,
    activation: str = "none",
    output_dtype: torch.dtype | None = None,
    activation_bits: int = 8,
) -> Tensor:
    """Run a linear layer on float input, which is quantized per token inside the call.

    Args:
        input: float32, bfloat16 or float16 ``[..., K]``.
        packed: :func:`pack_weight` of the int8 ``[N, K]`` weight.
        weight_scale: float32 ``[N]`` or ``[1]``.
        weight_zero_point: int32 ``[N]`` or ``[1]``, or None.
        bias: float32, bfloat16 or float16 ``[N]``, added in float32; or None.
        out_features: N.
        symmetric: True: activations in [-127, 127]; False: in [-128, 127] with a zero point per
            token. Fewer ``activation_bits`` use the signed range of that many bits.
        activation: none, relu, gelu, gelu_tanh, silu, tanh, sigmoid, relu6, hardswish, hardsigmoid
            or leaky_relu, applied in float32.
        output_dtype: float32, bfloat16 or float16; input's when None.
        activation_bits: 2 to 8.

    Returns:
        ``[..., N]``; the bits of :func:`torchquant.functional.linear_dynamic`. A row with NaN or an
        infinity gives NaN in all its outputs; other rows do not change.

    Gradients: to ``input`` (straight through) and ``bias``.

    Example:
        >>> w = torch.tensor([[100, 0], [0, 50]], dtype=torch.int8)
        >>> linear_dynamic(torch.ones(1, 2), pack_weight(w), torch.full((2,), 0.01), out_features=2)
        tensor([[1.0000, 0.5000]])
    """
    return torch.ops.torchquant.linear_dynamic.default(  # type: ignore[no-any-return]
        input,
        packed,
        weight_scale,
        weight_zero_point,
        bias,
        out_features,
        symmetric,
        activation,
        output_dtype,
        activation_bits,
    )


@fake("linear_dynamic")
def _(
    input: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    symmetric: bool = True,
    activation: str = "none",
    output_dtype: torch.dtype | None = None,
    activation_bits: int = 8,
) -> Tensor:
    shape = (*input.shape[:-1], out_features)
    return torch.empty(shape, dtype=output_dtype or input.dtype, device=input.device)


def linear_dynamic_split(
    input: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_features: Sequence[int],
    symmetric: bool = True,
    activations: Sequence[str] = (),
    output_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Run several linear layers on one input, which is quantized once.

    An example are the query, key and value projections of an attention layer.

    Args:
        input: float32, bfloat16 or float16 ``[..., K]``.
        packed: the results of :func:`pack_weight` for each ``[N, K]`` weight, concatenated along
            dimension 0.
        weight_scale: float32 ``[sum of N]``, the values of all layers one after the other.
        weight_zero_point: int32 ``[sum of N]`` or None.
        bias: float32, bfloat16 or float16 ``[sum of N]`` or None.
        out_features: N of each layer.
        symmetric: True: activations in [-127, 127]; False: in [-128, 127] with a zero point per
            token.
        activations: empty, or the name of each layer's activation.
        output_dtype: float32, bfloat16 or float16; input's when None.

    Returns:
        A tensor ``[..., N]`` for each layer; the bits of :func:`linear_dynamic`.

    Raises:
        TypeError: the dtype of a tensor or ``output_dtype`` is wrong.
        ValueError: a shape, a device or an activation's name is wrong, or ``packed`` was not made
            for layers of these sizes.

    Example:
        >>> w = torch.tensor([[100, 0], [0, 50]], dtype=torch.int8)
        >>> both = torch.cat([pack_weight(w), pack_weight(w[:1])])
        >>> scale = torch.full((3,), 0.01)
        >>> linear_dynamic_split(torch.ones(1, 2), both, scale, out_features=[2, 1])
        [tensor([[1.0000, 0.5000]]), tensor([[1.]])]
    """
    return torch.ops.torchquant.linear_dynamic_split.default(  # type: ignore[no-any-return]
        input,
        packed,
        weight_scale,
        weight_zero_point,
        bias,
        out_features,
        symmetric,
        activations,
        output_dtype,
    )


@fake("linear_dynamic_split")
def _(
    input: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: Sequence[int],
    symmetric: bool,
    activations: Sequence[str],
    output_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    dtype = output_dtype or input.dtype
    return [
        torch.empty((*input.shape[:-1], n), dtype=dtype, device=input.device) for n in out_features
    ]


def linear_static(
    input: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor | None,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_features: int,
    activation: str = "none",
    output_dtype: torch.dtype = torch.float32,
    output_scale: Tensor | None = None,
    output_zero_point: int = 0,
    output_qmin: int = -128,
    output_qmax: int = 127,
    input_qmin: int = -128,
    input_qmax: int = 127,
) -> Tensor:
    """Run a linear layer on integers, or on float input that is quantized inside the call.

    Args:
        input: int8 or uint8 ``[..., K]``; or float32, bfloat16, float16, which is quantized per
            tensor to int8 in ``[input_qmin, input_qmax]`` first.
        input_scale: float32, one value or (integer input) one per row, ``[..., 1]``.
        input_zero_point: int32, one value or (integer input) one per row, or None.
        packed, weight_scale, weight_zero_point, out_features, activation: as in
            :func:`linear_dynamic`.
        bias: float32, bfloat16 or float16 ``[N]``; int32 ``[N]`` in units of
            ``input_scale * weight_scale``; or None.
        output_dtype: float32, bfloat16, float16; with ``output_scale`` int8 or uint8.
        output_scale: float32 of one value: the result is quantized with it, ``output_zero_point``,
            ``output_qmin`` and ``output_qmax``.

    Returns:
        ``[..., N]`` of ``output_dtype``.

    Example:
        >>> x = torch.tensor([[10, 20]], dtype=torch.int8)
        >>> w = pack_weight(torch.tensor([[1, 2], [3, 4]], dtype=torch.int8))
        >>> linear_static(x, torch.tensor([0.5]), None, w, torch.ones(2), out_features=2)
        tensor([[25., 55.]])
    """
    # torch.ops takes 5 us to parse this many arguments, so plain tensors bypass it.
    # torch.compile has to see the operator.
    fast = type(input) is Tensor and not _is_dynamo_compiling()
    call = _C.linear_static if fast else torch.ops.torchquant.linear_static.default
    return call(  # type: ignore[no-any-return]
        input,
        input_scale,
        input_zero_point,
        packed,
        weight_scale,
        weight_zero_point,
        bias,
        out_features,
        activation,
        output_dtype,
        output_scale,
        output_zero_point,
        output_qmin,
        output_qmax,
        input_qmin,
        input_qmax,
    )


@fake("linear_static")
def _(
    input: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor | None,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    activation: str = "none",
    output_dtype: torch.dtype = torch.float32,
    output_scale: Tensor | None = None,
    output_zero_point: int = 0,
    output_qmin: int = -128,
    output_qmax: int = 127,
    input_qmin: int = -128,
    input_qmax: int = 127,
) -> Tensor:
    shape = (*input.shape[:-1], out_features)
    return torch.empty(shape, dtype=output_dtype, device=input.device)
