"""Choosing scale and zero point from the range of the data.

Symmetric: ``s = max|x| / qmax``, z = 0. Asymmetric: the range is widened to contain 0, so that zero
padding is exact, and ``s = (max - min) / (qmax - qmin)``,
``z = clamp(rint(qmin - min/s), qmin, qmax)``. All in fp32 with true divisions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from torchquant.functional._arithmetic import divide
from torchquant.functional._checks import (
    FLOAT_DTYPES,
    MIN_SCALE,
    describe,
    require_device,
    require_dtype,
    require_range,
)
from torchquant.scheme import (
    PER_TENSOR,
    Granularity,
    PerAxis,
    PerGroup,
    PerTensor,
    PerToken,
    quant_range,
)


def qparams_from_range(
    min: float | Tensor,
    max: float | Tensor,
    *,
    qmin: int,
    qmax: int,
    symmetric: bool,
    preserve_range: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point for real numbers in [min, max].

    Args:
        min, max: fp32 tensors of one shape, or floats (shape ``[1]``).
        qmin, qmax: integer range.
        symmetric: zero point 0, the scale from the greater magnitude and qmax.
        preserve_range: asymmetric only; keep [min, max] as it is instead of widening it to contain
            0. Real 0 may then have no integer: the zero point is clamped to [qmin, qmax].

    Returns:
        ``(scale fp32, zero_point int32)`` of min's shape. The scale is at least 2^-126; a range of
        zero gives scale 1 and zero point 0 (or the nearest allowed); a range that is not finite
        gives scale NaN and that zero point.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; ``preserve_range`` together with
            ``symmetric``; min > max (checked for floats only).

    Example:
        >>> scale, zero_point = qparams_from_range(-1.0, 3.0, qmin=-128, qmax=127, symmetric=False)
        >>> scale, zero_point
        (tensor([0.0157]), tensor([-64], dtype=torch.int32))
    """
    who = "qparams_from_range"
    require_range(who, qmin, qmax)
    least, greatest = _range_tensors(who, min, max)
    if symmetric:
        if preserve_range:
            raise ValueError(
                f"{who}: preserve_range must be False for a symmetric range, got True; "
                "pass symmetric=False with it"
            )
        if qmax <= 0:
            raise ValueError(f"{who}: qmax must be positive for a symmetric range, got {qmax}")
        magnitude = torch.maximum(least.abs(), greatest.abs())
        scale = _finish_scale(magnitude, divide(magnitude, float(qmax)))
        return scale, torch.full_like(scale, _nearest_to_zero(qmin, qmax), dtype=torch.int32)

    if not preserve_range:
        least, greatest = least.clamp(max=0.0), greatest.clamp(min=0.0)
    scale = _scale_from_ends(least, greatest, qmax - qmin)
    zero_point = torch.clamp(torch.round(qmin - divide(least, scale)), qmin, qmax)
    undefined = (greatest == least) | scale.isnan()
    nearest = float(_nearest_to_zero(qmin, qmax))
    return scale, torch.where(undefined, nearest, zero_point).to(torch.int32)


def choose_qparams(
    input: Tensor,
    *,
    bits: int = 8,
    signed: bool = True,
    symmetric: bool = True,
    narrow_range: bool | None = None,
    granularity: Granularity = PER_TENSOR,
    preserve_range: bool = False,
    real_zero_point: Literal["midpoint", "minimum"] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point from the least and greatest element of each group of ``granularity``.

    Args:
        input: fp32, bf16 or fp16 tensor.
        bits, signed, narrow_range: the integer range, see :func:`torchquant.scheme.quant_range`.
            ``narrow_range=None`` means True for 8 bits signed symmetric, otherwise False.
        symmetric: True: zero point 0 (returned as None); False: an integer zero point.
        granularity: which elements share a scale.
        preserve_range: asymmetric only; do not widen the range to contain 0.
        real_zero_point: a real-valued zero point instead of an integer one; ``signed`` and
            ``symmetric`` then follow from it. "midpoint": signed range, zero point
            (max + min) / 2. "minimum": unsigned range, zero point min. With PerTensor, PerAxis (per
            head) or PerToken this is the format of 8-bit key/value caches.

    Returns:
        ``(scale, zero_point)``: fp32 of the shape that ``granularity`` gives; zero point None
        (symmetric), int32 or fp32 (real-valued) of the same shape. A group with NaN or +-inf gets
        scale NaN; one without elements counts as a range of zero.

    Raises:
        TypeError, ValueError: wrong dtype, bits, axis or combination of options.

    Example:
        >>> choose_qparams(torch.tensor([[1.0, -2.54], [0.3, 0.0]]), granularity=PerAxis(0))
        (tensor([0.0200, 0.0024]), None)
        >>> choose_qparams(torch.tensor([-1.0, 3.0]), bits=4, signed=False, symmetric=False)
        (tensor([0.2667]), tensor([4], dtype=torch.int32))
    """
    who = "choose_qparams"
    require_dtype(who, "input", input, FLOAT_DTYPES)
    least, greatest = group_range(who, input, granularity)
    if real_zero_point is not None:
        return _real_qparams(least, greatest, bits, real_zero_point)
    if narrow_range is None:
        narrow_range = bits == 8 and signed and symmetric
    qmin, qmax = quant_range(bits, signed=signed, narrow_range=narrow_range)
    scale, zero_point = qparams_from_range(
        least,
        greatest,
        qmin=qmin,
        qmax=qmax,
        symmetric=symmetric,
        preserve_range=preserve_range,
    )
    return scale, None if symmetric else zero_point


def group_range(who: str, input: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Least and greatest element of each group, as fp32 of the scale's shape; 0 for an empty one.

    NaN is the least and the greatest element of every group that holds one.
    """
    if not isinstance(granularity, (PerTensor, PerAxis, PerGroup, PerToken)):
        raise TypeError(
            f"{who}: granularity must be PerTensor(), PerAxis(axis), PerGroup(group_size) or "
            f"PerToken(), got {describe(granularity)}"
        )
    shape = granularity.scale_shape(input.shape)
    x = input.to(torch.float32)
    if x.numel() == 0:
        return x.new_zeros(shape), x.new_zeros(shape)
    if isinstance(granularity, PerAxis):
        rows = x.movedim(granularity.normalized_axis(x.shape), 0).reshape(shape[0], -1)
    elif isinstance(granularity, PerGroup):
        tail = shape[-1] * granularity.group_size - x.shape[-1]
        # Repeating a tail group's own last element changes neither its least nor its greatest.
        padding = x[..., -1:].expand(*x.shape[:-1], tail)
        rows = torch.cat([x, padding], dim=-1).reshape(*shape, granularity.group_size)
    elif isinstance(granularity, PerToken):
        rows = x.unsqueeze(-2)
    else:
        rows = x.reshape(1, -1)
    return rows.amin(-1), rows.amax(-1)


def _real_qparams(
    least: Tensor, greatest: Tensor, bits: int, kind: Literal["midpoint", "minimum"]
) -> tuple[Tensor, Tensor]:
    if kind not in ("midpoint", "minimum"):
        raise ValueError(
            f"choose_qparams: real_zero_point must be None, 'midpoint' or 'minimum', got {kind!r}"
        )
    qmin, qmax = quant_range(bits, signed=kind == "midpoint")
    scale = _scale_from_ends(least, greatest, qmax - qmin)
    if kind == "minimum":
        return scale, least
    total = greatest + least
    halves = greatest * 0.5 + least * 0.5
    return scale, torch.where(total.isinf(), halves, total * 0.5)


def _scale_from_ends(least: Tensor, greatest: Tensor, steps: int) -> Tensor:
    """``(greatest - least) / steps``, halving both first where the difference overflows."""
    extent = greatest - least
    halved = divide(greatest * 0.5 - least * 0.5, float(steps)) * 2.0
    scale = torch.where(extent.isinf(), halved, divide(extent, float(steps)))
    return _finish_scale(extent, torch.where(least.isfinite() & greatest.isfinite(), scale, extent))


def _finish_scale(extent: Tensor, scale: Tensor) -> Tensor:
    """At least 2^-126; 1 where the extent is zero; NaN where the scale is not finite."""
    scale = torch.where(scale.isinf(), float("nan"), scale.clamp(min=MIN_SCALE))
    return torch.where(extent == 0, 1.0, scale)


def _nearest_to_zero(qmin: int, qmax: int) -> int:
    return sorted((qmin, 0, qmax))[1]


def _range_tensors(who: str, min: float | Tensor, max: float | Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(min, Tensor) and isinstance(max, Tensor):
        require_dtype(who, "min", min, (torch.float32,))
        require_dtype(who, "max", max, (torch.float32,))
        require_device(who, "max", max, min.device)
        if min.shape != max.shape:
            raise ValueError(
                f"{who}: max must have min's shape {list(min.shape)}, got {list(max.shape)}"
            )
        return min, max
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        raise TypeError(
            f"{who}: min and max must both be tensors or both be numbers, "
            f"got {describe(min)} and {describe(max)}"
        )
    if min > max:
        raise ValueError(f"{who}: min must not exceed max, got min = {min}, max = {max}")
    return torch.tensor([min], dtype=torch.float32), torch.tensor([max], dtype=torch.float32)
