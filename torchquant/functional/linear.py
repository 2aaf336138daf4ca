"""Linear layers on packed weights, as their operators compute them.

The integer arithmetic is that of :mod:`~torchquant.functional.quantized_linear`; here is what comes
before it, the quantization of float input. Where an operator takes the packed weight and
``out_features``, its specification takes the int8 weight ``[out_features, in_features]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchquant.functional._checks import (
    FLOAT_DTYPES,
    dtype_name,
    require_dtype,
    scale_tensor,
    zero_point_tensor,
)
from torchquant.functional.affine import quantize, quantize_per_token
from torchquant.functional.quantized_linear import (
    accumulate,
    check_bias,
    check_integer_input,
    check_quantized_linear,
    check_weight,
    integer_linear,
)

MOST_INPUTS = 65_793  # 255 * 128 * MOST_INPUTS still fits int32


def int8_mm(input: Tensor, weight: Tensor) -> Tensor:
    """Raw int32 accumulators of an integer product: ``input @ weight.T``.

    Args:
        input: int8 or uint8 ``[..., K]``, K at most 65,793, so that every sum fits int32.
        weight: int8 ``[N, K]``.

    Returns:
        int32 ``[..., N]``, exact.

    Raises:
        TypeError: input is not int8 or uint8, or weight not int8.
        ValueError: the shapes do not fit, the devices differ, or K is too large.

    Example:
        >>> x = torch.full((1, 3), 100, dtype=torch.int8)
        >>> int8_mm(x, torch.full((2, 3), -128, dtype=torch.int8))
        tensor([[-38400, -38400]], dtype=torch.int32)
    """
    check_integer_input("int8_mm", input)
    check_weight("int8_mm", input, weight)
    if input.shape[-1] > MOST_INPUTS:
        raise ValueError(
            f"int8_mm: in_features must be at most {MOST_INPUTS} for sums that fit int32, got "
            f"{input.shape[-1]}; split the input along its last dimension and add in int64"
        )
    zero = torch.zeros(1, device=input.device)
    return accumulate(input, zero, weight, zero).to(torch.int32)


def linear_dynamic(
    input: Tensor,
    weight: Tensor,
    weight_scale: float | Tensor,
    weight_zero_point: int | Tensor | None = None,
    bias: Tensor | None = None,
    *,
    symmetric: bool = True,
    activation: str = "none",
    output_dtype: torch.dtype | None = None,
    activation_bits: int = 8,
) -> Tensor:
    """A linear layer on float input, each row of which is quantized with a scale of its own.

    A row that holds NaN or +-inf gives NaN in all its outputs; other rows are untouched.

    Args:
        input: fp32, bf16 or fp16 ``[..., K]``.
        weight: int8 ``[N, K]``.
        weight_scale: float, fp32 ``[1]`` or ``[N]``.
        weight_zero_point: None, int, int32 ``[1]`` or ``[N]``.
        bias: fp32, bf16 or fp16 ``[N]`` or None; added in fp32.
        symmetric, activation_bits: ``symmetric`` and ``bits`` of
            :func:`torchquant.functional.quantize_per_token`.
        activation: none, relu, gelu, gelu_tanh, silu, tanh, sigmoid, relu6, hardswish, hardsigmoid
            or leaky_relu.
        output_dtype: float32, bfloat16 or float16; by default input's dtype.

    Returns:
        ``[..., N]`` of ``output_dtype``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device, a number, or the activation's name is wrong.

    Example:
        >>> w = torch.tensor([[2, 4]], dtype=torch.int8)
        >>> linear_dynamic(torch.tensor([[127.0, 1.0]]), w, 0.5)
        tensor([[129.]])
    """
    who = "linear_dynamic"
    _check_float_input(who, input)
    check_weight(who, input, weight)
    check_bias(who, bias, weight.shape[0], input.device, FLOAT_DTYPES)
    q, scale, zero_point = quantize_per_token(input, symmetric=symmetric, bits=activation_bits)
    checked = check_quantized_linear(
        who,
        q,
        weight.shape[0],
        bias,
        input_scale=scale,
        input_zero_point=zero_point,
        weight_scale=weight_scale,
        weight_zero_point=weight_zero_point,
        output_scale=None,
        output_zero_point=0,
        output_range=8,
        output_dtype=input.dtype if output_dtype is None else output_dtype,
        activation=activation,
    )
    return integer_linear(q, weight, bias, checked, activation)


def linear_dynamic_split(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_features: Sequence[int],
    symmetric: bool = True,
    activations: Sequence[str] = (),
    output_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Several linear layers on one input: :func:`linear_dynamic` of each.

    Args:
        input: fp32, bf16 or fp16 ``[..., K]``.
        weight: int8, the layers' weights ``[N, K]`` one below the other.
        weight_scale, weight_zero_point, bias: of all outputs, ``[sum of N]``.
        out_features: N of each layer.
        symmetric, output_dtype: as in :func:`linear_dynamic`.
        activations: the name of each layer's activation, or empty for none.

    Returns:
        A tensor ``[..., N]`` for each layer.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device or a name is wrong, or the lists have different lengths.

    Example:
        >>> w = torch.tensor([[100, 0], [0, 50], [100, 0]], dtype=torch.int8)
        >>> linear_dynamic_split(torch.ones(1, 2), w, torch.full((3,), 0.01), out_features=[2, 1])
        [tensor([[1.0000, 0.5000]]), tensor([[1.]])]
    """
    sizes = list(out_features)
    names = list(activations) or ["none"] * len(sizes)
    if len(names) != len(sizes) or sum(sizes) != weight.shape[0]:
        raise ValueError(
            "linear_dynamic_split: out_features must add up to weight's "
            f"{weight.shape[0]} rows and activations be empty or one name per layer, "
            f"got {sizes} and {list(activations)}"
        )
    parts = [
        [None] * len(sizes) if tensor is None else tensor.split(sizes)
        for tensor in (weight_scale, weight_zero_point, bias)
    ]
    return [
        linear_dynamic(
            input, w, *side, symmetric=symmetric, activation=name, output_dtype=output_dtype
        )
        for w, *side, name in zip(weight.split(sizes), *parts, names, strict=True)
    ]


def linear_static(
    input: Tensor,
    input_scale: float | Tensor,
    input_zero_point: int | Tensor | None,
    weight: Tensor,
    weight_scale: float | Tensor,
    weight_zero_point: int | Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    output_dtype: torch.dtype = torch.float32,
    output_scale: float | Tensor | None = None,
    output_zero_point: int = 0,
    output_qmin: int = -128,
    output_qmax: int = 127,
    input_qmin: int = -128,
    input_qmax: int = 127,
) -> Tensor:
    """A linear layer on integers of given scale, or on float input quantized with it first.

    In float input a row that holds NaN gives NaN in all its outputs (an integer output: its zero
    point); +-inf saturates. Other rows are untouched.

    Args:
        input: int8 or uint8 ``[..., K]``; or fp32, bf16 or fp16, which is quantized to int8 in
            ``[input_qmin, input_qmax]``.
        input_scale: float, fp32 ``[1]``; for integer input also one per row.
        input_zero_point: None for 0, int, int32 ``[1]``; for integer input also one per row.
        weight, weight_scale, weight_zero_point, activation: as in :func:`linear_dynamic`.
        bias: float ``[N]``, added in fp32; int32 ``[N]`` in units of
            ``input_scale * weight_scale``; or None.
        output_dtype: float32, bfloat16 or float16; with ``output_scale`` int8 or uint8.
        output_scale: float or fp32 ``[1]`` for an integer result; None for a float result.
        output_zero_point, output_qmin, output_qmax: of an integer result.

    Returns:
        ``[..., N]`` of ``output_dtype``.

    Raises:
        TypeError: a dtype is wrong, or ``output_dtype`` is an integer type without
            ``output_scale`` or a float type with it.
        ValueError: a shape, a device, a range, a number, or the activation's name is wrong.

    Example:
        >>> w = torch.tensor([[2, 4]], dtype=torch.int8)
        >>> x = torch.tensor([[1.0, 0.5], [float("nan"), 0.0]])
        >>> linear_static(x, 0.5, None, w, 0.25)
        tensor([[1.],
                [nan]])
    """
    who = "linear_static"
    if (output_scale is None) != output_dtype.is_floating_point:
        given = "without" if output_scale is None else "with"
        raise TypeError(
            f"{who}: output_dtype must be int8 or uint8 exactly where output_scale is given, "
            f"got {dtype_name(output_dtype)} {given} output_scale"
        )
    zero_point = 0 if input_zero_point is None else input_zero_point
    q, scale = input, input_scale
    if input.is_floating_point():
        _check_float_input(who, input)
        if not -128 <= input_qmin <= input_qmax <= 127:
            raise ValueError(
                f"{who}: input_qmin <= input_qmax must lie within -128 .. 127, "
                f"got {input_qmin} and {input_qmax}"
            )
        scale = scale_tensor(who, "input_scale", input_scale, input.device, (1,))
        limits = (input_qmin, input_qmax)
        zero_point = zero_point_tensor(
            who, "input_zero_point", zero_point, input.device, *limits, (1,)
        )
        q = quantize(input, scale, zero_point, qmin=input_qmin, qmax=input_qmax, dtype=torch.int8)
        scale = torch.where(input.isnan().any(-1, keepdim=True), float("nan"), scale)
    check_integer_input(who, q)
    check_weight(who, q, weight)
    checked = check_quantized_linear(
        who,
        q,
        weight.shape[0],
        bias,
        input_scale=scale,
        input_zero_point=zero_point,
        weight_scale=weight_scale,
        weight_zero_point=weight_zero_point,
        output_scale=output_scale,
        output_zero_point=output_zero_point,
        output_range=(output_qmin, output_qmax),
        output_dtype=output_dtype,
        activation=activation,
    )
    return integer_linear(q, weight, bias, checked, activation)


def _check_float_input(who: str, input: Tensor) -> None:
    require_dtype(who, "input", input, FLOAT_DTYPES)
    if input.dim() == 0:
        raise ValueError(f"{who}: input must have shape [..., K], got a 0-dimensional tensor")
