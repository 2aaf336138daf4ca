"""The operators of affine quantization, on Triton's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.triton.kernels import affine as kernels
from torchquant.triton.kernels import rows as row_kernels
from torchquant.triton.kernels import tiles
from torchquant.triton.launch import launch
from torchquant.triton.ops.arguments import (
    FLOATS,
    INTEGERS,
    as_rows,
    flat,
    is_per_channel,
    is_single,
    kind_of_zero_point,
    spans_for,
    supports_rows,
    zero_point_step,
)


def quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.int8,
) -> Any:
    """See :func:`torchquant.ops.quantize`."""
    spans = spans_for(input, scale, axis, group_size)
    zero = kind_of_zero_point(zero_point, scale)
    if spans is None or zero is None or input.dtype not in FLOATS or dtype not in INTEGERS:
        return NotImplemented
    limits = torch.iinfo(dtype)
    if not limits.min <= qmin < qmax <= limits.max:
        return NotImplemented
    tiling = tiles.tiles_of(spans)
    assert tiling is not None
    out = torch.empty(input.shape, dtype=dtype, device=input.device)
    scale = scale.contiguous()
    launch(
        kernels.quantize_kernel,
        (tiling.programs,),
        input.device,
        input.contiguous(),
        scale,
        scale if zero_point is None else zero_point.contiguous(),
        out,
        zero_point_step(zero_point, scale),
        float(qmin),
        float(qmax),
        ZERO=zero,
        **tiling.arguments(),
    )
    return out


def dequantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """See :func:`torchquant.ops.dequantize`."""
    spans = spans_for(input, scale, axis, group_size)
    zero = kind_of_zero_point(zero_point, scale)
    if spans is None or zero is None or input.dtype not in INTEGERS or dtype not in FLOATS:
        return NotImplemented
    tiling = tiles.tiles_of(spans)
    assert tiling is not None
    out = torch.empty(input.shape, dtype=dtype, device=input.device)
    scale = scale.contiguous()
    launch(
        kernels.dequantize_kernel,
        (tiling.programs,),
        input.device,
        input.contiguous(),
        scale,
        scale if zero_point is None else zero_point.contiguous(),
        out,
        zero_point_step(zero_point, scale),
        ZERO=zero,
        **tiling.arguments(),
    )
    return out


def quantize_per_token(input: Tensor, symmetric: bool = True) -> Any:
    """See :func:`torchquant.ops.quantize_per_token`."""
    return _per_token(input, -127 if symmetric else -128, 127, symmetric)


def quantize_rows(
    input: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    symmetric: bool,
) -> Any:
    """See :func:`torchquant.ops.quantize_rows`."""
    single = is_single(scale, torch.float32) and is_single(zero_point, torch.int32)
    if not single or (scale is None and zero_point is not None):
        return NotImplemented
    if not _is_range(qmin, qmax, symmetric and scale is None):
        return NotImplemented
    return _per_token(input, qmin, qmax, symmetric, scale, zero_point)


def quantize_pack(
    weight: Tensor, scale: Tensor | None, qmin: int, qmax: int, symmetric: bool
) -> Any:
    """See :func:`torchquant.ops.quantize_pack`."""
    supported = supports_rows(weight, FLOATS, scale) and weight.dim() == 2
    if not supported or not _is_range(qmin, qmax, symmetric and scale is None):
        return NotImplemented
    if not is_per_channel(scale, weight.shape[0], torch.float32):
        return NotImplemented
    return row_kernels.quantize_pack(
        as_rows(weight), flat(scale), qmin=qmin, qmax=qmax, symmetric=symmetric
    )


def _per_token(
    input: Tensor,
    qmin: int,
    qmax: int,
    symmetric: bool,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Any:
    if not supports_rows(input, FLOATS, scale, zero_point):
        return NotImplemented
    rows = as_rows(input)
    q = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    quantized = row_kernels.quantize_rows(
        rows,
        q,
        qmin=qmin,
        qmax=qmax,
        symmetric=symmetric,
        scale=flat(scale),
        zero_point=flat(zero_point),
    )
    token = (*input.shape[:-1], 1)
    return (
        q.view(input.shape),
        quantized.scale.view(token),
        quantized.zero_point.view(token),
    )


def _is_range(qmin: int, qmax: int, own_symmetric: bool) -> bool:
    """True for a range that int8 rows can have; own_symmetric: with a symmetric scale per row."""
    return -128 <= qmin <= 0 < qmax <= 127 and (qmin <= -qmax or not own_symmetric)
