"""The kernels of the integer matrix products: int8 rows to the finished output in one call.

All three end in ``_finish``, whose arguments are one tuple, an :class:`Epilogue`.
:mod:`torchquant.triton.gemm.configs` chooses the kernel and its blocks. Intermediate sums can wrap
around, which does no harm as long as the final value fits.
"""
# Annotations must be objects here, not strings: the interpreter finds constexpr parameters by them.

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from torchquant.triton.kernels.activations import apply_activation
from torchquant.triton.kernels.language import fma, quantize, reciprocal


class Epilogue(NamedTuple):
    """The computation after the sums; a field that is None compiles to nothing.

    The output's zero point and range are separate arguments: in a tuple, Triton compiles one kernel
    for each kind of number (1, multiples of 16, others) and ignores ``do_not_specialize``.
    """

    k: int  # in_features
    scale: Tensor | None  # fp32 [1] or [M]; None: the sums are the result
    zero_point: Tensor | None  # int32 [1] or [M]
    row_sums: Tensor | None  # int32 [M]
    weight_scale: Tensor | None  # fp32 [1] or [N]
    weight_zero_point: Tensor | None  # int32 [1] or [N]
    sums: Tensor  # int32 [N16], of the weight's rows
    bias: Tensor | None  # fp32 or int32 [N]
    output_scale: Tensor | None  # fp32 [1]
    # Constants of the compiled kernel. Strides: 0 for a single value, else 1.
    scale_stride: tl.constexpr
    zero_point_stride: tl.constexpr
    weight_scale_stride: tl.constexpr
    weight_zero_point_stride: tl.constexpr
    unsigned: tl.constexpr  # uint8 input
    activation: tl.constexpr  # a name of functional.ACTIVATIONS


@triton.jit
def _finish(acc, row, column, m, n, epilogue, zo, qmin, qmax):
    """Turn int32 sums ``[rows, columns]`` into the output, as an Epilogue describes.

    For uint8 input, x' = x - 128 and zx' = zx - 128; for int8 input, x' = x and zx' = zx::

        sum (x - zx) (w - zw) = sum x' w - zx' sum w - zw (sum x - K zx)
    """
    is_row = row < m
    is_column = column < n
    if epilogue.zero_point is not None or epilogue.unsigned:
        shifted = row * 0
        if epilogue.zero_point is not None:
            shifted += tl.load(
                epilogue.zero_point + row * epilogue.zero_point_stride, mask=is_row, other=0
            )
        if epilogue.unsigned:
            shifted -= 128
        weight_sums = tl.load(epilogue.sums + column, mask=is_column, other=0)
        acc -= shifted[:, None] * weight_sums[None, :]
    if epilogue.weight_zero_point is not None:
        zw = tl.load(
            epilogue.weight_zero_point + column * epilogue.weight_zero_point_stride,
            mask=is_column,
            other=0,
        )
        row_sums = tl.load(epilogue.row_sums + row, mask=is_row, other=0)
        if epilogue.zero_point is not None:
            row_sums -= epilogue.k * tl.load(
                epilogue.zero_point + row * epilogue.zero_point_stride, mask=is_row, other=0
            )
        acc -= zw[None, :] * row_sums[:, None]
    if epilogue.scale is None:
        result = acc
    else:
        sx = tl.load(epilogue.scale + row * epilogue.scale_stride, mask=is_row, other=0.0)
        sw = tl.load(
            epilogue.weight_scale + column * epilogue.weight_scale_stride, mask=is_column, other=0.0
        )
        scale = sx[:, None] * sw[None, :]
        if epilogue.bias is None:
            y = acc.to(tl.float32) * scale
        else:
            bias = tl.load(epilogue.bias + column, mask=is_column, other=0)
            if epilogue.bias.dtype.element_ty == tl.int32:
                total = acc.to(tl.int64) + bias.to(tl.int64)[None, :]
                y = total.to(tl.float32) * scale
            else:
                y = fma(acc.to(tl.float32), scale, tl.broadcast_to(bias[None, :], acc.shape))
        y = apply_activation(y, epilogue.activation)
        if epilogue.output_scale is None:
            result = y
        else:
            inverse = reciprocal(tl.load(epilogue.output_scale))
            lo = (qmin - zo).to(tl.float32)
            hi = (qmax - zo).to(tl.float32)
            result = quantize(y, inverse, lo, hi, zo)
    return result


@triton.jit
def _halves(x):
    """The left and the right half of the columns."""
    HALF: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, HALF)), (0, 2, 1)))


@triton.jit
def _parts(acc, SUBTILES: tl.constexpr):
    """1, 2 or 4 parts of the columns: an epilogue on all columns needs too many registers."""
    if SUBTILES == 1:
        parts = (acc,)
    elif SUBTILES == 2:
        parts = _halves(acc)
    else:
        tl.static_assert(SUBTILES == 4)
        left, right = _halves(acc)
        parts = _halves(left) + _halves(right)
    return parts


@triton.jit
def _tile_at(tile, tiles_m, tiles_n, BAND: tl.constexpr):
    """Row and column of a tile: tiles go down BAND tile rows, then to the next column."""
    per_band = BAND * tiles_n
    first = tile // per_band * BAND
    height = tl.minimum(tiles_m - first, BAND)
    within = tile % per_band
    return first + within % height, within // height


@triton.jit(do_not_specialize=["m", "zo", "qmin", "qmax"])
def pointer_kernel(
    x_ptr,
    x_stride,
    w_ptr,
    w_stride,
    out_ptr,
    out_stride,
    m,
    n,
    columns,
    epilogue,
    zo,
    qmin,
    qmax,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    SUBTILES: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute one output tile; with SPLIT > 1, share program_id(1) of K, to out[program_id(1)]."""
    tile_m, tile_n = _tile_at(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), BAND)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_at = x_ptr + row.to(tl.int64)[:, None] * x_stride + inner[None, :]
    w_at = w_ptr + column.to(tl.int64)[:, None] * w_stride + inner[None, :]
    is_row = (row < m)[:, None]
    is_column = (column < n)[:, None]

    steps = tl.cdiv(columns, BLOCK_K)
    begin = 0
    if SPLIT > 1:
        share = tl.cdiv(steps, SPLIT)
        begin = tl.program_id(1) * share
        steps = tl.minimum(begin + share, steps)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(begin, steps):
        start = step * BLOCK_K
        if EVEN_K:
            x = tl.load(x_at + start, mask=is_row, other=0)
            w = tl.load(w_at + start, mask=is_column, other=0)
        else:
            inside = (start + inner < columns)[None, :]
            x = tl.load(x_at + start, mask=is_row & inside, other=0)
            w = tl.load(w_at + start, mask=is_column & inside, other=0)
        if epilogue.unsigned:
            x = x ^ -128  # uint8 seen as int8: x - 128
        acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)

    out_rows = out_ptr + row.to(tl.int64)[:, None] * out_stride
    if SPLIT > 1:
        out_rows += tl.program_id(1) * m.to(tl.int64) * out_stride
    PART: tl.constexpr = BLOCK_N // SUBTILES
    parts = _parts(acc, SUBTILES)
    for part in tl.static_range(SUBTILES):
        column = tile_n * BLOCK_N + part * PART + tl.arange(0, PART)
        is_output = is_row & (column < n)[None, :]
        result = parts[part]
        if SPLIT == 1:
            result = _finish(result, row, column, m, n, epilogue, zo, qmin, qmax)
        tl.store(out_rows + column[None, :], result.to(out_ptr.dtype.element_ty), mask=is_output)


@triton.jit(do_not_specialize=["m", "zo", "qmin", "qmax"])
def add_kernel(
    partial_ptr,
    out_ptr,
    out_stride,
    m,
    n,
    epilogue,
    zo,
    qmin,
    qmax,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the partial sums of SPLIT programs, partial[SPLIT, m, n]."""
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = (row < m)[:, None] & (column < n)[None, :]
    plane = m.to(tl.int64) * n
    at = partial_ptr + row.to(tl.int64)[:, None] * n + column[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(at + part * plane, mask=is_output, other=0)
    result = _finish(acc, row, column, m, n, epilogue, zo, qmin, qmax)
    out_at = out_ptr + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=is_output)


@triton.jit(do_not_specialize=["m", "zo", "qmin", "qmax"])
def tma_kernel(
    x_desc,
    w_desc,
    out,
    out_stride,
    m,
    n,
    columns,
    epilogue,
    zo,
    qmin,
    qmax,
    OUT_DESC: tl.constexpr,
    SUBTILES: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute output tiles one after the other; out is a descriptor (OUT_DESC) or a pointer."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    steps = tl.cdiv(columns, BLOCK_K)
    PART: tl.constexpr = BLOCK_N // SUBTILES
    programs = tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=True):
        tile_m, tile_n = _tile_at(tile, tiles_m, tiles_n, BAND)
        first_row = tile_m * BLOCK_M
        first_column = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for step in range(steps):
            x = x_desc.load([first_row, step * BLOCK_K])
            w = w_desc.load([first_column, step * BLOCK_K])
            if epilogue.unsigned:
                x = x ^ -128
            acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)

        row = first_row + tl.arange(0, BLOCK_M)
        parts = _parts(acc, SUBTILES)
        for part in tl.static_range(SUBTILES):
            column = first_column + part * PART + tl.arange(0, PART)
            result = _finish(parts[part], row, column, m, n, epilogue, zo, qmin, qmax)
            if OUT_DESC:
                out.store([first_row, first_column + part * PART], result.to(out.dtype))
            else:
                at = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
                is_output = (row < m)[:, None] & (column < n)[None, :]
                tl.store(at, result.to(out.dtype.element_ty), mask=is_output)
