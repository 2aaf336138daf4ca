"""Which elements share a scale, and how a kernel's programs divide them, for every granularity.

A contiguous tensor is a sequence of *spans*, each with one scale (csrc/cpu/spans.h): the whole
tensor, a slice along an axis, a group, a token. A program handles a tile of ``ROWS`` spans by
``COLUMNS`` elements, and loads and inverts a scale once for a row of the tile::

    one      1 span, the tensor                   every element has scale 0
    span     scale index = span % channels        one scale per row of the tile
    column   rows of the last axis' channels      a vector of scales for the tile
    element  flat                                 one look-up per element

``element`` is for bit masks of spans whose length is not a multiple of 8: a byte of the mask
belongs to 8 neighbours, which tiles of such spans would separate. Its integer divisions make it
slower.
"""
# Annotations must be objects here, not strings: the interpreter finds constexpr parameters by them.

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl

from torchquant.triton.launch import next_power_of_2

# Elements per program. Tests reduce it, so that small tensors need many programs.
TILE = 4096
_PER_THREAD = 16  # elements: fp32 in four accesses of 16 bytes
MOST_SPANS = 2**30  # spans are counted in 32 bits
_LEAST_COLUMNS = 32  # fp32: one cache line
PARTS = 2**16  # about so many partial sums, at most, are added in a second step
_MOST_TURNS = 16
_THREADS_OF_A_SCALE = 2  # with more scales per load Triton moves the data through shared memory


@dataclass(frozen=True)
class Spans:
    """Consecutive spans of one length; the last span of a row can be shorter."""

    layout: str
    count: int
    length: int
    row: int  # elements in a row
    per_row: int  # spans in a row
    channels: int  # number of scales: span i has scale i % channels
    run: int = 1  # layout "element": elements of a row that share a scale

    @property
    def numel(self) -> int:
        return self.count // self.per_row * self.row


@functools.lru_cache(maxsize=4096)
def spans_of(
    shape: tuple[int, ...], axis: int | None, group_size: int | None
) -> tuple[Spans, tuple[int, ...]] | None:
    """The spans, and the shape that the scales must have; None if the kernels do not support it."""
    n = math.prod(shape)
    if n == 0 or (axis is not None and group_size is not None):
        return None
    scales: tuple[int, ...] = (1,)
    spans = Spans("one", 1, n, n, 1, 1)
    if axis is not None:
        if not -len(shape) <= axis < len(shape):
            return None
        axis %= len(shape)
        channels = shape[axis]
        inner = math.prod(shape[axis + 1 :])
        scales = (channels,)
        if channels > 1 and inner == 1:
            spans = Spans("column", n // channels, channels, channels, 1, channels)
        elif channels > 1:
            spans = Spans("span", n // inner, inner, inner, 1, channels)
    elif group_size is not None:
        if len(shape) == 0 or group_size < 1:
            return None
        row = shape[-1]
        length = min(group_size, row)
        per_row = -(-row // length)
        count = n // row * per_row
        scales = (*shape[:-1], per_row)
        if row % length == 0:  # all spans have one length, as slices along the first axis have
            row, per_row = length, 1
        if count > 1:
            spans = Spans("span", count, length, row, per_row, count)
    return (spans, scales) if spans.count < MOST_SPANS else None


@dataclass(frozen=True)
class Tiles:
    """How programs divide the spans: ``down * across`` tiles of ``rows * columns``."""

    spans: Spans
    rows: int
    columns: int
    warps: int

    @property
    def down(self) -> int:
        return -(-self.spans.count // self.rows)

    @property
    def across(self) -> int:
        return -(-self.spans.length // self.columns)

    @property
    def programs(self) -> int:
        """The number of programs, one per tile."""
        return self.down * self.across

    @property
    def turns(self) -> int:
        """Tiles per program, for a kernel whose result is one number per scale."""
        across = self.spans.layout != "column"
        least = 1 if across else 8  # columns: a program's sum is a whole row of numbers
        turns = max(least, min(_MOST_TURNS, self.programs // PARTS))
        return max(1, min(turns, self.across if across else self.down))

    def arguments(self) -> dict[str, Any]:
        """The arguments of :func:`tile`, and the number of warps."""
        s = self.spans
        return {
            "count": s.count,
            "length": s.length,
            "row": s.row,
            "per_row": s.per_row,
            "channels": s.channels,
            "run": s.run,
            "LAYOUT": s.layout,
            "TAIL": s.per_row > 1 and s.layout == "span",
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "num_warps": self.warps,
        }


def tiles_of(spans: Spans, bits: bool = False) -> Tiles | None:
    """Tiles of about ``TILE`` elements; with ``bits``, no byte of a mask belongs to two tiles."""
    return _tiles_of(spans, bits, TILE)


@functools.lru_cache(maxsize=4096)
def _tiles_of(spans: Spans, bits: bool, tile: int) -> Tiles | None:
    n = spans.numel
    if bits and spans.layout != "one" and (spans.length % 8 or spans.row % 8):
        if n >= 2**31 - tile:
            return None
        if spans.layout == "column":
            spans = replace(spans, row=1, run=1)
        else:
            spans = replace(spans, run=spans.length)
        spans = replace(spans, layout="element", count=1, length=n)
    size = min(tile, next_power_of_2(max(n // 512, tile // 4)))  # small tensors: more programs
    warps = max(1, min(8, size // (32 * _PER_THREAD)))
    scales = 32 * warps // _THREADS_OF_A_SCALE
    most = min(size, scales) if spans.layout == "column" else size
    columns = _columns(spans.length, most, 8 if bits else 1)
    rows = min(size // columns, next_power_of_2(spans.count))
    if spans.layout == "span":
        rows = min(rows, scales)
    return Tiles(spans, rows, columns, warps)


def _columns(length: int, most: int, least: int) -> int:
    """A power of two: wide, but with few idle lanes after the end of a span."""
    columns = max(least, min(next_power_of_2(length), _LEAST_COLUMNS, most))
    best, busy = columns, -(-length // columns) * columns
    while columns < min(length, most):
        columns *= 2
        lanes = -(-length // columns) * columns
        if lanes <= busy + busy // 8:
            best, busy = columns, min(busy, lanes)
    return best


@triton.jit
def tile(
    down,
    across,
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
    """The tile at (down, across): offsets, which of them are inside, scale indices, which exist.

    Offsets and flags are int64 and bool ``[ROWS, COLUMNS]``; an index has that shape, or one row or
    column of it, or is a scalar.
    """
    spans = down * ROWS + tl.arange(0, ROWS)[:, None]
    columns = across.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    present = spans < count
    inside = present & (columns < length)
    if TAIL:
        behind = (spans % per_row).to(tl.int64) * length
        inside = inside & (behind + columns < row)
        offsets = (spans // per_row).to(tl.int64) * row + behind + columns
    else:
        offsets = spans.to(tl.int64) * length + columns
    if LAYOUT == "one":
        return offsets, inside, 0, True
    elif LAYOUT == "span":
        return offsets, inside, spans % channels, present
    elif LAYOUT == "column":
        return offsets, inside, columns, columns < length
    else:
        i = offsets.to(tl.int32)
        of_row = i // row
        return offsets, inside, (of_row * per_row + (i - of_row * row) // run) % channels, inside


@triton.jit
def bytes_of_tile(
    down,
    across,
    count,
    length,
    row,
    per_row,
    channels,
    run,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The tile of a bit mask's bytes: offsets, and which of them are inside, ``COLUMNS / 8``."""
    length, row = (length - 1) // 8 + 1, (row - 1) // 8 + 1
    BYTES: tl.constexpr = COLUMNS // 8
    offsets, inside, _index, _present = tile(
        down, across, count, length, row, per_row, channels, run, "one", TAIL, ROWS, BYTES
    )
    return offsets, inside


@triton.jit
def tile_of_turn(pid, turn, turns, length, LAYOUT: tl.constexpr, COLUMNS: tl.constexpr):
    """(down, across) of one of a program's ``turns`` tiles, which share their scales."""
    blocks = (length - 1) // COLUMNS + 1
    if LAYOUT == "column":
        return (pid // blocks).to(tl.int32) * turns + turn, pid % blocks
    else:
        parts = (blocks - 1) // turns + 1
        return (pid // parts).to(tl.int32), pid % parts * turns + turn


@triton.jit
def part_of(pid, turns, length, LAYOUT: tl.constexpr, COLUMNS: tl.constexpr):
    """The part of its scales' elements that a program handles."""
    blocks = (length - 1) // COLUMNS + 1
    if LAYOUT == "column":
        return (pid // blocks).to(tl.int64)
    else:
        return (pid % ((blocks - 1) // turns + 1)).to(tl.int64)


@triton.jit
def load_scale(pointer, index, present, other, LAYOUT: tl.constexpr):
    """Load scales, or a tensor of their shape."""
    if LAYOUT == "one":
        return tl.load(pointer)
    else:
        return tl.load(pointer + index, mask=present, other=other)


@triton.jit
def limits(zero, index, present, zero_step, qmin, qmax, ZERO: tl.constexpr, LAYOUT: tl.constexpr):
    """Zero point as fp32, ``qmin - zero_point``, ``qmax - zero_point``.

    A real zero point is not subtracted. zero_step: 0 if all scales share one zero point, else 1.
    qmin, qmax: fp32.
    """
    if ZERO == "none":
        return 0.0, qmin, qmax
    else:
        z = load_scale(zero, index * zero_step, present, 0, LAYOUT).to(tl.float32)
        if ZERO == "real":
            return z, qmin, qmax
        else:
            return z, qmin - z, qmax - z
