"""Quantize and dequantize tensors, at every granularity."""
# Annotations must be objects here, not strings: the interpreter finds constexpr parameters by them.

import triton
import triton.language as tl

from torchquant.triton.kernels.language import reciprocal, round_within
from torchquant.triton.kernels.tiles import limits, load_scale, tile, tile_of_turn


@triton.jit
def aligned_to(offsets, floats):
    """Offsets of bytes such that a thread accesses as many bytes as floats: 16 bytes of floats.

    With wider accesses to the bytes, the compiler would move the floats through shared memory.
    """
    WIDTH: tl.constexpr = 128 // floats.dtype.element_ty.primitive_bitwidth
    return offsets // WIDTH * WIDTH + offsets % WIDTH


@triton.jit
def quantize_kernel(
    x,
    scale,
    zero,
    out,
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
    LAYOUT: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``clamp(rint(x / scale) + zero_point, qmin, qmax)``; NaN counts as 0 before the clamp."""
    pid = tl.program_id(0)
    down, across = tile_of_turn(pid, 0, 1, length, LAYOUT, COLUMNS)
    offsets, inside, index, present = tile(
        down, across, count, length, row, per_row, channels, run, LAYOUT, TAIL, ROWS, COLUMNS
    )
    v = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    s = load_scale(scale, index, present, 1.0, LAYOUT)
    z, lo, hi = limits(zero, index, present, zero_step, qmin, qmax, ZERO, LAYOUT)
    if ZERO == "real":
        v = v - z
    v = v * reciprocal(s)
    steps = round_within(tl.where(v == v, v, 0.0), lo, hi)
    if ZERO == "integer":
        steps = steps + z  # exact: both are integers below 2^23
    steps = steps.to(tl.int32).to(out.dtype.element_ty)
    tl.store(out + aligned_to(offsets, x), steps, mask=inside)


@triton.jit
def dequantize_kernel(
    q,
    scale,
    zero,
    out,
    zero_step,
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
    """``(q - zero_point) * scale``, or ``q * scale + zero_point`` with a real one."""
    pid = tl.program_id(0)
    down, across = tile_of_turn(pid, 0, 1, length, LAYOUT, COLUMNS)
    offsets, inside, index, present = tile(
        down, across, count, length, row, per_row, channels, run, LAYOUT, TAIL, ROWS, COLUMNS
    )
    v = tl.load(q + aligned_to(offsets, out), mask=inside, other=0).to(tl.float32)
    s = load_scale(scale, index, present, 1.0, LAYOUT)
    z, _lo, _hi = limits(zero, index, present, zero_step, 0.0, 0.0, ZERO, LAYOUT)
    if ZERO == "integer":
        v = v - z  # exact: both are integers below 2^23
    y = v * s
    if ZERO == "real":
        y = y + z
    tl.store(out + offsets, y.to(out.dtype.element_ty), mask=inside)
