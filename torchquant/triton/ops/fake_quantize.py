"""The operators of fake quantization, on Triton's kernels: values, masks, gradients, ranges."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.triton.kernels import fake_quantize as kernels
from torchquant.triton.kernels import tiles
from torchquant.triton.kernels.tiles import Tiles, spans_of
from torchquant.triton.launch import launch, next_power_of_2
from torchquant.triton.ops.arguments import (
    FLOATS,
    kind_of_zero_point,
    matches_scale,
    spans_for,
    zero_point_step,
)

# Of qmin and qmax. Minus a zero point up to 2^22 they stay below 2^23, which round_within needs.
_LIMIT = 2**20
_STEP = 1024  # elements that a program combines at a time in the second step
_BYTES = 256  # of a mask per program: one byte per thread


def fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Any:
    """See :func:`torchquant.ops.fake_quantize`."""
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
    """See :func:`torchquant.ops.fake_quantize_mask`."""
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
    """See :func:`torchquant.ops.in_range`."""
    result = _fake_quantize(input, scale, zero_point, qmin, qmax, axis, group_size, out=False)
    return result if result is NotImplemented else result[1]


def positive(input: Tensor) -> Any:
    """See :func:`torchquant.ops.positive`."""
    n = input.numel()
    if n == 0 or input.dtype not in FLOATS:
        return NotImplemented
    bits = torch.empty(((n + 7) // 8,), dtype=torch.uint8, device=input.device)
    launch(
        kernels.positive_kernel,
        (-(-bits.numel() // _BYTES),),
        input.device,
        input.contiguous(),
        bits,
        n,
        BYTES=_BYTES,
        num_warps=_BYTES // 32,
    )
    return bits


def mask_gradient(grad: Tensor, bits: Tensor) -> Any:
    """See :func:`torchquant.ops.mask_gradient`."""
    n = grad.numel()
    if n == 0 or grad.dtype not in FLOATS or bits.dtype != torch.uint8:
        return NotImplemented
    if tuple(bits.shape) != ((n + 7) // 8,) or bits.device != grad.device:
        return NotImplemented
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    launch(
        kernels.mask_gradient_kernel,
        (-(-bits.numel() // _BYTES),),
        grad.device,
        grad.contiguous(),
        bits.contiguous(),
        out,
        n,
        BYTES=_BYTES,
        num_warps=_BYTES // 32,
    )
    return out


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
    """See :func:`torchquant.ops.fake_quantize_learned`."""
    spans = spans_for(input, scale, axis, group_size)
    if spans is None or input.dtype not in FLOATS or not _is_range(qmin, qmax):
        return NotImplemented
    if not matches_scale(offset, scale, torch.float32):
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
    """See :func:`torchquant.ops.fake_quantize_learned_backward`."""
    spans = spans_for(input, scale, axis, group_size)
    if spans is None or input.dtype not in FLOATS or not _is_range(qmin, qmax):
        return NotImplemented
    if not matches_scale(zero_point, scale, torch.int32):
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
    """See :func:`torchquant.ops.minmax`."""
    found = spans_of(input.shape, axis, group_size)
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
    spans = spans_for(input, scale, axis, group_size)
    zero = kind_of_zero_point(zero_point, scale)
    if spans is None or zero is None or input.dtype not in FLOATS or not _is_range(qmin, qmax):
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
        (tiling.programs,),
        input.device,
        input.contiguous(),
        scale,
        scale if zero_point is None else zero_point.contiguous(),
        input if out is None else out,  # not written
        scale if bits is None else bits,
        zero_point_step(zero_point, scale),
        float(qmin),
        float(qmax),
        ZERO=zero,
        LEARNED=learned,
        WANT_OUT=out is not None,
        WANT_BITS=bits is not None,
        **tiling.arguments(),
    )


def _is_range(qmin: int, qmax: int) -> bool:
    return -_LIMIT <= qmin < qmax <= _LIMIT


def _division(tiling: Tiles) -> tuple[int, int]:
    """The number of parts that the elements of one scale are divided into, and of programs."""
    spans, turns = tiling.spans, tiling.turns
    if spans.layout == "column":
        parts = -(-tiling.down // turns)
        return parts, parts * tiling.across
    parts = -(-tiling.across // turns)
    return parts * (spans.count // spans.channels), parts * tiling.down


def _second_step(parts: int, channels: int) -> tuple[int, int]:
    """Channels and parts per block in the kernels that combine ``[parts, channels]``."""
    width = min(32, next_power_of_2(channels))
    return width, min(_STEP // width, next_power_of_2(parts))
