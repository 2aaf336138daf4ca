"""Fake quantization in training: values, bit masks, a learned step's gradients, ranges.

Memory bounds the speed of all of them. A program reads a tile
(:mod:`torchquant.triton.kernels.tiles`) once, 16 bytes per access, and writes the requested
results. Sums and ranges take two steps without atomics: each program writes those of its tile, then
a second kernel combines them in a fixed order. Both divisions of the work depend on shapes alone,
and so do the bits of a sum.
"""
# Annotations must be objects here, not strings: the interpreter finds constexpr parameters by them.

import triton
import triton.language as tl

from torchquant.triton.kernels.language import (
    divide,
    fma,
    is_finite,
    reciprocal,
    rint,
    round_within,
)
from torchquant.triton.kernels.tiles import (
    bytes_of_tile,
    limits,
    load_scale,
    part_of,
    tile,
    tile_of_turn,
)

_LEAST_SCALE = tl.constexpr(2.0**-126)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def used_scale(s):
    """The effective scale of a learned step: at least 2^-126; NaN is kept."""
    return tl.where(s < _LEAST_SCALE, _LEAST_SCALE, s)


@triton.jit
def least_rounding_to(integer):
    """The least fp32 number that rounds, half to even, to ``integer`` or more.

    integer: fp32, of magnitude below 2^23. A mask compares numbers with this bound instead of
    rounding them without a clamp.
    """
    tie = integer - 0.5
    above = tl.where(tie > 0.0, 1, -1)  # the next number towards infinity, in a float's bits
    odd = integer.to(tl.int32) & 1  # then the tie rounds to the even number below
    return (tie.to(tl.int32, bitcast=True) + above * odd).to(tl.float32, bitcast=True)


@triton.jit
def bit_mask(flags, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """bool ``[ROWS, COLUMNS]`` as uint8 ``[ROWS, COLUMNS / 8]``; the first of 8 is the lowest
    bit.
    """
    BYTES: tl.constexpr = COLUMNS // 8
    each = tl.where(flags, 1 << (tl.arange(0, COLUMNS)[None, :] % 8), 0)
    return tl.sum(tl.reshape(each, (ROWS, BYTES, 8)), axis=2).to(tl.uint8)


@triton.jit
def fake_quantize_kernel(
    x,
    scale,
    zero,
    out,
    bits,
    zero_step,
    qmin,
    qmax,
    count,
    length,
    row,
    per_row,
    channels,
    run,
    ZERO: tl.constexpr,
    LEARNED: tl.constexpr,
    WANT_OUT: tl.constexpr,
    WANT_BITS: tl.constexpr,
    LAYOUT: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantize and dequantize in one step; the mask marks rounded values within the range.

    ZERO: "none", "integer", "real", or "offset" (a learned offset, which gives the integer).
    LEARNED: the scale can be any number. qmin, qmax: up to 2^20 in magnitude.
    """
    pid = tl.program_id(0)
    down, across = tile_of_turn(pid, 0, 1, length, LAYOUT, COLUMNS)
    offsets, inside, index, present = tile(
        down, across, count, length, row, per_row, channels, run, LAYOUT, TAIL, ROWS, COLUMNS
    )
    # NaN after the end gives zeros in the mask's last byte. It must not be a global of the module:
    # Triton compares those at each launch with their old values, and NaN is not equal to itself.
    v = tl.load(x + offsets, mask=inside, other=float("nan")).to(tl.float32)
    s = load_scale(scale, index, present, 1.0, LAYOUT)
    if LEARNED:
        s = used_scale(s)
    if ZERO == "offset":
        offset = load_scale(zero, index, present, 0.0, LAYOUT)
        z = rint(divide(-offset, s))
        s = tl.where(z == z, s, z)  # an integer cannot be NaN, so the scale becomes NaN
        z = tl.minimum(tl.maximum(z, qmin), qmax)
        lo, hi = qmin - z, qmax - z
    else:
        z, lo, hi = limits(zero, index, present, zero_step, qmin, qmax, ZERO, LAYOUT)
    inverse = reciprocal(s)
    if ZERO == "real":
        v = v - z
    v = v * inverse
    if WANT_OUT:
        y = round_within(v, lo, hi) * s
        if ZERO == "real":
            y = y + z
        tl.store(out + offsets, y.to(out.dtype.element_ty), mask=inside)
    if WANT_BITS:
        least = least_rounding_to(lo + tl.zeros((1, 1), tl.float32))
        greatest = -least_rounding_to(tl.zeros((1, 1), tl.float32) - hi)
        flags = (v >= least) & (v <= greatest)
        at, there = bytes_of_tile(
            down, across, count, length, row, per_row, channels, run, TAIL, ROWS, COLUMNS
        )
        tl.store(bits + at, bit_mask(flags, ROWS, COLUMNS), mask=there)


@triton.jit
def learned_backward_kernel(
    grad,
    x,
    scale,
    zero,
    grad_x,
    scale_sums,
    offset_sums,
    turns,
    qmin,
    qmax,
    count,
    length,
    row,
    per_row,
    channels,
    run,
    ZERO: tl.constexpr,
    LAYOUT: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """grad_x, and for each part and scale the sums of grad_scale's and grad_offset's terms.

    scale_sums, offset_sums: fp32 ``[parts, spans]``; layout "column": ``[parts, channels]``.
    """
    pid = tl.program_id(0)
    down, across = tile_of_turn(pid, 0, turns, length, LAYOUT, COLUMNS)
    offsets, inside, index, present = tile(
        down, across, count, length, row, per_row, channels, run, LAYOUT, TAIL, ROWS, COLUMNS
    )
    s = used_scale(load_scale(scale, index, present, 1.0, LAYOUT))
    z, lo, hi = limits(zero, index, present, 1, qmin, qmax, ZERO, LAYOUT)
    inverse = reciprocal(s)
    scale_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    offset_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for turn in range(turns):
        down, across = tile_of_turn(pid, turn, turns, length, LAYOUT, COLUMNS)
        offsets, inside, _index, _present = tile(
            down, across, count, length, row, per_row, channels, run, LAYOUT, TAIL, ROWS, COLUMNS
        )
        # Zeros after the ends: their terms are zero, or NaN if all terms of the scale are NaN.
        g_given = tl.load(grad + offsets, mask=inside, other=0.0)
        value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        g = g_given.to(tl.float32)
        v = value * inverse
        steps = round_within(v, lo, hi)
        passes = (lo < v) & (v < hi)
        tl.store(grad_x + offsets, tl.where(passes, g_given, 0.0), mask=inside)
        # rint(v) - v from the exact residual, which has the bits that rounding took from v.
        slope = tl.where(passes, fma(steps, s, -value) * inverse, steps + z)
        scale_sum = fma(g, slope, scale_sum)
        offset_sum += tl.where(passes, 0.0, g)
    down, across = tile_of_turn(pid, 0, turns, length, LAYOUT, COLUMNS)
    part = part_of(pid, turns, length, LAYOUT, COLUMNS)
    if LAYOUT == "column":
        lanes = across * COLUMNS + tl.arange(0, COLUMNS)
        at = part * length + lanes
        tl.store(scale_sums + at, tl.sum(scale_sum, axis=0), mask=lanes < length)
        tl.store(offset_sums + at, tl.sum(offset_sum, axis=0), mask=lanes < length)
    else:
        lanes = down * ROWS + tl.arange(0, ROWS)
        at = part * count + lanes
        tl.store(scale_sums + at, tl.sum(scale_sum, axis=1), mask=lanes < count)
        tl.store(offset_sums + at, tl.sum(offset_sum, axis=1), mask=lanes < count)


@triton.jit
def add_parts_kernel(
    scale_sums,
    offset_sums,
    grad_scale,
    grad_offset,
    parts,
    channels,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add fp32 ``[parts, channels]`` over the parts, in order, in float64, to ``[channels]``."""
    lanes = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    first = tl.zeros((PARTS, CHANNELS), tl.float64)
    second = tl.zeros((PARTS, CHANNELS), tl.float64)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)[:, None]
        at, there = part.to(tl.int64) * channels + lanes, (part < parts) & (lanes < channels)
        first += tl.load(scale_sums + at, mask=there, other=0.0).to(tl.float64)
        second += tl.load(offset_sums + at, mask=there, other=0.0).to(tl.float64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    tl.store(grad_scale + channel, tl.sum(first, axis=0).to(tl.float32), mask=there)
    tl.store(grad_offset + channel, tl.sum(second, axis=0).to(tl.float32), mask=there)


@triton.jit
def minmax_kernel(
    x,
    least,
    greatest,
    nonfinite,
    turns,
    count,
    length,
    row,
    per_row,
    channels,
    run,
    LAYOUT: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Least and greatest finite element per part and scale; how many are not finite per program.

    least, greatest: shapes as of the sums of learned_backward_kernel; nonfinite: int32
    ``[programs]``.
    """
    pid = tl.program_id(0)
    low = tl.full((ROWS, COLUMNS), _INFINITY, tl.float32)
    high = tl.full((ROWS, COLUMNS), -_INFINITY, tl.float32)
    missing = tl.zeros((ROWS, COLUMNS), tl.int32)
    for turn in range(turns):
        down, across = tile_of_turn(pid, turn, turns, length, LAYOUT, COLUMNS)
        offsets, inside, _index, _present = tile(
            down, across, count, length, row, per_row, channels, run, LAYOUT, TAIL, ROWS, COLUMNS
        )
        v = tl.load(x + offsets, mask=inside, other=_INFINITY).to(tl.float32)
        finite = is_finite(v)
        low = tl.where(finite & (v < low), v, low)
        high = tl.where(finite & (v > high), v, high)
        missing += (inside & (finite == 0)).to(tl.int32)
    tl.store(nonfinite + pid, tl.sum(tl.sum(missing, axis=1), axis=0))
    down, across = tile_of_turn(pid, 0, turns, length, LAYOUT, COLUMNS)
    part = part_of(pid, turns, length, LAYOUT, COLUMNS)
    if LAYOUT == "column":
        lanes = across * COLUMNS + tl.arange(0, COLUMNS)
        at = part * length + lanes
        tl.store(least + at, tl.min(low, axis=0), mask=lanes < length)
        tl.store(greatest + at, tl.max(high, axis=0), mask=lanes < length)
    else:
        lanes = down * ROWS + tl.arange(0, ROWS)
        at = part * count + lanes
        tl.store(least + at, tl.min(low, axis=1), mask=lanes < count)
        tl.store(greatest + at, tl.max(high, axis=1), mask=lanes < count)


@triton.jit
def combine_ranges_kernel(
    lows,
    highs,
    counts,
    least,
    greatest,
    nonfinite,
    parts,
    channels,
    programs,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """Reduce fp32 ``[parts, channels]`` to ``[channels]``; one more program adds the counts."""
    pid = tl.program_id(0)
    if pid == tl.num_programs(0) - 1:
        total = tl.zeros((COUNTS,), tl.int64)
        for begin in range(0, programs, COUNTS):
            i = begin + tl.arange(0, COUNTS)
            total += tl.load(counts + i, mask=i < programs, other=0).to(tl.int64)
        tl.store(nonfinite, tl.sum(total, axis=0))
    else:
        lanes = pid * CHANNELS + tl.arange(0, CHANNELS)[None, :]
        low = tl.full((PARTS, CHANNELS), _INFINITY, tl.float32)
        high = tl.full((PARTS, CHANNELS), -_INFINITY, tl.float32)
        for begin in range(0, parts, PARTS):
            part = begin + tl.arange(0, PARTS)[:, None]
            at, there = part.to(tl.int64) * channels + lanes, (part < parts) & (lanes < channels)
            low = tl.minimum(low, tl.load(lows + at, mask=there, other=_INFINITY))
            high = tl.maximum(high, tl.load(highs + at, mask=there, other=-_INFINITY))
        channel = pid * CHANNELS + tl.arange(0, CHANNELS)
        there = channel < channels
        # Between -0 and +0 the order is undefined; the result is always +0.
        tl.store(least + channel, tl.min(low, axis=0) + 0.0, mask=there)
        tl.store(greatest + channel, tl.max(high, axis=0) + 0.0, mask=there)


@triton.jit
def positive_kernel(x, bits, numel, BYTES: tl.constexpr):
    """The bit mask of ``x > 0``."""
    eights = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)[:, None]
    offsets = eights * 8 + tl.arange(0, 8)[None, :]
    v = tl.load(x + offsets, mask=offsets < numel, other=0.0).to(tl.float32)
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)[None, :]
    flags = tl.reshape(v > 0.0, (1, BYTES * 8))
    tl.store(bits + at, bit_mask(flags, 1, BYTES * 8), mask=at * 8 < numel)


@triton.jit
def mask_gradient_kernel(grad, bits, out, numel, BYTES: tl.constexpr):
    """``grad`` if its bit is set, else +0."""
    eights = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)[:, None]
    each = tl.arange(0, 8)[None, :]
    offsets = eights * 8 + each
    inside = offsets < numel
    g = tl.load(grad + offsets, mask=inside, other=0.0)
    byte = tl.load(bits + eights, mask=eights * 8 < numel, other=0).to(tl.int32)
    tl.store(out + offsets, tl.where(((byte >> each) & 1) != 0, g, 0.0), mask=inside)
