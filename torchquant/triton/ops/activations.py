"""The activation operators, on Triton's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.functional.activations import ACTIVATIONS
from torchquant.triton.kernels import activations as kernels
from torchquant.triton.kernels import tiles
from torchquant.triton.kernels.tiles import Spans
from torchquant.triton.launch import launch
from torchquant.triton.ops.arguments import FLOATS, row_stride


def activation(input: Tensor, activation: str, dtype: torch.dtype | None = None) -> Any:
    """See :func:`torchquant.ops.activation`."""
    return _activation(input, None, activation, input.dtype if dtype is None else dtype)


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Any:
    """See :func:`torchquant.ops.gated_activation`."""
    if up.dtype != gate.dtype or up.shape != gate.shape or up.device != gate.device:
        return NotImplemented
    return _activation(gate, up, activation, gate.dtype)


def _activation(gate: Tensor, up: Tensor | None, activation: str, dtype: torch.dtype) -> Any:
    supported = gate.dtype in FLOATS and dtype in FLOATS and activation in ACTIVATIONS
    if not supported or gate.numel() == 0:
        return NotImplemented
    # A dense tensor is read in the order of its memory, whatever the order of its dimensions. Rows
    # with gaps between them (one half of a fused projection) are read row by row.
    out = torch.empty_like(gate, dtype=dtype)
    n = out.numel()
    sources = [_elementwise_source(t, out) for t in (gate, gate if up is None else up)]
    count, length = 1, n
    if any(stride is not None for _, stride in sources):
        length = out.shape[-1]
        count = n // length
    (x, x_stride), (y, y_stride) = ((t, length if s is None else s) for t, s in sources)
    if count >= tiles.MOST_SPANS:
        return NotImplemented
    tiling = tiles.tiles_of(Spans("span", count, length, length, 1, count))
    assert tiling is not None
    launch(
        kernels.activation_kernel,
        (tiling.programs,),
        gate.device,
        x,
        y,
        out,
        count,
        length,
        x_stride,
        y_stride,
        ACTIVATION=activation,
        GATED=up is not None,
        ROWS=tiling.rows,
        COLUMNS=tiling.columns,
        num_warps=tiling.warps,
    )
    return out


def _elementwise_source(input: Tensor, out: Tensor) -> tuple[Tensor, int | None]:
    """``input`` in the order of ``out``'s memory; the distance between rows that have gaps."""
    if input.stride() == out.stride() or (input.is_contiguous() and out.is_contiguous()):
        return input, None
    if out.is_contiguous() and (stride := row_stride(input)) is not None:
        return input, stride
    return torch.empty_like(out, dtype=input.dtype).copy_(input.detach()), None
