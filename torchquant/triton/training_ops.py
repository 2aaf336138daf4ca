"""Operators of training, of affine quantization and of what runs element by element, in Triton.

The functions have the operators' signatures (csrc/ops.cpp). Where a call is not covered, or is an
error, they return ``NotImplemented``: the ATen fallback does it, or says what is wrong. Values
inside tensors are never read on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchquant.triton import fake_quantize as kernels
from torchquant.triton import tiles
from torchquant.triton.launch import launch, next_power_of_2
from torchquant.triton.tiles import Spans, Tiles, spans_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LIMIT = 2**22  # so far fp32 holds differences of integers exactly
_SMALL = 2**20  # qmin - zero_point stays below 2^22 for zero points within the range
_STEP = 1024  # elements that a program of a second step takes at once


def fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Any:
    result = _fake_quantize(input, scale, zero_point, qmin, qmax, axis, group_size, bits=False)
    return result if result is NotImplemented else result[0]


def fake_quantize_mask(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Any:
    return _fake_quantize(input, scale, zero_point, qmin, qmax, axis, group_size)


def in_range(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Any:
    result = _fake_quantize(input, scale, zero_point, qmin, qmax, axis, group_size, out=False)
    return result if result is NotImplemented else result[1]


def fake_quantize_learned(
    input: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    qmin: int,
    qmax: int,
    grad_factor: float,
    axis: int | None = None,
    group_size: int | None = None,
) -> Any:
    spans = _scaled(input, scale, axis, group_size)
    if spans is None or not _is_range(qmin, qmax) or not _like_scale(offset, scale, torch.float32):
        return NotImplemented
    tiling = tiles.tiles_of(spans)
    assert tiling is not None
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    zero = "none" if offset is None else "offset"
    _run_fake_quantize(tiling, input, scale, offset, zero, qmin, qmax, out, None, learned=True)
    return out


def fake_quantize_learned_backward(
    grad: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Any:
    spans = _scaled(input, scale, axis, group_size)
    if (
        spans is None
        or not _is_range(qmin, qmax)
        or not _like_scale(zero_point, scale, torch.int32)
    ):
        return NotImplemented
    if grad.dtype != input.dtype or grad.shape != input.shape or grad.device != input.device:
        return NotImplemented
    tiling = tiles.tiles_of(spans)
    assert tiling is not None
    scale = scale.contiguous()
    grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    grad_scale, grad_offset = torch.empty_like(scale), torch.empty_like(scale)
    parts, programs = _division(tiling)
    scale_sums, offset_sums = grad_scale, grad_offset
    if parts > 1:
        scale_sums, offset_sums = scale.new_empty((2, parts, spans.channels)).unbind()
    launch(
        kernels.learned_backward_kernel,
        (programs,),
        input.device,
        grad.contiguous(),
        input.contiguous(),
        scale,
        scale if zero_point is None else zero_point.contiguous(),
        grad_input,
        scale_sums,
        offset_sums,
        tiling.turns,
        float(qmin),
        float(qmax),
        ZERO="none" if zero_point is None else "integer",
        SMALL=_is_small(qmin, qmax),
        **tiling.arguments(),
    )
    if parts > 1:
        channels, block = _second_step(parts, spans.channels)
        launch(
            kernels.add_parts_kernel,
            (-(-spans.channels // channels),),
            input.device,
            scale_sums,
            offset_sums,
            grad_scale,
            grad_offset,
            parts,
            spans.channels,
            PARTS=block,
            CHANNELS=channels,
        )
    return grad_input, grad_scale, grad_offset


def minmax(input: Tensor, axis: int | None = None, group_size: int | None = None) -> Any:
    found = spans_of(input, axis, group_size)
    if found is None or input.dtype not in FLOATS:
        return NotImplemented
    spans, shape = found
    tiling = tiles.tiles_of(spans)
    assert tiling is not None
    least = torch.empty(shape, dtype=torch.float32, device=input.device)
    greatest = torch.empty_like(least)
    nonfinite = torch.empty((1,), dtype=torch.int64, device=input.device)
    parts, programs = _division(tiling)
    lows, highs = least.new_empty((2, parts, spans.channels)).unbind()
    counts = torch.empty((programs,), dtype=torch.int32, device=input.device)
    launch(
        kernels.minmax_kernel,
        (programs,),
        input.device,
        input.contiguous(),
        lows,
        highs,
        counts,
        tiling.turns,
        **tiling.arguments(),
    )
    channels, block = _second_step(parts, spans.channels)
    launch(
        kernels.combine_ranges_kernel,
        (-(-spans.channels // channels) + 1,),
        input.device,
        lows,
        highs,
        counts,
        least,
        greatest,
        nonfinite,
        parts,
        spans.channels,
        programs,
        PARTS=block,
        CHANNELS=channels,
        COUNTS=_STEP,
    )
    return least, greatest, nonfinite


def _fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    out: bool = True,
    bits: bool = True,
) -> Any:
    spans = _scaled(input, scale, axis, group_size)
    zero = _kind_of_zero(zero_point, scale)
    if spans is None or zero is None or not _is_range(qmin, qmax):
        return NotImplemented
    tiling = tiles.tiles_of(spans, bits)
    if tiling is None:
        return NotImplemented
    values = mask = None
    if out:
        values = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    if bits:
        mask = torch.empty(((input.numel() + 7) // 8,), dtype=torch.uint8, device=input.device)
    _run_fake_quantize(tiling, input, scale, zero_point, zero, qmin, qmax, values, mask)
    return values, mask


def _run_fake_quantize(
    tiling: Tiles,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    zero: str,
    qmin: int,
    qmax: int,
    out: Tensor | None,
    bits: Tensor | None,
    learned: bool = False,
) -> None:
    scale = scale.contiguous()
    launch(
        kernels.fake_quantize_kernel,
        (tiling.down * tiling.across,),
        input.device,
        input.contiguous(),
        scale,
        scale if zero_point is None else zero_point.contiguous(),
        input if out is None else out,  # not written
        scale if bits is None else bits,
        0 if zero_point is None or zero_point.numel() < scale.numel() else 1,
        float(qmin),
        float(qmax),
        ZERO=zero,
        LEARNED=learned,
        SMALL=zero != "integer" and _is_small(qmin, qmax),
        WANT_OUT=out is not None,
        WANT_BITS=bits is not None,
        **tiling.arguments(),
    )


def _scaled(input: Tensor, scale: Tensor, axis: int | None, group_size: int | None) -> Spans | None:
    """Input's spans, if input is a float tensor and scale fits it."""
    found = spans_of(input, axis, group_size)
    if found is None or input.dtype not in FLOATS or scale.dtype != torch.float32:
        return None
    return found[0] if _fits(scale, found, input, axis, group_size) else None


def _fits(
    scale: Tensor,
    found: tuple[Spans, tuple[int, ...]],
    input: Tensor,
    axis: int | None,
    group_size: int | None,
) -> bool:
    if scale.device != input.device:
        return False
    if axis is None and group_size is None:
        return scale.numel() == 1
    return tuple(scale.shape) == found[1]


def _kind_of_zero(zero_point: Tensor | None, scale: Tensor) -> str | None:
    """ "none", "integer" or "real"; None where it does not fit the scale."""
    if zero_point is None:
        return "none"
    if zero_point.device != scale.device:
        return None
    if not (zero_point.numel() == 1 and zero_point.dim() <= 1) and zero_point.shape != scale.shape:
        return None
    return {torch.int32: "integer", torch.float32: "real"}.get(zero_point.dtype)


def _like_scale(tensor: Tensor | None, scale: Tensor, dtype: torch.dtype) -> bool:
    return tensor is None or (
        tensor.dtype == dtype and tensor.shape == scale.shape and tensor.device == scale.device
    )


def _is_range(qmin: int, qmax: int) -> bool:
    return -_LIMIT <= qmin < qmax <= _LIMIT


def _is_small(qmin: int, qmax: int) -> bool:
    return -_SMALL <= qmin and qmax <= _SMALL


def _division(tiling: Tiles) -> tuple[int, int]:
    """Parts that the elements of a scale are divided into, and programs."""
    spans, turns = tiling.spans, tiling.turns
    if spans.layout == "column":
        parts = -(-tiling.down // turns)
        return parts, parts * tiling.across
    parts = -(-tiling.across // turns)
    return parts * (spans.count // spans.channels), parts * tiling.down


def _second_step(parts: int, channels: int) -> tuple[int, int]:
    """Channels and parts in a block of the kernels that combine ``[parts, channels]``."""
    width = min(32, next_power_of_2(channels))
    return width, min(_STEP // width, next_power_of_2(parts))


OPERATORS: dict[str, Callable[..., Any]] = {
    "fake_quantize": fake_quantize,
    "fake_quantize_mask": fake_quantize_mask,
    "in_range": in_range,
    "fake_quantize_learned": fake_quantize_learned,
    "fake_quantize_learned_backward": fake_quantize_learned_backward,
    "minmax": minmax,
}
