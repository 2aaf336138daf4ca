"""One Python wrapper per C++ operator, each followed by its fake kernel, in csrc/ops.cpp's order.

A wrapper adds names, defaults and documentation to ``torch.ops.torchquant.<name>``; the checks and
the arithmetic are in C++. A fake kernel computes shape and dtype only: `torch.compile` and
`torch.export` trace through it, so the operators stay opaque and keep their bits. The arithmetic
every operator promises is written out in plain torch in :mod:`torchquant.functional`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant._extension import load
from torchquant.functional._checks import require_tensor
from torchquant.functional.linear import check_integer_input, check_quantized_linear, check_weight
from torchquant.ops._arguments import layout_arguments as _layout_arguments
from torchquant.ops._arguments import numbers_to_tensors as _numbers_to_tensors
from torchquant.ops._fake import packed_shape, require_one_device
from torchquant.ops.fake_quantize import (
    fake_quantize,
    fake_quantize_learned,
    fake_quantize_learned_backward,
    fake_quantize_mask,
    in_range,
    mask_gradient,
    minmax,
    positive,
)
from torchquant.ops.qat import qat_linear, quantize_pack, quantize_rows
from torchquant.scheme import PER_TENSOR, Granularity

_C = load()

__all__ = [
    "PackedWeight",
    "activation",
    "dequantize",
    "fake_quantize",
    "fake_quantize_learned",
    "fake_quantize_learned_backward",
    "fake_quantize_mask",
    "gated_activation",
    "in_range",
    "int8_mm",
    "layer_norm",
    "linear_dynamic",
    "linear_dynamic_split",
    "linear_static",
    "mask_gradient",
    "minmax",
    "pack_weight",
    "positive",
    "qat_linear",
    "quantize",
    "quantize_pack",
    "quantize_per_token",
    "quantize_rows",
    "quantized_linear",
    "rms_norm",
    "unpack_weight",
]


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
        TypeError, ValueError: naming the argument, what is required and what came.

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


@torch.library.register_fake("torchquant::quantize")
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
    require_one_device("quantize", input, scale=scale, zero_point=zero_point)
    return torch.empty(input.shape, dtype=dtype, device=input.device)


def dequantize(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor | None = None,
    *,
    granularity: Granularity = PER_TENSOR,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The float values that integers stand for: ``(input - zero_point) * scale``.

    Args:
        input: int8 or uint8 ``[...]``.
        scale, zero_point, granularity: as for :func:`quantize`; with a real-valued zero point the
            result is ``input * scale + zero_point``.
        dtype: float32, bfloat16 or float16; rounded once, from float32.

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


@torch.library.register_fake("torchquant::dequantize")
def _(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    require_one_device("dequantize", input, scale=scale, zero_point=zero_point)
    return torch.empty(input.shape, dtype=dtype, device=input.device)


def quantize_per_token(input: Tensor, *, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize every row (token) to int8 with a range of its own.

    Args:
        input: float32, bfloat16 or float16 ``[..., K]``.
        symmetric: range [-127, 127] with zero point 0; else [-128, 127] with a zero point.

    Returns:
        ``(q, scale, zero_point)``: int8 ``[..., K]``, float32 ``[..., 1]``, int32 ``[..., 1]``. A
        row that holds NaN or an infinity has scale NaN and zeros for q.

    Example:
        >>> q, scale, zero_point = quantize_per_token(torch.tensor([[-2.0, 0.0, 1.0]]))
        >>> q, scale.shape
        (tensor([[-127,    0,   64]], dtype=torch.int8), torch.Size([1, 1]))
    """
    return torch.ops.torchquant.quantize_per_token.default(input, symmetric)  # type: ignore[no-any-return]


@torch.library.register_fake("torchquant::quantize_per_token")
def _(input: Tensor, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    token = (*input.shape[:-1], 1)
    return (
        torch.empty(input.shape, dtype=torch.int8, device=input.device),
        torch.empty(token, dtype=torch.float32, device=input.device),
        torch.empty(token, dtype=torch.int32, device=input.device),
    )


def pack_weight(weight: Tensor) -> Tensor:
    """Reorder an int8 weight for the kernels; the result is the same on every CPU.

    Args:
        weight: int8 ``[out_features, in_features]``, any strides.

    Returns:
        int8 ``[ceil(out_features / 16), tile bytes]``: the layout of csrc/kernels/layout.h, with
        in_features padded to 64 and the column sums beside the weights.

    Example:
        >>> pack_weight(torch.zeros(20, 100, dtype=torch.int8)).shape
        torch.Size([2, 2176])
    """
    return torch.ops.torchquant.pack_weight.default(weight)  # type: ignore[no-any-return]


@torch.library.register_fake("torchquant::pack_weight")
def _(weight: Tensor) -> Tensor:
    return torch.empty(packed_shape(*weight.shape), dtype=torch.int8, device=weight.device)


def unpack_weight(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The int8 ``[out_features, in_features]`` weight that :func:`pack_weight` was given.

    Example:
        >>> w = torch.arange(-6, 6, dtype=torch.int8).reshape(3, 4)
        >>> torch.equal(unpack_weight(pack_weight(w), 3, 4), w)
        True
    """
    return torch.ops.torchquant.unpack_weight.default(packed, out_features, in_features)  # type: ignore[no-any-return]


@torch.library.register_fake("torchquant::unpack_weight")
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


@torch.library.register_fake("torchquant::int8_mm")
def _(input: Tensor, packed: Tensor, out_features: int) -> Tensor:
    require_one_device("int8_mm", input, packed=packed)
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
    """A linear layer on float input that is quantized per token inside the call.

    Args:
        input: float32, bfloat16 or float16 ``[..., K]``.
        packed: :func:`pack_weight` of the int8 ``[N, K]`` weight.
        weight_scale: float32 ``[N]`` or ``[1]``.
        weight_zero_point: int32 ``[N]`` or ``[1]``, or None.
        bias: float32 ``[N]`` or None.
        out_features: N.
        symmetric: activations in [-127, 127], or [-128, 127] with a zero point per token; with
            fewer ``activation_bits`` the signed range of so many bits.
        activation: none, relu, gelu, gelu_tanh, silu, tanh or sigmoid, applied in float32.
        output_dtype: float32, bfloat16 or float16; input's when None.
        activation_bits: 2 to 8.

    Returns:
        ``[..., N]``; the bits of :func:`torchquant.functional.dynamic_linear`. A row with NaN or an
        infinity gives NaN in all its outputs and leaves the other rows alone.

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


@torch.library.register_fake("torchquant::linear_dynamic")
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
    require_one_device(
        "linear_dynamic",
        input,
        packed=packed,
        weight_scale=weight_scale,
        weight_zero_point=weight_zero_point,
        bias=bias,
    )
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
    """Several linear layers on one input, which is quantized once: query, key and value, say.

    Args:
        input: float32, bfloat16 or float16 ``[..., K]``.
        packed: what :func:`pack_weight` returned for each ``[N, K]`` weight, concatenated along
            dimension 0.
        weight_scale: float32, all layers' values in one tensor ``[sum of N]``.
        weight_zero_point: int32, likewise, or None.
        bias: float32, likewise, or None.
        out_features: N of each layer.
        symmetric: activations in [-127, 127], or [-128, 127] with a zero point per token.
        activations: empty, or the name of each layer's activation.
        output_dtype: float32, bfloat16 or float16; input's when None.

    Returns:
        A tensor ``[..., N]`` for each layer; the bits of :func:`linear_dynamic`.

    Raises:
        TypeError, ValueError: as :func:`linear_dynamic`; packed is not of these layers.

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


@torch.library.register_fake("torchquant::linear_dynamic_split")
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
    require_one_device(
        "linear_dynamic_split",
        input,
        packed=packed,
        weight_scale=weight_scale,
        weight_zero_point=weight_zero_point,
        bias=bias,
    )
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
    """A linear layer on integers of given scale, or on float input quantized with it inside.

    Args:
        input: int8 or uint8 ``[..., K]``; or float32, bfloat16, float16, which is quantized per
            tensor to int8 in ``[input_qmin, input_qmax]`` first.
        input_scale: float32, one value or (integer input) one per row, ``[..., 1]``.
        input_zero_point: int32, one value or (integer input) one per row, or None.
        packed, weight_scale, weight_zero_point, out_features, activation: as in
            :func:`linear_dynamic`.
        bias: float32 ``[N]``, or int32 ``[N]`` in units of ``input_scale * weight_scale``, or None.
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
    return torch.ops.torchquant.linear_static.default(  # type: ignore[no-any-return]
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


@torch.library.register_fake("torchquant::linear_static")
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
    require_one_device(
        "linear_static",
        input,
        input_scale=input_scale,
        input_zero_point=input_zero_point,
        packed=packed,
        weight_scale=weight_scale,
        weight_zero_point=weight_zero_point,
        bias=bias,
        output_scale=output_scale,
    )
    shape = (*input.shape[:-1], out_features)
    return torch.empty(shape, dtype=output_dtype, device=input.device)


def activation(input: Tensor, activation: str, *, dtype: torch.dtype | None = None) -> Tensor:
    """An activation function in one pass over memory, in the arithmetic of the fused ones.

    Args:
        input: float32, bfloat16 or float16 of any shape and strides; widened to float32 exactly.
        activation: none, relu, gelu, gelu_tanh, silu, tanh or sigmoid.
        dtype: float32, bfloat16 or float16, rounded to once; input's when None.

    Returns:
        Of input's shape and, where it is dense in memory, its strides; the bits of
        ``torchquant.functional.ACTIVATIONS[activation]``, the same on every CPU.

    Raises:
        TypeError, ValueError: naming the argument, what is required and what came.

    Gradients: to ``input``, also of gradients.

    Example:
        >>> activation(torch.tensor([-1.0, 0.0, 1.0]), "gelu")
        tensor([-0.1587,  0.0000,  0.8413])
    """
    return torch.ops.torchquant.activation.default(input, activation, dtype)  # type: ignore[no-any-return]


@torch.library.register_fake("torchquant::activation")
def _(input: Tensor, activation: str, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(input, dtype=dtype)


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up`` in one pass: the middle of a gated feed-forward layer.

    Args:
        gate, up: float32, bfloat16 or float16 of one shape and dtype; halves of one tensor
            (``x.chunk(2, dim=-1)``) are read in place.
        activation: silu (SwiGLU), gelu or gelu_tanh (GEGLU), sigmoid (GLU), ...

    Returns:
        Of gate's shape and dtype. The product is taken in float32 and rounded once.

    Raises:
        TypeError, ValueError: naming the argument, what is required and what came.

    Gradients: to ``gate`` and ``up``, also of gradients.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).

    Example:
        >>> gated_activation(torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 2.0]), "silu")
        tensor([-0.5379,  1.4621])
    """
    return torch.ops.torchquant.gated_activation.default(gate, up, activation)  # type: ignore[no-any-return]


@torch.library.register_fake("torchquant::gated_activation")
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    require_one_device("gated_activation", gate, up=up)
    return torch.empty_like(gate)


def rms_norm(
    input: Tensor, weight: Tensor | None, eps: float, *, cast_before_weight: bool = False
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in float32.

    Args:
        input: float32, bfloat16 or float16 ``[..., K]``, K not 0.
        weight: float32, bfloat16 or float16 ``[K]``, or None.
        eps: added to the mean square.
        cast_before_weight: round ``x / rms`` to input's dtype before the weight multiplies, as
            transformers' RMSNorm of Llama does; without it there is one rounding, at the end, as in
            ``torch.nn.RMSNorm``. With float32 input they are the same.

    Returns:
        Of input's shape and dtype, contiguous; the bits of
        :func:`torchquant.functional.rms_norm` on every CPU and with any number of threads.

    Raises:
        TypeError, ValueError: naming the argument, what is required and what came.

    Gradients: to ``input`` and ``weight``, also of gradients.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization" (2019).

    Example:
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
        tensor([[0.8485, 2.2627]])
    """
    return torch.ops.torchquant.rms_norm.default(input, weight, eps, cast_before_weight)  # type: ignore[no-any-return]


@torch.library.register_fake("torchquant::rms_norm")
def _(input: Tensor, weight: Tensor | None, eps: float, cast_before_weight: bool = False) -> Tensor:
    require_one_device("rms_norm", input, weight=weight)
    return torch.empty(input.shape, dtype=input.dtype, device=input.device)


def layer_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
) -> Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimension, in float32.

    Args:
        input: float32, bfloat16 or float16 ``[..., K]``, K not 0.
        weight: float32, bfloat16 or float16 ``[K]``, or None.
        bias: likewise; only with a weight.
        eps: added to the variance.
        residual: of input's shape and dtype, added to input first (in float32, so that a bfloat16
            sum is not rounded in between), or None.

    Returns:
        Of input's shape and dtype, contiguous; the bits of
        :func:`torchquant.functional.layer_norm` on every CPU and with any number of threads.

    Raises:
        TypeError, ValueError: naming the argument, what is required and what came.

    Gradients: to all four tensors, also of gradients.

    Source: Ba, Kiros & Hinton, "Layer Normalization" (2016).

    Example:
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), torch.ones(2), torch.tensor([0.0, 5.0]), 0.0)
        tensor([[-1.,  6.]])
    """
    return torch.ops.torchquant.layer_norm.default(input, weight, bias, eps, residual)  # type: ignore[no-any-return]


@torch.library.register_fake("torchquant::layer_norm")
def _(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
) -> Tensor:
    require_one_device("layer_norm", input, weight=weight, bias=bias, residual=residual)
    return torch.empty(input.shape, dtype=input.dtype, device=input.device)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A packed int8 weight and its size, for repeated calls of :func:`quantized_linear`.

    Example:
        >>> weight = PackedWeight.pack(torch.ones(8, 32, dtype=torch.int8))
        >>> weight.out_features, weight.in_features, torch.equal(weight.unpack(), torch.ones(8, 32))
        (8, 32, True)
    """

    packed: Tensor
    out_features: int
    in_features: int

    @classmethod
    def pack(cls, weight: Tensor) -> PackedWeight:
        """Pack an int8 ``[N, K]`` weight."""
        return cls(pack_weight(weight), weight.shape[0], weight.shape[1])

    def unpack(self) -> Tensor:
        """The int8 ``[N, K]`` weight."""
        return unpack_weight(self.packed, self.out_features, self.in_features)


def quantized_linear(
    input: Tensor,
    weight: Tensor | PackedWeight,
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
    """int8 linear with int32 accumulation: integers in, float or integers out, on the C++ kernel.

    ``y = activation((input - input_zero_point) @ (weight - weight_zero_point).T * input_scale *
    weight_scale + bias)``; zero points are compensated from row and column sums, never by widening.

    Args:
        input: int8 or uint8 ``[..., K]``.
        weight: int8 ``[N, K]``, N and K not 0, packed on each call; or a :class:`PackedWeight`.
        bias: int32 ``[N]`` in units of ``input_scale * weight_scale`` (without zero-point
            shift), float32 ``[N]``, or None.
        input_scale, input_zero_point: one value, or a tensor with one per row of input.
        weight_scale, weight_zero_point: one value, or a tensor ``[N]``.
        output_scale: given, the result is quantized: int8, or uint8 where ``output_dtype`` says so.
        output_zero_point, output_bits: of the quantized result, clamped to ``output_bits``.
        output_dtype: float32, bfloat16 or float16 (int8 or uint8 with ``output_scale``).
        activation: none, relu, gelu, gelu_tanh, silu, tanh or sigmoid.

    Returns:
        ``[..., N]``; the bits of :func:`torchquant.functional.quantized_linear` on every CPU.

    Raises:
        TypeError, ValueError: naming the argument, what is required and what came.

    Source: Jacob et al. (2018), section 2.3, for the zero-point algebra.

    Example:
        >>> x = torch.tensor([[1, -2, 3]], dtype=torch.int8)
        >>> w = torch.tensor([[1, 1, 1], [2, 0, -2]], dtype=torch.int8)
        >>> quantized_linear(x, w, input_scale=0.5, input_zero_point=1, weight_scale=0.25)
        tensor([[-0.1250, -0.5000]])
    """
    who = "quantized_linear"
    check_integer_input(who, input)
    if not isinstance(weight, PackedWeight):
        check_weight(who, input, weight)
        weight = PackedWeight.pack(weight)
    elif weight.in_features != input.shape[-1]:
        raise ValueError(
            f"{who}: weight must be packed from int8 [N, K] with K = {input.shape[-1]}, "
            f"got [{weight.out_features}, {weight.in_features}]"
        )
    checked = check_quantized_linear(
        who,
        input,
        weight.out_features,
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
    return linear_static(
        input,
        checked.input_scale,
        checked.input_zero_point,
        weight.packed,
        checked.weight_scale,
        None if weight_zero_point is None else checked.weight_zero_point,
        bias,
        out_features=weight.out_features,
        activation=activation,
        output_dtype=checked.output_dtype,
        output_scale=checked.output_scale,
        output_zero_point=int(output_zero_point),
        output_qmin=checked.output_qmin,
        output_qmax=checked.output_qmax,
    )
