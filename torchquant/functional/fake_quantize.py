"""Fake quantization in training: masks, learned steps and their gradients, ranges.

The forward pass is :func:`~torchquant.functional.affine.fake_quantize`. With v = x * (1/s) in fp32
and integers lo = qmin - z, hi = qmax - z:

* straight through (Jacob et al., 2018; torch's rule): the gradient passes where the *rounded* value
  ``rint(v)`` is in [lo, hi];
* learned step (Esser et al., "Learned Step Size Quantization", 2020): it passes where
  ``lo < v < hi`` *before* rounding, and ``dx'/ds = rint(v) - v`` there, qmin below, qmax above;
* learned offset b (Bhalgat et al., "LSQ+", 2020): ``dx'/db`` is 0 inside and 1 outside. It becomes
  the integer ``z = clamp(rint(-b/s), qmin, qmax)``, which can be deployed. Without an offset z is 0
  and qmin, qmax are LSQ's -Qn, Qp; with one, moving s alone moves the range's ends ``qmin*s + b``
  and ``qmax*s + b``, hence qmin and qmax again instead of ``qmin - z`` and ``qmax - z``.

Every decision (which integer, inside or not) is the fp32 one. The values that the gradients are
made of may be wider: with ``dtype=torch.float64`` the functions are the oracle of the kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchquant.functional._arithmetic import divide, reciprocal
from torchquant.functional._checks import (
    FLOAT_DTYPES,
    MIN_SCALE,
    dtype_name,
    require_dtype,
    require_range,
)
from torchquant.functional.affine import _broadcastable, fake_quantize
from torchquant.scheme import PER_TENSOR, Granularity, PerAxis, PerGroup, PerTensor

__all__ = [
    "fake_quantize",
    "fake_quantize_learned",
    "fake_quantize_learned_backward",
    "fake_quantize_mask",
    "in_range",
    "learned_zero_point",
    "mask_gradient",
    "minmax",
    "pack_bits",
    "positive",
    "unpack_bits",
]


def in_range(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor | None = None,
    *,
    qmin: int = -128,
    qmax: int = 127,
    granularity: Granularity = PER_TENSOR,
) -> Tensor:
    """The elements whose rounded value is in [qmin, qmax]: ``fake_quantize`` passes their gradient.

    Args:
        input: fp32, bf16 or fp16 tensor of any shape.
        scale, zero_point, qmin, qmax, granularity: as in :func:`fake_quantize`.

    Returns:
        bool tensor of input's shape; False where input is NaN. :func:`pack_bits` turns it into
        the operators' mask.

    Raises:
        TypeError: wrong dtype of an argument.
        ValueError: wrong shape, device, range, or a number outside its bounds.

    Example:
        >>> in_range(torch.tensor([-9.0, 0.3, 6.36, 6.39]), 0.05)
        tensor([False,  True,  True, False])
    """
    who = "in_range"
    require_dtype(who, "input", input, FLOAT_DTYPES)
    require_range(who, qmin, qmax)
    s, z = _broadcastable(who, input, scale, zero_point, granularity, qmin, qmax)
    x = input.to(torch.float32)
    if z.is_floating_point():
        rounded = torch.round((x - z) * reciprocal(s))
        return (rounded >= qmin) & (rounded <= qmax)
    rounded = torch.round(x * reciprocal(s))
    return (rounded >= (qmin - z).to(torch.float32)) & (rounded <= (qmax - z).to(torch.float32))


def fake_quantize_mask(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor | None = None,
    *,
    qmin: int = -128,
    qmax: int = 127,
    granularity: Granularity = PER_TENSOR,
) -> tuple[Tensor, Tensor]:
    """:func:`fake_quantize`, and :func:`in_range` of the same arguments.

    Args:
        input, scale, zero_point, qmin, qmax, granularity: as in :func:`fake_quantize`.

    Returns:
        ``(output, mask)``.

    Raises:
        TypeError: wrong dtype of an argument.
        ValueError: wrong shape, device, range, or a number outside its bounds.

    Example:
        >>> fake_quantize_mask(torch.tensor([-1.0, 0.26, 9.0]), 0.05, qmin=-8, qmax=7)
        (tensor([-0.4000,  0.2500,  0.3500]), tensor([False,  True, False]))
    """
    options = {"qmin": qmin, "qmax": qmax}
    return (
        fake_quantize(input, scale, zero_point, **options, granularity=granularity),
        in_range(input, scale, zero_point, **options, granularity=granularity),
    )


def positive(input: Tensor) -> Tensor:
    """Where ``input > 0``: where a relu passes its gradient.

    Args:
        input: fp32, bf16 or fp16 tensor of any shape.

    Returns:
        bool tensor of input's shape; False where input is NaN.

    Raises:
        TypeError: ``input`` is not a float tensor.

    Example:
        >>> positive(torch.tensor([1.0, 0.0, -1.0, 2.0]))
        tensor([ True, False, False,  True])
    """
    require_dtype("positive", "input", input, FLOAT_DTYPES)
    return input > 0


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool tensor to one bit per element.

    In contiguous order, element i becomes bit ``i % 8`` of byte ``i // 8``.

    Args:
        mask: bool tensor of any shape.

    Returns:
        uint8 ``[ceil(mask.numel() / 8)]``; the bits after the last element are 0.

    Raises:
        TypeError: ``mask`` is not bool.

    Example:
        >>> pack_bits(torch.tensor([True, False, True, True]))
        tensor([13], dtype=torch.uint8)
    """
    require_dtype("pack_bits", "mask", mask, (torch.bool,))
    flat = mask.reshape(-1)
    padding = flat.new_zeros(-flat.numel() % 8)
    bits = torch.cat([flat, padding]).reshape(-1, 8).to(torch.int32)
    weights = 2 ** torch.arange(8, dtype=torch.int32, device=mask.device)
    return (bits * weights).sum(-1).to(torch.uint8)


def unpack_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Recover the bool tensor of ``shape`` from :func:`pack_bits`'s result.

    Args:
        bits: uint8, eight values in each byte, the first in its lowest bit.
        shape: of the result.

    Returns:
        bool tensor of ``shape``.

    Raises:
        TypeError: ``bits`` is not uint8.
        ValueError: the number of bytes does not fit ``shape``.

    Example:
        >>> unpack_bits(torch.tensor([13], dtype=torch.uint8), (2, 2))
        tensor([[ True, False],
                [ True,  True]])
    """
    who = "unpack_bits"
    require_dtype(who, "bits", bits, (torch.uint8,))
    count = math.prod(shape)
    if tuple(bits.shape) != ((count + 7) // 8,):
        raise ValueError(
            f"{who}: bits must have shape [{(count + 7) // 8}] for {list(shape)}, "
            f"got {list(bits.shape)}"
        )
    each = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> each) & 1).reshape(-1)[:count].reshape(shape).to(torch.bool)


def mask_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    """Keep ``grad`` where ``mask`` is True; +0 elsewhere, even where ``grad`` is NaN.

    Args:
        grad: float tensor.
        mask: bool tensor of its shape.

    Returns:
        Tensor of grad's shape and dtype.

    Example:
        >>> mask_gradient(torch.tensor([1.0, -2.0]), torch.tensor([True, False]))
        tensor([1., 0.])
    """
    return torch.where(mask, grad, torch.zeros_like(grad))


def learned_zero_point(scale: Tensor, offset: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """The integer zero point of a learned offset: ``clamp(rint(-offset / scale), qmin, qmax)``.

    Args:
        scale: fp32 tensor; below 2^-126 it counts as that.
        offset: fp32 tensor of scale's shape, in input's units, or None (0).

    Returns:
        int32 tensor of scale's shape; 0, clamped, where ``offset / scale`` is NaN.

    Raises:
        TypeError: an argument is not float32.
        ValueError: the shapes differ, or ``qmin >= qmax``.

    Example:
        >>> learned_zero_point(torch.tensor([0.5]), torch.tensor([1.3]), -8, 7)
        tensor([-3], dtype=torch.int32)
    """
    who = "learned_zero_point"
    require_dtype(who, "scale", scale, (torch.float32,))
    require_range(who, qmin, qmax)
    if offset is None:
        return torch.zeros_like(scale, dtype=torch.int32)
    require_dtype(who, "offset", offset, (torch.float32,))
    if offset.shape != scale.shape:
        raise ValueError(
            f"{who}: offset must have scale's shape {list(scale.shape)}, got {list(offset.shape)}"
        )
    zero = torch.round(divide(-offset.detach(), _used_scale(scale.detach())))
    return zero.nan_to_num(nan=0.0).clamp(qmin, qmax).to(torch.int32)


def fake_quantize_learned(
    input: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    qmin: int = -128,
    qmax: int = 127,
    grad_factor: float = 1.0,
    granularity: Granularity = PER_TENSOR,
) -> Tensor:
    """:func:`fake_quantize` with a learned step and, if given, a learned offset.

    Args:
        input: fp32, bf16 or fp16 tensor of any shape.
        scale: fp32 tensor of granularity's shape. Below 2^-126 it counts as that: a step that an
            optimizer drove to zero or below is not an error. NaN gives NaN.
        offset: fp32 tensor of scale's shape: minus the real number that ``zero_point``
            represents (see :func:`learned_zero_point`). NaN gives NaN.
        qmin, qmax, granularity: as in :func:`fake_quantize`.
        grad_factor: multiplies the gradients of scale and offset; the result does not depend on it.

    Returns:
        Tensor of input's shape and dtype. No gradient: see :func:`fake_quantize_learned_backward`.

    Raises:
        TypeError: wrong dtype of an argument.
        ValueError: wrong shape, device or range.

    Example:
        >>> x, step = torch.tensor([-1.0, 0.26, 9.0]), torch.tensor([0.5])
        >>> fake_quantize_learned(x, step, qmin=0, qmax=7)
        tensor([0.0000, 0.5000, 3.5000])
    """
    who = "fake_quantize_learned"
    require_dtype(who, "scale", scale, (torch.float32,))
    zero_point = learned_zero_point(scale, offset, qmin, qmax)
    s = _used_scale(scale.detach())
    if offset is not None:
        s = torch.where((offset.detach() / s).isnan(), torch.nan, s)
    return fake_quantize(
        input.detach(), s, zero_point, qmin=qmin, qmax=qmax, granularity=granularity
    )


def fake_quantize_learned_backward(
    grad: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    qmin: int = -128,
    qmax: int = 127,
    granularity: Granularity = PER_TENSOR,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`fake_quantize_learned`, without LSQ's gradient factor.

    Args:
        grad: the result's gradient, of input's shape; any float type.
        input, scale, qmin, qmax, granularity: as in :func:`fake_quantize_learned`.
        zero_point: int32 tensor of scale's shape (:func:`learned_zero_point`), or None.
        dtype: of values and sums; which integers result, and which are inside, is decided in fp32.

    Returns:
        ``(grad_input, grad_scale, grad_offset)``: grad's shape and dtype, +0 outside the range;
        ``dtype`` and scale's shape. The order of the sums is not promised: the kernels' sums
        differ by rounding.

    Raises:
        TypeError: wrong dtype of an argument.
        ValueError: wrong shape, device or range.

    Example:
        >>> x, s = torch.tensor([-1.0, 0.3, 9.0]), torch.tensor([0.5])
        >>> fake_quantize_learned_backward(torch.ones(3), x, s, qmin=0, qmax=7)
        (tensor([0., 1., 0.]), tensor([7.4000]), tensor([2.]))
    """
    who = "fake_quantize_learned_backward"
    require_dtype(who, "input", input, FLOAT_DTYPES)
    require_dtype(who, "grad", grad, (*FLOAT_DTYPES, torch.float64))
    require_dtype(who, "scale", scale, (torch.float32,))
    require_range(who, qmin, qmax)
    if grad.shape != input.shape:
        raise ValueError(
            f"{who}: grad must have input's shape {list(input.shape)}, got {list(grad.shape)}"
        )
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{who}: dtype must be float32 or float64, got {dtype_name(dtype)}")
    used = _used_scale(scale)
    s, z = _broadcastable(who, input, used, zero_point, granularity, qmin, qmax)
    if z.is_floating_point():
        raise TypeError(f"{who}: zero_point must be int32, got {dtype_name(z.dtype)}")
    x = input.to(torch.float32)
    v = x * reciprocal(s)
    low, high = (qmin - z).to(torch.float32), (qmax - z).to(torch.float32)
    inside = (low < v) & (v < high)
    steps = torch.clamp(torch.round(v), low, high)

    wide = grad.to(dtype)
    slope = torch.where(inside, steps.to(dtype) - x.to(dtype) / s.to(dtype), steps.to(dtype) + z)
    outside = mask_gradient(wide, ~inside)
    return (
        mask_gradient(grad, inside),
        _sum_by_scale(wide * slope, scale, granularity),
        _sum_by_scale(outside, scale, granularity),
    )


def minmax(
    input: Tensor, *, granularity: Granularity = PER_TENSOR
) -> tuple[Tensor, Tensor, Tensor]:
    """Least and greatest finite element for each scale, and how many elements are not finite.

    Args:
        input: fp32, bf16 or fp16 tensor of any shape.
        granularity: which elements share a scale.

    Returns:
        ``(least, greatest, nonfinite)``: fp32 of the shape of granularity's scales, +inf and -inf
        where there is no finite element, a zero always +0; int64 ``[1]``.

    Raises:
        TypeError: wrong dtype of an argument.
        ValueError: the input has no such axis.

    Example:
        >>> minmax(torch.tensor([1.0, -2.0, float("nan")]))
        (tensor([-2.]), tensor([1.]), tensor([1]))
    """
    who = "minmax"
    require_dtype(who, "input", input, FLOAT_DTYPES)
    shape = granularity.scale_shape(input.shape)
    x = input.to(torch.float32)
    finite = x.isfinite()
    inf = torch.full((), math.inf, device=x.device)
    ends = []
    for neutral, reduce in ((inf, "amin"), (-inf, "amax")):
        parts = _parts(torch.where(finite, x, neutral), shape, granularity, float(neutral))
        # One more neutral element: a part without elements reduces to it.
        parts = torch.cat([parts, neutral.expand(len(parts), 1)], dim=1)
        ends.append(getattr(parts, reduce)(1).reshape(shape) + 0.0)
    return ends[0], ends[1], (~finite).sum().reshape(1)


def _used_scale(scale: Tensor) -> Tensor:
    """At least 2^-126; NaN stays."""
    return torch.where(scale < MIN_SCALE, MIN_SCALE, scale)


def _sum_by_scale(values: Tensor, scale: Tensor, granularity: Granularity) -> Tensor:
    return _parts(values, tuple(scale.shape), granularity, 0.0).sum(1).reshape(scale.shape)


def _parts(
    values: Tensor, shape: tuple[int, ...], granularity: Granularity, padding: float
) -> Tensor:
    """``[number of scales, elements]``: a row for each scale, groups filled up with ``padding``."""
    scales = math.prod(shape)
    if isinstance(granularity, PerTensor):
        return values.reshape(1, -1)
    if isinstance(granularity, PerAxis):
        moved = values.movedim(granularity.normalized_axis(values.shape), 0)
        return moved.reshape(scales, -1) if values.numel() else values.new_empty(scales, 0)
    if isinstance(granularity, PerGroup):
        missing = -values.shape[-1] % granularity.group_size
        wide = torch.nn.functional.pad(values, (0, missing), value=padding)
        return wide.reshape(scales, -1) if values.numel() else values.new_empty(scales, 0)
    return values.reshape(scales, -1) if values.numel() else values.new_empty(scales, 0)
