"""The norm operators, on Triton's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.triton.kernels import norms as kernels
from torchquant.triton.kernels.tiles import MOST_SPANS
from torchquant.triton.launch import launch, next_power_of_2
from torchquant.triton.ops.arguments import FLOATS, row_stride

_ROW_STEPS = 16  # steps whose loads are in flight at the same time: 64 registers


def rms_norm(
    input: Tensor, weight: Tensor | None, eps: float, cast_before_weight: bool = False
) -> Any:
    """See :func:`torchquant.ops.rms_norm`."""
    return _norm(input, weight, None, eps, None, centered=False, cast=cast_before_weight)


def layer_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
) -> Any:
    """See :func:`torchquant.ops.layer_norm`."""
    return _norm(input, weight, bias, eps, residual, centered=True)


def _norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    centered: bool,
    cast: bool = False,
) -> Any:
    if input.numel() == 0 or input.dim() == 0 or input.dtype not in FLOATS:
        return NotImplemented
    k = input.shape[-1]
    count = input.numel() // k
    for channels in (weight, bias):
        if channels is not None and not (
            channels.dtype in FLOATS
            and tuple(channels.shape) == (k,)
            and channels.device == input.device
        ):
            return NotImplemented
    if residual is not None and not (
        residual.dtype == input.dtype
        and residual.shape == input.shape
        and residual.device == input.device
    ):
        return NotImplemented
    supported = 0.0 <= eps <= torch.finfo(torch.float32).max and (
        bias is None or weight is not None
    )
    if not supported or count >= MOST_SPANS or k >= MOST_SPANS:
        return NotImplemented
    x, x_stride = _rows(input)
    second, second_stride = (x, x_stride) if residual is None else _rows(residual)
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    blocks = -(-count // kernels.ROWS)
    row_bytes = k * input.element_size() * (1 if residual is None else 2)
    cached = kernels.CACHED_BYTES // (kernels.ROWS * row_bytes)
    launch(
        kernels.norm_kernel,
        (min(blocks, max(cached, kernels.LEAST_PROGRAMS)),),
        input.device,
        x,
        second,
        out if weight is None else weight.contiguous(),
        out if bias is None else bias.contiguous(),
        out,
        count,
        k,
        x_stride,
        second_stride,
        float(k),
        eps,
        CENTERED=centered,
        RESIDUAL=residual is not None,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        CAST=cast,
        ROWS=kernels.ROWS,
        COLUMNS=min(kernels.COLUMNS, next_power_of_2(k)),
        STEPS=min(_ROW_STEPS, next_power_of_2((k + 15) // 16)),
        num_warps=1,
    )
    return out


def _rows(input: Tensor) -> tuple[Tensor, int]:
    """A tensor whose rows are contiguous, and the distance between them."""
    stride = row_stride(input)
    return (input.contiguous(), input.shape[-1]) if stride is None else (input, stride)
