"""Weights of 2 to 8 bits: how they are stored, and linear layers on them.

A weight has one scale for each output channel, or one for each group of inputs of a channel. With
groups, the integer sum of each group is exact, and the groups are added in ascending order::

    acc[g] = sum over k of group g of (x[m,k] - zx[m]) * (w[n,k] - zw[n,g])     exact
    t      = fmaf(float(acc[g]), sw[n,g], t)     for g = 0, 1, ..., from t = 0
    y      = fmaf(t, sx[m], bias[n])             or fl(t * sx[m]) without bias

With one scale per channel the layers are :func:`torchquant.functional.linear_dynamic` and
:func:`torchquant.functional.linear_static`.

Where activations stay floats, the sum of a group is one of fp32, also in ascending order::

    s[g] = fmaf(x[m,k], float(w[n,k] - zw[n,g]), s[g])     for k of group g ascending, from 0
    t    = fmaf(s[g], sw[n,g], t)                          for g = 0, 1, ..., from t = 0
    y    = fl(t + bias[n])                                 or t without bias
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.functional import _bits
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
from torchquant.functional.affine import quantize, quantize_per_token
from torchquant.functional.linear import linear_dynamic, linear_static
from torchquant.functional.quantized_linear import accumulate, check_bias, check_weight
from torchquant.scheme import MAX_BITS, MIN_BITS, quant_range


def pack_integers(input: Tensor, bits: int) -> Tensor:
    """Store integers of 2 to 8 bits without gaps, row by row.

    A row of K integers becomes a string of ``K * bits`` bits. Integer k has the bits ``k * bits``
    to ``(k + 1) * bits - 1``, its lowest bit first, in two's complement. Bit i of the string is bit
    ``i % 8`` of byte ``i // 8``. For 3 bits::

        byte        |        0        |        1        |        2        |
        bit         | 0 1 2 3 4 5 6 7 | 0 1 2 3 4 5 6 7 | 0 1 2 3 4 5 6 7 |
        integer     | 0 0 0 1 1 1 2 2 | 2 3 3 3 4 4 4 5 | 5 5 6 6 6 7 7 7 |

    Args:
        input: int8 ``[..., K]``, each from ``-2^(bits-1)`` to ``2^(bits-1) - 1``.
        bits: 2 to 8.

    Returns:
        uint8 ``[..., ceil(K * bits / 8)]``; the bits behind the last integer are 0.

    Raises:
        TypeError: input is not int8.
        ValueError: bits is out of range, input has no dimension, or an integer has more bits.

    Example:
        >>> pack_integers(torch.tensor([1, -1, 7], dtype=torch.int8), 4)
        tensor([241,   7], dtype=torch.uint8)
    """
    who = "pack_integers"
    require_dtype(who, "input", input, (torch.int8,))
    qmin, qmax = _range(who, bits)
    if input.dim() == 0:
        raise ValueError(f"{who}: input must have shape [..., K], got a 0-dimensional tensor")
    if input.numel() and not (qmin <= int(input.min()) and int(input.max()) <= qmax):
        raise ValueError(
            f"{who}: input must be from {qmin} to {qmax} for bits = {bits}, got integers from "
            f"{int(input.min())} to {int(input.max())}"
        )
    return _bits.pack(input, bits)


def unpack_integers(input: Tensor, bits: int, length: int) -> Tensor:
    """The reverse of :func:`pack_integers`.

    Args:
        input: uint8 ``[..., ceil(length * bits / 8)]``.
        bits: 2 to 8.
        length: K, the number of integers in a row.

    Returns:
        int8 ``[..., K]``.

    Raises:
        TypeError: input is not uint8.
        ValueError: bits is out of range, or input has another number of bytes.

    Example:
        >>> unpack_integers(torch.tensor([241, 7], dtype=torch.uint8), 4, 3)
        tensor([ 1, -1,  7], dtype=torch.int8)
    """
    who = "unpack_integers"
    require_dtype(who, "input", input, (torch.uint8,))
    _range(who, bits)
    size = (length * bits + 7) // 8
    if input.dim() == 0 or input.shape[-1] != size:
        raise ValueError(
            f"{who}: input must have {size} bytes in its last dimension for length = {length} and "
            f"bits = {bits}, got {describe(input)}"
        )
    return _bits.unpack(input, bits, length)


def linear_dynamic_intx(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    activation: str = "none",
    output_dtype: torch.dtype | None = None,
    activation_bits: int = 8,
) -> Tensor:
    """A linear layer on float input, each row of which is quantized with a scale of its own.

    A row that holds NaN or +-inf gives NaN in all its outputs; other rows are untouched.

    Args:
        input: fp32, bf16 or fp16 ``[..., K]``.
        weight: int8 ``[N, K]``, integers of ``bits`` bits.
        weight_scale: fp32 ``[N]``; with ``group_size`` ``[N, ceil(K / group_size)]``.
        weight_zero_point: int8 of weight_scale's shape, integers of ``bits`` bits; or None.
        bias: fp32, bf16 or fp16 ``[N]`` or None; added in fp32.
        bits: 2 to 8.
        group_size: inputs that share a scale, 1 to K; None: one scale per output channel.
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
        >>> w = torch.tensor([[1, -2, 3, 4]], dtype=torch.int8)
        >>> x = torch.tensor([[127.0, 0.0, 1.0, 1.0]])
        >>> linear_dynamic_intx(x, w, torch.tensor([[0.5, 2.0]]), bits=4, group_size=2)
        tensor([[77.5000]])
    """
    who = "linear_dynamic_intx"
    _check_input(who, input)
    check_weight(who, input, weight)
    check_intx(who, weight, weight_scale, weight_zero_point, bits, group_size)
    if group_size is None:
        zero = None if weight_zero_point is None else weight_zero_point.to(torch.int32)
        return linear_dynamic(
            input,
            weight,
            weight_scale,
            zero,
            bias,
            symmetric=symmetric,
            activation=activation,
            output_dtype=output_dtype,
            activation_bits=activation_bits,
        )
    dtype = input.dtype if output_dtype is None else output_dtype
    _check_output(who, weight, bias, activation, dtype)
    q, scale, zero_point = quantize_per_token(input, symmetric=symmetric, bits=activation_bits)
    t = _grouped_sums(q, zero_point, weight, weight_scale, weight_zero_point, group_size)
    y = t * scale if bias is None else fmaf(t, scale, bias.to(torch.float32))
    return ACTIVATIONS[activation](y).to(dtype)


def linear_static_intx(
    input: Tensor,
    input_scale: float | Tensor,
    input_zero_point: int | Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int | None = None,
    activation: str = "none",
    output_dtype: torch.dtype = torch.float32,
    input_qmin: int = -128,
    input_qmax: int = 127,
) -> Tensor:
    """A linear layer on float input, which is quantized with a given scale.

    A row that holds NaN gives NaN in all its outputs; +-inf saturates. Other rows are untouched.

    Args:
        input: fp32, bf16 or fp16 ``[..., K]``; quantized to int8 in ``[input_qmin, input_qmax]``.
        input_scale: float, fp32 ``[1]``.
        input_zero_point: None for 0, int, int32 ``[1]``.
        weight, weight_scale, weight_zero_point, bias, bits, group_size, activation: as in
            :func:`linear_dynamic_intx`.
        output_dtype: float32, bfloat16 or float16.
        input_qmin, input_qmax: ``-128 <= input_qmin < input_qmax <= 127``.

    Returns:
        ``[..., N]`` of ``output_dtype``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device, a range, a number, or the activation's name is wrong.

    Example:
        >>> w = torch.tensor([[1, -2, 3, 4]], dtype=torch.int8)
        >>> x = torch.tensor([[1.0, 0.0, 2.0, 0.0], [float("nan"), 0.0, 0.0, 0.0]])
        >>> linear_static_intx(x, 0.5, None, w, torch.tensor([[0.5, 2.0]]), bits=4, group_size=2)
        tensor([[12.5000],
                [    nan]])
    """
    who = "linear_static_intx"
    _check_input(who, input)
    check_weight(who, input, weight)
    check_intx(who, weight, weight_scale, weight_zero_point, bits, group_size)
    limits = input_qmin, input_qmax
    if not -128 <= input_qmin < input_qmax <= 127:
        raise ValueError(
            f"{who}: input_qmin < input_qmax must lie within -128 .. 127, "
            f"got {input_qmin} and {input_qmax}"
        )
    scale = scale_tensor(who, "input_scale", input_scale, input.device, (1,))
    given = 0 if input_zero_point is None else input_zero_point
    zero_point = zero_point_tensor(who, "input_zero_point", given, input.device, *limits, (1,))
    _check_output(who, weight, bias, activation, output_dtype)
    if group_size is None:
        return linear_static(
            input,
            scale,
            zero_point,
            weight,
            weight_scale,
            None if weight_zero_point is None else weight_zero_point.to(torch.int32),
            bias,
            activation=activation,
            output_dtype=output_dtype,
            input_qmin=input_qmin,
            input_qmax=input_qmax,
        )
    q = quantize(input, scale, zero_point, qmin=input_qmin, qmax=input_qmax, dtype=torch.int8)
    scale = torch.where(input.isnan().any(-1, keepdim=True), float("nan"), scale)
    t = _grouped_sums(q, zero_point, weight, weight_scale, weight_zero_point, group_size)
    y = t * scale if bias is None else fmaf(t, scale, bias.to(torch.float32))
    return ACTIVATIONS[activation](y).to(output_dtype)


def linear_intx(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int | None = None,
    activation: str = "none",
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """A linear layer on float input, which stays as it is: only the weight is quantized.

    Products and sums are fp32, in the order above. NaN and infinities follow IEEE 754: a NaN makes
    all outputs of its row NaN, and so does an infinity where its weight is 0; other rows are
    untouched.

    Args:
        input: fp32, bf16 or fp16 ``[..., K]``; widened to fp32, which is exact.
        weight: int8 ``[N, K]``, integers of ``bits`` bits.
        weight_scale: fp32 ``[N]``; with ``group_size`` ``[N, ceil(K / group_size)]``.
        weight_zero_point: int8 of weight_scale's shape, integers of ``bits`` bits; or None.
        bias: fp32, bf16 or fp16 ``[N]`` or None; added in fp32.
        bits: 2 to 8.
        group_size: inputs that share a scale, 1 to K; None: one scale per output channel.
        activation: none, relu, gelu, gelu_tanh, silu, tanh, sigmoid, relu6, hardswish, hardsigmoid
            or leaky_relu.
        output_dtype: float32, bfloat16 or float16; by default input's dtype.

    Returns:
        ``[..., N]`` of ``output_dtype``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device, a number, or the activation's name is wrong.

    Example:
        >>> w = torch.tensor([[1, -2, 3, 4]], dtype=torch.int8)
        >>> x = torch.tensor([[0.5, 0.0, 1.0, 1.0]])
        >>> linear_intx(x, w, torch.tensor([[0.5, 2.0]]), bits=4, group_size=2)
        tensor([[14.2500]])
    """
    who = "linear_intx"
    _check_input(who, input)
    check_weight(who, input, weight)
    check_intx(who, weight, weight_scale, weight_zero_point, bits, group_size)
    dtype = input.dtype if output_dtype is None else output_dtype
    _check_output(who, weight, bias, activation, dtype)
    outputs, inputs = weight.shape
    size = inputs if group_size is None else group_size
    groups = -(-inputs // size)
    last = inputs - (groups - 1) * size
    padding = (0, groups * size - inputs)
    x = torch.nn.functional.pad(input.to(torch.float32), padding).unflatten(-1, (1, groups, size))
    w = torch.nn.functional.pad(weight, padding).to(torch.float32).unflatten(-1, (groups, size))
    if weight_zero_point is not None:
        w = w - weight_zero_point.to(torch.float32).reshape(outputs, groups, 1)
    s = torch.zeros((*input.shape[:-1], outputs, groups), device=input.device)
    for i in range(size):  # input i of every group that has so many
        g = slice(0, groups if i < last else groups - 1)
        s[..., g] = fmaf(x[..., g, i], w[:, g, i], s[..., g])
    t = torch.zeros((), device=input.device)
    for group in range(groups):
        t = fmaf(s[..., group], weight_scale.reshape(outputs, groups)[:, group], t)
    y = t if bias is None else t + bias.to(torch.float32)
    return ACTIVATIONS[activation](y).to(dtype)


def check_intx(
    who: str,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bits: int,
    group_size: int | None,
) -> None:
    """Raise unless integers, scales and zero points fit each other."""
    qmin, qmax = _range(who, bits)
    outputs, inputs = weight.shape
    if group_size is not None and not 1 <= group_size <= inputs:
        raise ValueError(
            f"{who}: group_size must be None (one scale per output channel) or between 1 and "
            f"in_features = {inputs}, got {group_size}"
        )
    groups = 1 if group_size is None else -(-inputs // group_size)
    shape = (outputs,) if group_size is None else (outputs, groups)
    given = [("weight_scale", weight_scale, torch.float32)]
    if weight_zero_point is not None:
        given.append(("weight_zero_point", weight_zero_point, torch.int8))
    for name, value, dtype in given:
        require_tensor(who, name, value)
        require_dtype(who, name, value, (dtype,))
        require_device(who, name, value, weight.device)
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{who}: {name} must be {dtype_name(dtype)} {list(shape)}, got {describe(value)}"
            )
    for name, integers in (("weight", weight), ("weight_zero_point", weight_zero_point)):
        if integers is None or not integers.numel():
            continue
        least, most = int(integers.min()), int(integers.max())
        if not (qmin <= least and most <= qmax):
            raise ValueError(
                f"{who}: {name} must be from {qmin} to {qmax} for bits = {bits}, got "
                f"{least if least < qmin else most}"
            )


def _grouped_sums(
    q: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    group_size: int,
) -> Tensor:
    """t of the module's docstring, fp32 ``[..., N]``."""
    t = torch.zeros((), device=q.device)
    for g in range(weight_scale.shape[1]):
        inputs = slice(g * group_size, (g + 1) * group_size)
        zero = torch.zeros(1) if weight_zero_point is None else weight_zero_point[:, g]
        acc = accumulate(q[..., inputs], zero_point, weight[:, inputs], zero.to(q.device))
        t = fmaf(acc.to(torch.float32), weight_scale[:, g], t)
    return t


def _check_input(who: str, input: Tensor) -> None:
    require_dtype(who, "input", input, FLOAT_DTYPES)
    if input.dim() == 0:
        raise ValueError(f"{who}: input must have shape [..., K], got a 0-dimensional tensor")


def _check_output(
    who: str, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype
) -> None:
    check_bias(who, bias, weight.shape[0], weight.device, FLOAT_DTYPES)
    require_activation(who, activation)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{who}: output_dtype must be float32, bfloat16 or float16, got {dtype_name(dtype)}"
        )


def _range(who: str, bits: int) -> tuple[int, int]:
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{who}: bits must be an integer from 2 to 8, got {bits!r}")
    return quant_range(bits)
