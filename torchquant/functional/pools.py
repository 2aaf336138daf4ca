"""Pools of int8 images ``[N, C, H, W]`` or sequences ``[N, C, L]``; averages of floats.

A maximum is one of the window's integers. An average is an exact integer sum over the window, one
product, and ``quantize`` to the result's own scale (or, without ``output_scale``, fp32)::

    S = sum of (q - zero_point)            elements of the padding add nothing
    y = fl(float(S) * fl(scale * fl(1 / count)))

Windows, their number and ``count`` are those of torch's pools. The sum of a window of floats has a
fixed order, so that it has the same bits everywhere: each column from top to bottom, then the sums
of the columns from left to right, and then one product with ``fl(1 / count)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from torchquant.functional._arithmetic import reciprocal
from torchquant.functional._checks import require_dtype, scale_tensor, zero_point_tensor
from torchquant.functional.images import result

_Sizes = int | Sequence[int]


def int8_max_pool(
    input: Tensor,
    kernel_size: _Sizes,
    stride: _Sizes | None = None,
    padding: _Sizes = 0,
    dilation: _Sizes = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """The greatest integer of each window; padding never wins. The scale stays the input's.

    Args:
        input: int8 ``[N, C, H, W]`` or ``[N, C, L]``.
        kernel_size, stride, padding, dilation: an int, or one for each spatial dimension; the
            stride is ``kernel_size`` by default.
        ceil_mode: as in ``torch.nn.functional.max_pool2d``.

    Returns:
        int8 ``[N, C, H', W']`` or ``[N, C, L']``; -128 for a window that has no element (only with
        a dilation).

    Raises:
        TypeError: ``input`` is not int8.
        ValueError: a wrong number of dimensions or sizes.

    Example:
        >>> q = torch.tensor([[[[1, -5], [-7, 3]]]], dtype=torch.int8)
        >>> int8_max_pool(q, 2, 1, 1)[0, 0].tolist()
        [[1, 1, -5], [1, 3, 3], [-7, 3, 3]]
    """
    who = "int8_max_pool"
    dims = _spatial(who, input)
    kernel = _sizes(who, "kernel_size", kernel_size, dims)
    steps = kernel if stride is None else _sizes(who, "stride", stride, dims)
    pads, gaps = _sizes(who, "padding", padding, dims), _sizes(who, "dilation", dilation, dims)
    pool = F.max_pool2d if dims == 2 else F.max_pool1d
    pooled = pool(input.to(torch.float32), kernel, steps, pads, gaps, ceil_mode)
    return pooled.clamp(min=-128).to(torch.int8)


def int8_avg_pool(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor | None,
    kernel_size: _Sizes,
    stride: _Sizes | None = None,
    padding: _Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    output_scale: float | Tensor | None = None,
    output_zero_point: int = 0,
    output_qmin: int = -128,
    output_qmax: int = 127,
) -> Tensor:
    """The average of each window.

    Args:
        input: int8 ``[N, C, H, W]`` or ``[N, C, L]``.
        scale, zero_point: of the input, per tensor.
        kernel_size, stride, padding, ceil_mode: as in :func:`int8_max_pool`.
        count_include_pad: whether elements of the padding count.
        divisor_override: the count of every window, if given.
        output_scale, output_zero_point, output_qmin, output_qmax: of the int8 result; without
            ``output_scale`` the result is float32.

    Returns:
        int8 or float32 ``[N, C, H', W']`` or ``[N, C, L']``.

    Raises:
        TypeError: ``input`` is not int8, or a scale or zero point has a wrong type.
        ValueError: a wrong number of dimensions or sizes, or a number outside its bounds.

    Example:
        >>> q = torch.tensor([[[[1, -5], [-7, 3]]]], dtype=torch.int8)
        >>> int8_avg_pool(q, 0.5, -1, 2, output_scale=0.25).item()  # a mean of -2, above -1 by -1
        -2
    """
    who = "int8_avg_pool"
    dims = _spatial(who, input)
    kernel = _sizes(who, "kernel_size", kernel_size, dims)
    steps = kernel if stride is None else _sizes(who, "stride", stride, dims)
    pads = _sizes(who, "padding", padding, dims)
    s, values = _values(who, input, scale, zero_point)
    if dims == 1:
        values, kernel, steps, pads = values.unsqueeze(2), [1, *kernel], [1, *steps], [0, *pads]
    # In float64 every sum is exact.
    sums = F.avg_pool2d(values, kernel, steps, pads, ceil_mode, divisor_override=1)
    count = _counts(
        values, sums, kernel, steps, pads, ceil_mode, count_include_pad, divisor_override
    )
    y = _averages(sums, s, count)
    y = y.squeeze(2) if dims == 1 else y
    return result(y, output_scale, output_zero_point, output_qmin, output_qmax)


def int8_adaptive_avg_pool(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor | None,
    output_size: int | Sequence[int | None] | None,
    *,
    output_scale: float | Tensor | None = None,
    output_zero_point: int = 0,
    output_qmin: int = -128,
    output_qmax: int = 127,
) -> Tensor:
    """Averages over windows that divide the input into ``output_size`` parts.

    Args:
        input: int8 ``[N, C, H, W]`` or ``[N, C, L]``.
        scale, zero_point: of the input, per tensor.
        output_size: an int, or one for each spatial dimension; None keeps the input's size.
        output_scale, output_zero_point, output_qmin, output_qmax: as in :func:`int8_avg_pool`.

    Returns:
        int8 or float32 ``[N, C, *output_size]``.

    Raises:
        TypeError: ``input`` is not int8, or a scale or zero point has a wrong type.
        ValueError: a wrong number of dimensions or sizes, or a number outside its bounds.

    Example:
        >>> q = torch.tensor([[[[1, -5], [-7, 3]]]], dtype=torch.int8)
        >>> int8_adaptive_avg_pool(q, 0.5, -1, (1, None))[0, 0].tolist()
        [[-1.0, 0.0]]
    """
    who = "int8_adaptive_avg_pool"
    dims = _spatial(who, input)
    sizes = _adaptive_sizes(who, output_size, dims)
    s, values = _values(who, input, scale, zero_point)
    count = torch.ones((), dtype=torch.float64, device=input.device)
    for dim, size in zip(range(2, 2 + dims), sizes, strict=True):
        windows = _adaptive_windows(input.shape[dim], size)
        parts = [values.narrow(dim, a, b - a).sum(dim, keepdim=True) for a, b in windows]
        values = torch.cat(parts, dim)
        widths = torch.tensor([b - a for a, b in windows], dtype=torch.float64)
        count = count.unsqueeze(-1) * widths.to(input.device)
    y = _averages(values, s, count)
    return result(y, output_scale, output_zero_point, output_qmin, output_qmax)


def float_avg_pool(
    input: Tensor,
    kernel_size: _Sizes,
    stride: _Sizes | None = None,
    padding: _Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The average of each window of floats, summed in the order that the module states.

    Args:
        input: float32 ``[N, C, H, W]`` or ``[N, C, L]``.
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override: as in
            :func:`int8_avg_pool`.

    Returns:
        float32 ``[N, C, H', W']`` or ``[N, C, L']``.

    Raises:
        TypeError: ``input`` is not float32.
        ValueError: a wrong number of dimensions or sizes.

    Example:
        >>> float_avg_pool(torch.tensor([[[[1.0, 2.0], [4.0, 5.0]]]]), 2).item()
        3.0
    """
    who = "float_avg_pool"
    dims = _spatial(who, input, torch.float32)
    kernel = _sizes(who, "kernel_size", kernel_size, dims)
    steps = kernel if stride is None else _sizes(who, "stride", stride, dims)
    pads = _sizes(who, "padding", padding, dims)
    x = input
    if dims == 1:
        x, kernel, steps, pads = x.unsqueeze(2), [1, *kernel], [1, *steps], [0, *pads]
    sizes = F.avg_pool2d(x, kernel, steps, pads, ceil_mode, divisor_override=1)
    count = _counts(x, sizes, kernel, steps, pads, ceil_mode, count_include_pad, divisor_override)
    height, width = sizes.shape[2:]
    x = F.pad(x, (pads[1], pads[1] + kernel[1] + steps[1], pads[0], pads[0] + kernel[0] + steps[0]))
    total = torch.zeros_like(sizes)
    for column in range(kernel[1]):
        part = torch.zeros_like(sizes)
        for row in range(kernel[0]):
            taps = x[:, :, row :: steps[0], column :: steps[1]]
            part = part + taps[:, :, :height, :width]
        total = total + part
    y: Tensor = total * reciprocal(count.to(torch.float32))
    return y.squeeze(2) if dims == 1 else y


def float_adaptive_avg_pool(
    input: Tensor, output_size: int | Sequence[int | None] | None
) -> Tensor:
    """Averages of floats over windows that divide the input into ``output_size`` parts.

    Args:
        input: float32 ``[N, C, H, W]`` or ``[N, C, L]``.
        output_size: as in :func:`int8_adaptive_avg_pool`.

    Returns:
        float32 ``[N, C, *output_size]``.

    Raises:
        TypeError: ``input`` is not float32.
        ValueError: a wrong number of dimensions or sizes.

    Example:
        >>> float_adaptive_avg_pool(torch.tensor([[[[1.0, 2.0], [4.0, 5.0]]]]), (1, None))[0, 0]
        tensor([[2.5000, 3.5000]])
    """
    who = "float_adaptive_avg_pool"
    dims = _spatial(who, input, torch.float32)
    x = input if dims == 2 else input.unsqueeze(2)
    sizes = [None, *_adaptive_sizes(who, output_size, dims)][-2:]
    rows, columns = (_adaptive_windows(x.shape[2 + i], size) for i, size in enumerate(sizes))
    found = []
    for top, bottom in rows:
        sums = torch.zeros_like(x[:, :, 0])
        for row in range(top, bottom):
            sums = sums + x[:, :, row]
        for left, right in columns:
            total = torch.zeros_like(sums[..., 0])
            for column in range(left, right):
                total = total + sums[..., column]
            count = torch.full_like(total[:1, :1], (bottom - top) * (right - left))
            found.append(total * reciprocal(count))
    y: Tensor = torch.stack(found, -1).unflatten(-1, (len(rows), len(columns)))
    return y if dims == 2 else y.squeeze(2)


def int8_upsample_nearest(
    input: Tensor,
    size: _Sizes | None = None,
    scale_factor: float | Sequence[float] | None = None,
) -> Tensor:
    """Repeat pixels, as ``torch.nn.functional.interpolate(mode="nearest")``; the scale stays.

    Args:
        input: int8 ``[N, C, H, W]`` or ``[N, C, L]``.
        size, scale_factor: one of the two, as in torch.

    Returns:
        int8 ``[N, C, H', W']`` or ``[N, C, L']``.

    Raises:
        TypeError: ``input`` is not int8.
        ValueError: a wrong number of dimensions or sizes.

    Example:
        >>> q = torch.tensor([[[1, -5]]], dtype=torch.int8)
        >>> int8_upsample_nearest(q, scale_factor=2)[0, 0].tolist()
        [1, 1, -5, -5]
    """
    _spatial("int8_upsample_nearest", input)
    target = size if size is None or isinstance(size, int) else list(size)
    factor = scale_factor if not isinstance(scale_factor, Sequence) else list(scale_factor)
    whole = F.interpolate(input.to(torch.float32), target, factor, mode="nearest")
    return whole.to(torch.int8)


def _adaptive_sizes(
    who: str, output_size: int | Sequence[int | None] | None, dims: int
) -> list[int | None]:
    if output_size is None or isinstance(output_size, int):
        return [output_size] * dims
    if len(output_size) != dims:
        raise ValueError(f"{who}: output_size must have {dims} entries, got {output_size!r}")
    return list(output_size)


def _adaptive_windows(length: int, size: int | None) -> list[tuple[int, int]]:
    """Where each window begins and ends; None is one window for each element."""
    out = length if size is None else size
    return [(i * length // out, -(-(i + 1) * length // out)) for i in range(out)]


def _spatial(who: str, input: Tensor, dtype: torch.dtype = torch.int8) -> int:
    """The number of spatial dimensions, 1 or 2."""
    require_dtype(who, "input", input, (dtype,))
    if input.dim() not in (3, 4):
        raise ValueError(
            f"{who}: input must have shape [N, C, H, W] or [N, C, L], got {list(input.shape)}"
        )
    return input.dim() - 2


def _sizes(who: str, name: str, value: _Sizes, dims: int) -> list[int]:
    sizes = [value] * dims if isinstance(value, int) else list(value)
    if len(sizes) != dims:
        raise ValueError(f"{who}: {name} must be an int or {dims} ints, got {value!r}")
    return sizes


def _values(
    who: str, input: Tensor, scale: float | Tensor, zero_point: int | Tensor | None
) -> tuple[Tensor, Tensor]:
    """The scale as a tensor, and ``q - zero_point`` in float64."""
    s = scale_tensor(who, "scale", scale, input.device, (1,))
    z = zero_point_tensor(who, "zero_point", zero_point, input.device, -128, 127, (1,))
    return s, (input.to(torch.int32) - z).to(torch.float64)


def _averages(sums: Tensor, scale: Tensor, count: Tensor) -> Tensor:
    return sums.to(torch.float32) * (scale * reciprocal(count.to(torch.float32)))


def _counts(
    values: Tensor,
    sums: Tensor,
    kernel: list[int],
    stride: list[int],
    pad: list[int],
    ceil_mode: bool,
    include_pad: bool,
    divisor: int | None,
) -> Tensor:
    """What each sum is divided by."""
    if divisor is not None:
        return torch.full_like(sums, divisor)
    if include_pad:
        rows = _counted(0, values, sums, kernel, stride, pad)[:, None]
        return rows * _counted(1, values, sums, kernel, stride, pad)
    ones = torch.ones_like(values)
    return F.avg_pool2d(ones, kernel, stride, pad, ceil_mode, divisor_override=1)


def _counted(
    dim: int, values: Tensor, sums: Tensor, kernel: list[int], stride: list[int], pad: list[int]
) -> Tensor:
    """How many elements each window has along a dimension, those of the padding included."""
    starts = torch.arange(sums.shape[dim + 2], device=values.device) * stride[dim] - pad[dim]
    ends = (starts + kernel[dim]).clamp(max=values.shape[dim + 2] + pad[dim])
    return (ends - starts).to(torch.float64)
