"""Sums, products, functions and concatenations of int8 tensors, between convolutions.

An int8 tensor stands for real numbers, ``deq(q) = fl(float(q - zero_point) * scale)``. Every step
computes in fp32 from them, with one rounding for each operation, and ends with ``quantize`` to the
result's own scale (or, without ``output_scale``, with the fp32 numbers themselves)::

    add   y = activation(fl(deq(a) + deq(b)))
    mul   y = activation(fl(deq(a) * deq(b)))
    map   y = activation(deq(a))                 as a table of 256 entries
    affine  y = activation(fmaf(deq(a), gain[c], shift[c])), one number for each channel
    concat: each part by itself, y = deq(part)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchquant.functional._arithmetic import fmaf
from torchquant.functional._checks import describe, require_device, require_dtype, require_tensor
from torchquant.functional.activations import ACTIVATIONS, require_activation
from torchquant.functional.affine import dequantize, quantize


def int8_add(
    left: Tensor,
    left_scale: float | Tensor,
    left_zero_point: int | Tensor | None,
    right: Tensor,
    right_scale: float | Tensor,
    right_zero_point: int | Tensor | None,
    *,
    activation: str = "none",
    output_scale: float | Tensor | None = None,
    output_zero_point: int = 0,
    output_qmin: int = -128,
    output_qmax: int = 127,
) -> Tensor:
    """``activation(deq(left) + deq(right))``: the sum of a residual connection.

    Args:
        left, right: int8 of one shape.
        left_scale, left_zero_point, right_scale, right_zero_point: of the two, per tensor.
        activation: "none" or a name in :data:`torchquant.functional.ACTIVATIONS`.
        output_scale, output_zero_point, output_qmin, output_qmax: of the int8 result; without
            ``output_scale`` the result is float32.

    Returns:
        int8 or float32 of the same shape.

    Raises:
        TypeError: a tensor is not int8, or a scale or zero point has a wrong type.
        ValueError: the shapes or devices differ, a number is outside its bounds, or no activation
            has that name.

    Example:
        >>> q = torch.tensor([10, -4], dtype=torch.int8)
        >>> int8_add(q, 0.5, 0, q, 0.25, 2, activation="relu", output_scale=0.1)
        tensor([70,  0], dtype=torch.int8)
    """
    who = "int8_add"
    a, b = _pair(who, left, left_scale, left_zero_point, right, right_scale, right_zero_point)
    if right.shape != left.shape:
        raise ValueError(
            f"{who}: right must have left's shape {list(left.shape)}, got {describe(right)}"
        )
    require_activation(who, activation)
    y = ACTIVATIONS[activation](a + b)
    return result(y, output_scale, output_zero_point, output_qmin, output_qmax)


def int8_mul(
    left: Tensor,
    left_scale: float | Tensor,
    left_zero_point: int | Tensor | None,
    right: Tensor,
    right_scale: float | Tensor,
    right_zero_point: int | Tensor | None,
    *,
    activation: str = "none",
    output_scale: float | Tensor | None = None,
    output_zero_point: int = 0,
    output_qmin: int = -128,
    output_qmax: int = 127,
) -> Tensor:
    """``activation(deq(left) * deq(right))``: a gate, for instance that of squeeze-and-excitation.

    Args:
        left: int8 of any shape.
        right: int8 of left's shape, or of a shape that broadcasts to it (``[N, C, 1, 1]``).
        left_scale, left_zero_point, right_scale, right_zero_point: of the two, per tensor.
        activation, output_scale, output_zero_point, output_qmin, output_qmax: as in
            :func:`int8_add`.

    Returns:
        int8 or float32 of left's shape.

    Raises:
        TypeError: a tensor is not int8, or a scale or zero point has a wrong type.
        ValueError: right does not broadcast to left's shape, the devices differ, a number is
            outside its bounds, or no activation has that name.

    Example:
        >>> q = torch.tensor([10, -4], dtype=torch.int8)
        >>> int8_mul(q, 0.5, 0, q, 0.25, 2, output_scale=0.5)
        tensor([20,  6], dtype=torch.int8)
    """
    who = "int8_mul"
    a, b = _pair(who, left, left_scale, left_zero_point, right, right_scale, right_zero_point)
    if not _broadcasts(right, left):
        raise ValueError(
            f"{who}: right must broadcast to left's shape {list(left.shape)}, got {describe(right)}"
        )
    require_activation(who, activation)
    y = ACTIVATIONS[activation](a * b)
    return result(y, output_scale, output_zero_point, output_qmin, output_qmax)


def channel_affine(input: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
    """``fmaf(input, gain[c], shift[c])``: a batch norm in evaluation, one rounding.

    Args:
        input: float32 ``[N, C, ...]``.
        gain: float32 ``[C]``; with None the result is ``fl(input + shift[c])``.
        shift: float32 ``[C]``; with None the result is ``fl(input * gain[c])``.

    Returns:
        float32 of input's shape.

    Raises:
        TypeError: a tensor is not float32.
        ValueError: gain or shift does not have one number for each channel.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> channel_affine(x, torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.0]))
        tensor([[2.5000, 2.0000],
                [6.5000, 4.0000]])
    """
    who = "channel_affine"
    require_dtype(who, "input", input, (torch.float32,))
    shape = (1, -1, *[1] * (input.dim() - 2))
    for name, numbers in (("gain", gain), ("shift", shift)):
        if numbers is None:
            continue
        require_dtype(who, name, numbers, (torch.float32,))
        if numbers.shape != input.shape[1:2]:
            raise ValueError(
                f"{who}: {name} must have one number for each channel of input "
                f"{list(input.shape)}, got {describe(numbers)}"
            )
    if gain is None:
        return input if shift is None else input + shift.view(shape)
    if shift is None:
        return input * gain.view(shape)
    return fmaf(input, gain.view(shape), shift.view(shape))


def norm_as_affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Gain and shift with which :func:`channel_affine` computes a batch norm in evaluation.

    In float64, each rounded to float32 once: ``gain = weight / sqrt(var + eps)`` and
    ``shift = bias - mean * gain``.

    Args:
        mean, var: the statistics, float ``[C]``.
        weight, bias: float ``[C]`` or None.
        eps: the summand of the variance.

    Returns:
        float32 ``[C]``, twice.

    Raises:
        AttributeError: a statistic is no tensor.

    Example:
        >>> one = torch.ones(1)
        >>> norm_as_affine(one, 3 * one, 4 * one, None, 1.0)
        (tensor([2.]), tensor([-2.]))
    """
    root = torch.sqrt(var.to(torch.float64) + eps)
    gain = (1.0 if weight is None else weight.to(torch.float64)) / root
    shift = (0.0 if bias is None else bias.to(torch.float64)) - mean.to(torch.float64) * gain
    return gain.to(torch.float32), shift.to(torch.float32)


def int8_table(
    scale: float | Tensor,
    zero_point: int | Tensor | None = None,
    *,
    activation: str = "none",
    output_scale: float | Tensor | None = None,
    output_zero_point: int = 0,
    output_qmin: int = -128,
    output_qmax: int = 127,
) -> Tensor:
    """A function of one int8 value as a table: entry ``q + 128`` is the result for q.

    Args:
        scale, zero_point: of the argument.
        activation: the function; none only changes the scale.
        output_scale, output_zero_point, output_qmin, output_qmax: as in :func:`int8_add`.

    Returns:
        int8 or float32 ``[256]``.

    Raises:
        TypeError: a scale or zero point has a wrong type.
        ValueError: a number is outside its bounds, or no activation has that name.

    Example:
        >>> table = int8_table(0.5, activation="relu", output_scale=0.25)
        >>> int8_map(torch.tensor([-3, 0, 7], dtype=torch.int8), table)
        tensor([ 0,  0, 14], dtype=torch.int8)
    """
    who = "int8_table"
    require_activation(who, activation)
    device = scale.device if isinstance(scale, Tensor) else None
    every = torch.arange(-128, 128, dtype=torch.int8, device=device)
    y = ACTIVATIONS[activation](dequantize(every, scale, zero_point))
    return result(y, output_scale, output_zero_point, output_qmin, output_qmax)


def int8_map(input: Tensor, table: Tensor) -> Tensor:
    """``table[input + 128]``, element by element.

    Args:
        input: int8 of any shape.
        table: int8 or float32 ``[256]``, see :func:`int8_table`.

    Returns:
        Of input's shape and table's dtype.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: the table does not have 256 entries, or the devices differ.

    Example:
        >>> table = torch.arange(-128, 128).neg().clamp(max=127).to(torch.int8)
        >>> int8_map(torch.tensor([-128, -1, 5], dtype=torch.int8), table)
        tensor([127,   1,  -5], dtype=torch.int8)
    """
    who = "int8_map"
    require_dtype(who, "input", input, (torch.int8,))
    require_dtype(who, "table", table, (torch.int8, torch.float32))
    require_device(who, "table", table, input.device)
    if table.shape != (256,):
        raise ValueError(f"{who}: table must have shape [256], got {list(table.shape)}")
    return table[input.to(torch.int64) + 128]


def int8_concat(
    inputs: Sequence[Tensor],
    scales: Sequence[float | Tensor],
    zero_points: Sequence[int | Tensor | None],
    *,
    output_scale: float | Tensor | None = None,
    output_zero_point: int = 0,
    output_qmin: int = -128,
    output_qmax: int = 127,
) -> Tensor:
    """Concatenate along the channels; each part is quantized anew, to the result's scale.

    Args:
        inputs: int8 ``[N, C_i, ...]``, equal but for C_i.
        scales, zero_points: one for each input.
        output_scale, output_zero_point, output_qmin, output_qmax: as in :func:`int8_add`.

    Returns:
        int8 or float32 ``[N, sum of C_i, ...]``.

    Raises:
        TypeError: an input is not int8, or a scale or zero point has a wrong type.
        ValueError: the numbers of inputs, scales and zero points differ, or a number is outside its
            bounds.

    Example:
        >>> q = torch.tensor([[10, -4]], dtype=torch.int8)
        >>> int8_concat([q, q], [0.5, 0.25], [0, 2], output_scale=0.5)
        tensor([[10, -4,  4, -3]], dtype=torch.int8)
    """
    who = "int8_concat"
    if not len(inputs) == len(scales) == len(zero_points) > 0:
        raise ValueError(
            f"{who}: inputs, scales and zero_points must have one entry for each input, got "
            f"{len(inputs)}, {len(scales)} and {len(zero_points)}"
        )
    for index, part in enumerate(inputs):
        require_dtype(who, f"inputs[{index}]", part, (torch.int8,))
    parts = map(dequantize, inputs, scales, zero_points)
    quantized = [
        result(part, output_scale, output_zero_point, output_qmin, output_qmax) for part in parts
    ]
    return torch.cat(quantized, dim=1)


def result(
    y: Tensor, scale: float | Tensor | None, zero_point: int, qmin: int, qmax: int
) -> Tensor:
    """``y`` quantized to int8, or ``y`` itself where there is no scale."""
    if scale is None:
        return y
    return quantize(y, scale, zero_point, qmin=qmin, qmax=qmax, dtype=torch.int8)


def _pair(
    who: str,
    left: Tensor,
    left_scale: float | Tensor,
    left_zero_point: int | Tensor | None,
    right: Tensor,
    right_scale: float | Tensor,
    right_zero_point: int | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The real numbers of both sides."""
    for name, side in (("left", left), ("right", right)):
        require_tensor(who, name, side)
        require_dtype(who, name, side, (torch.int8,))
    require_device(who, "right", right, left.device, "left")
    a = dequantize(left, left_scale, left_zero_point)
    return a, dequantize(right, right_scale, right_zero_point)


def _broadcasts(small: Tensor, large: Tensor) -> bool:
    sizes = zip(reversed(small.shape), reversed(large.shape), strict=False)
    return small.dim() <= large.dim() and all(s in (1, size) for s, size in sizes)
