"""Rows of floats to int8: one scale and zero point per row, from the row's range or given.

A program keeps its rows in registers, computes their range, quantizes and writes them, so that the
input is read once. Short rows share a program. Rows that are too long for registers are read twice,
the second time from the cache.
"""
# Annotations must be objects here, not strings: the interpreter finds constexpr parameters by them.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchquant.triton.kernels.language import (
    absolute,
    divide,
    finish_scale,
    is_finite,
    maximum,
    minimum,
    reciprocal,
    rint,
)
from torchquant.triton.kernels.language import quantize as to_steps
from torchquant.triton.launch import launch, next_power_of_2
from torchquant.triton.layout import layout_shape, packed_sums, padded_k, padded_n

MAX_COLUMNS = 1 << 17
_ONE_PASS = 32768  # longest row that fits into a program's registers
_SHARED = 2048  # least number of elements per program, reached by sharing it among short rows
_LOOP = 8192  # elements of a row at a time, with two passes


@triton.jit
def _range_of(x, MODE: tl.constexpr):
    """Least and greatest of each row, or (not asymmetric) the magnitude twice; NaN if one is
    NaN.
    """
    if MODE == "asymmetric":
        least = tl.reduce(x, 1, minimum)
        greatest = tl.reduce(x, 1, maximum)
    else:
        # The bits of magnitudes have the same order as integers, and NaN is above infinity.
        bits = tl.max(absolute(x).to(tl.int32, bitcast=True), 1)
        greatest = bits.to(tl.float32, bitcast=True)
        least = greatest
    return least, greatest


@triton.jit
def _params(
    least,
    greatest,
    given_scale,
    given_zero,
    MODE: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
):
    """Scale (NaN for a row whose results must be NaN), zero point, and the scale that quantizes.

    The operations of functional.qparams_from_range in their order.
    """
    if MODE == "static":
        own = maximum(given_scale, 2.0**-126)
        scale = tl.where(greatest == greatest, own, greatest)
        zero = given_zero
    elif MODE == "symmetric":
        scale = finish_scale(greatest, divide(greatest, QMAX * 1.0))
        own = scale
        zero = tl.zeros_like(greatest).to(tl.int32)
    else:
        least = minimum(least, 0.0)
        greatest = maximum(greatest, 0.0)
        extent = greatest - least
        halved = divide(greatest * 0.5 - least * 0.5, (QMAX - QMIN) * 1.0) * 2.0
        scale = divide(extent, (QMAX - QMIN) * 1.0)
        scale = tl.where(is_finite(extent), scale, halved)
        finite = is_finite(least) & is_finite(greatest)
        scale = finish_scale(extent, tl.where(finite, scale, extent))
        own = scale
        z = rint(QMIN - divide(least, scale))
        z = minimum(maximum(z, QMIN * 1.0), QMAX * 1.0)
        undefined = (extent == 0.0) | (scale != scale)
        zero = tl.where(undefined, 0.0, z).to(tl.int32)
    return scale, zero, own


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    x_stride,
    q_ptr,
    q_stride,
    scale_ptr,
    zero_ptr,
    sums_ptr,
    given_scale_ptr,
    given_scale_stride,
    given_zero_ptr,
    rows,
    k,
    written_rows,
    written_columns,
    end,
    MODE: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    PACK: tl.constexpr,
    ONE_PASS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    is_row = row < rows
    x_rows = x_ptr + row.to(tl.int64)[:, None] * x_stride
    q_rows = q_ptr + row.to(tl.int64)[:, None] * q_stride

    if ONE_PASS:
        inside = is_row[:, None] & (column < k)[None, :]
        x = tl.load(x_rows + column[None, :], mask=inside, other=0.0).to(tl.float32)
        least, greatest = _range_of(x, MODE)
    else:
        low = tl.zeros((ROWS, BLOCK), tl.float32)
        high = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, k, BLOCK):
            inside = is_row[:, None] & (start + column < k)[None, :]
            x = tl.load(x_rows + start + column[None, :], mask=inside, other=0.0).to(tl.float32)
            if MODE == "asymmetric":
                low = minimum(low, x)
                high = maximum(high, x)
            else:
                high = maximum(high, absolute(x))
        if MODE == "asymmetric":
            least, _unused = _range_of(low, MODE)
            _unused, greatest = _range_of(high, MODE)
        else:
            least, greatest = _range_of(high, MODE)
    given_scale = tl.zeros_like(greatest)
    given_zero = given_scale.to(tl.int32)
    if MODE == "static":
        given_scale += tl.load(given_scale_ptr + row * given_scale_stride, mask=is_row, other=1.0)
        if given_zero_ptr is not None:
            given_zero += tl.load(given_zero_ptr)
    scale, zero, own = _params(least, greatest, given_scale, given_zero, MODE, QMIN, QMAX)
    inverse = reciprocal(own)
    # All integers of a row without a scale are its zero point, which is 0: both bounds are 0. With
    # a given scale, the row's other elements are quantized nevertheless.
    live = scale == scale
    if MODE == "static" and not PACK:
        live = live | True
    lo = tl.where(live, (QMIN - zero).to(tl.float32), 0.0)
    hi = tl.where(live, (QMAX - zero).to(tl.float32), 0.0)

    is_written = row < written_rows
    sums = tl.zeros((ROWS,), tl.int32)
    if ONE_PASS:
        q = to_steps(x, inverse[:, None], lo[:, None], hi[:, None], zero[:, None])
        if HAS_SUMS or PACK:
            q = tl.where(inside, q, 0)
            sums = tl.sum(q, 1)
        written = is_written[:, None] & (column < written_columns)[None, :]
        tl.store(q_rows + column[None, :], q.to(tl.int8), mask=written)
    else:
        for start in range(0, written_columns, BLOCK):
            inside = is_row[:, None] & (start + column < k)[None, :]
            x = tl.load(x_rows + start + column[None, :], mask=inside, other=0.0).to(tl.float32)
            q = to_steps(x, inverse[:, None], lo[:, None], hi[:, None], zero[:, None])
            if HAS_SUMS or PACK:
                q = tl.where(inside, q, 0)
                sums += tl.sum(q, 1)
            written = is_written[:, None] & (start + column < written_columns)[None, :]
            tl.store(q_rows + start + column[None, :], q.to(tl.int8), mask=written)

    tl.store(scale_ptr + row, scale, mask=is_row)
    tl.store(zero_ptr + row, zero, mask=is_row)
    if HAS_SUMS:
        tl.store(sums_ptr + row, sums, mask=is_row)
    if PACK:  # the sums follow the rows, and zeros follow the sums up to `end`
        tl.store(sums_ptr + row, sums, mask=is_written)
        if program == 0:
            tail = written_rows.to(tl.int64) * (written_columns + 4)
            for start in range(0, written_columns, BLOCK):
                at = tail + start + column
                tl.store(q_ptr + at, tl.zeros((BLOCK,), tl.int8), mask=at < end)


@triton.jit
def _row_sums_kernel(q_ptr, stride, sums_ptr, rows, k, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.int32)
    for start in range(0, k, BLOCK):
        inside = (row < rows)[:, None] & (start + column < k)[None, :]
        at = row.to(tl.int64)[:, None] * stride + (start + column)[None, :]
        total += tl.load(q_ptr + at, mask=inside, other=0).to(tl.int32)
    tl.store(sums_ptr + row, tl.sum(total, 1), mask=row < rows)


class Blocks(NamedTuple):
    """How rows are divided among programs."""

    one_pass: bool
    rows: int
    block: int
    warps: int


def blocks_for(columns: int) -> Blocks:
    """The division for rows of so many columns."""
    width = max(16, next_power_of_2(columns))
    if width > _ONE_PASS:
        return Blocks(False, 1, _LOOP, 16)
    rows = max(1, _SHARED // width)
    return Blocks(True, rows, width, min(32, max(4, rows * width // 512)))


class QuantizedRows(NamedTuple):
    """int8 rows, fp32 scale, int32 zero point and int32 sum of each row."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor
    sums: Tensor | None


def quantize_rows(
    x: Tensor,
    q: Tensor,
    *,
    qmin: int,
    qmax: int,
    symmetric: bool = True,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    with_sums: bool = False,
) -> QuantizedRows:
    """Quantize the rows of ``x`` into ``q``.

    Args:
        x: fp32, bf16 or fp16 ``[M, K]``, M and K >= 1, K up to MAX_COLUMNS; the last stride is 1.
        q: int8 ``[M, >= K]``, written in its first K columns; the last stride is 1.
        qmin, qmax: range of the integers; symmetric: whether the zero point is 0.
        scale, zero_point: fp32 ``[1]`` and int32 ``[1]`` or None, instead of each row's own.
        with_sums: also sum the integers of each row.

    Returns:
        ``q`` with fp32 ``[M]``, int32 ``[M]`` and int32 ``[M]`` or None.
    """
    m, k = x.shape
    row_scale = torch.empty(m, dtype=torch.float32, device=x.device)
    row_zero = torch.empty(m, dtype=torch.int32, device=x.device)
    sums = torch.empty(m, dtype=torch.int32, device=x.device) if with_sums else None
    blocks = blocks_for(k)
    launch(
        _quantize_rows_kernel,
        (triton.cdiv(m, blocks.rows),),
        x.device,
        x,
        x.stride(0),
        q,
        q.stride(0),
        row_scale,
        row_zero,
        sums,
        scale,
        0,
        zero_point,
        m,
        k,
        m,
        k,
        0,
        MODE="static" if scale is not None else "symmetric" if symmetric else "asymmetric",
        QMIN=qmin,
        QMAX=qmax,
        HAS_SUMS=with_sums,
        PACK=False,
        ONE_PASS=blocks.one_pass,
        ROWS=blocks.rows,
        BLOCK=blocks.block,
        num_warps=blocks.warps,
    )
    return QuantizedRows(q, row_scale, row_zero, sums)


def quantize_pack(
    weight: Tensor, scale: Tensor | None, *, qmin: int, qmax: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize and pack a weight's rows (csrc/formats/int8_rows.h) in one pass.

    Args:
        weight: fp32, bf16 or fp16 ``[N, K]``, N and K >= 1, K up to MAX_COLUMNS; last stride 1.
        scale: None, or fp32 ``[1]`` or ``[N]``, contiguous.
        qmin, qmax, symmetric: as in :func:`quantize_rows`.

    Returns:
        int8 in the rows layout, fp32 ``[N]``, int32 ``[N]``.
    """
    n, k = weight.shape
    padded = padded_n(n)
    packed = torch.empty(layout_shape(n, k), dtype=torch.int8, device=weight.device)
    row_scale = torch.empty(n, dtype=torch.float32, device=weight.device)
    row_zero = torch.empty(n, dtype=torch.int32, device=weight.device)
    blocks = blocks_for(padded_k(k))
    launch(
        _quantize_rows_kernel,
        (triton.cdiv(padded, blocks.rows),),
        weight.device,
        weight,
        weight.stride(0),
        packed,
        packed.stride(0),
        row_scale,
        row_zero,
        packed_sums(packed, n),
        scale,
        0 if scale is None or scale.numel() == 1 else 1,
        None,
        n,
        k,
        padded,
        padded_k(k),
        packed.numel(),
        MODE="static" if scale is not None else "symmetric" if symmetric else "asymmetric",
        QMIN=qmin,
        QMAX=qmax,
        HAS_SUMS=False,
        PACK=True,
        ONE_PASS=blocks.one_pass,
        ROWS=blocks.rows,
        BLOCK=blocks.block,
        num_warps=blocks.warps,
    )
    return packed, row_scale, row_zero


def row_sums(q: Tensor) -> Tensor:
    """Sum of each row of int8 or uint8 ``[M, K]`` (last stride 1), int32 ``[M]``."""
    m, k = q.shape
    sums = torch.empty(m, dtype=torch.int32, device=q.device)
    block = min(4096, max(16, next_power_of_2(k)))
    rows = max(1, _SHARED // block)
    launch(
        _row_sums_kernel,
        (triton.cdiv(m, rows),),
        q.device,
        q,
        q.stride(0),
        sums,
        m,
        k,
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
    )
    return sums
