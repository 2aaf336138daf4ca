"""Element by element: quantize and dequantize at every granularity, activations, masks."""
# Annotations must be objects here, not strings: the interpreter finds constexpr parameters by them.

import triton
import triton.language as tl

from torchquant.triton.activation import apply_activation
from torchquant.triton.fake_quantize import packed, round_within
from torchquant.triton.language import reciprocal
from torchquant.triton.tiles import limits, load_scale, tile, tile_of_turn


@triton.jit
def aligned_to(offsets, floats):
    """Offsets of bytes, of which a thread takes no more than of floats: as many as fill 16 bytes.

    Wider accesses to the bytes would send the floats through shared memory.
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


@triton.jit
def activation_kernel(
    x,
    up,
    out,
    count,
    length,
    x_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``activation(x)`` or ``activation(x) * up`` of rows, which in ``out`` are contiguous."""
    pid = tl.program_id(0)
    blocks = (length - 1) // COLUMNS + 1
    rows = (pid // blocks).to(tl.int32) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = (pid % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (rows < count) & (columns < length)
    rows = rows.to(tl.int64)
    v = tl.load(x + (rows * x_stride + columns), mask=inside, other=0.0).to(tl.float32)
    y = apply_activation(v, ACTIVATION)
    if GATED:
        y = y * tl.load(up + (rows * up_stride + columns), mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (rows * length + columns), y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def positive_kernel(x, bits, numel, BYTES: tl.constexpr):
    """Bits of ``x > 0``."""
    eights = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)[:, None]
    offsets = eights * 8 + tl.arange(0, 8)[None, :]
    v = tl.load(x + offsets, mask=offsets < numel, other=0.0).to(tl.float32)
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)[None, :]
    flags = tl.reshape(v > 0.0, (1, BYTES * 8))
    tl.store(bits + at, packed(flags, 1, BYTES * 8), mask=at * 8 < numel)


@triton.jit
def mask_gradient_kernel(grad, bits, out, numel, BYTES: tl.constexpr):
    """``grad`` where its bit is set, +0 elsewhere."""
    eights = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)[:, None]
    each = tl.arange(0, 8)[None, :]
    offsets = eights * 8 + each
    inside = offsets < numel
    g = tl.load(grad + offsets, mask=inside, other=0.0)
    byte = tl.load(bits + eights, mask=eights * 8 < numel, other=0).to(tl.int32)
    tl.store(out + offsets, tl.where(((byte >> each) & 1) != 0, g, 0.0), mask=inside)
