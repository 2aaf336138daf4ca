"""Checks of arguments that the operators of several families share.

The functions answer whether Triton's kernels support an argument. An operator returns
``NotImplemented`` where they do not: the ATen fallback then computes the call, or raises the error.
No function reads the values inside a tensor, which would wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchquant.triton.kernels.rows import MAX_COLUMNS
from torchquant.triton.kernels.tiles import Spans, spans_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.uint8)


# ---------------------------------------------------------------- rows and channels


def supports_rows(input: Tensor, dtypes: Sequence[torch.dtype], *others: Tensor | None) -> bool:
    """True if the row kernels take ``input`` and all ``others`` are on its device."""
    if input.dtype not in dtypes or input.dim() == 0 or input.numel() == 0:
        return False
    if input.shape[-1] > MAX_COLUMNS or input.numel() // input.shape[-1] > 2**31 - 2**16:
        return False
    return all(other is None or other.device == input.device for other in others)


def is_single(tensor: Tensor | None, dtype: torch.dtype) -> bool:
    """True for one value of type ``dtype``, and for None."""
    return tensor is None or (tensor.dtype == dtype and tensor.numel() == 1 and tensor.dim() <= 1)


def is_per_channel(
    tensor: Tensor | None, n: int, dtype: torch.dtype, single_allowed: bool = True
) -> bool:
    """True for one value per output channel, for a single value where allowed, and for None."""
    if tensor is None:
        return True
    return (tensor.dtype == dtype and tensor.shape == (n,)) or (
        single_allowed and is_single(tensor, dtype)
    )


def as_kernel_bias(bias: Tensor | None) -> Tensor | None:
    """``bias`` as the kernels read it: float32 in place of bfloat16 and float16, which is exact."""
    if bias is None or bias.dtype not in (torch.bfloat16, torch.float16):
        return bias
    return bias.to(torch.float32)


def is_per_row(tensor: Tensor | None, input: Tensor, dtype: torch.dtype) -> bool:
    """True for one value, one per row of ``input`` (``[...]`` or ``[..., 1]``), and None."""
    if is_single(tensor, dtype):
        return True
    assert tensor is not None
    leading = input.shape[:-1]
    return tensor.dtype == dtype and tensor.shape in (leading, (*leading, 1))


def as_rows(x: Tensor) -> Tensor:
    """``x`` as ``[M, K]`` with last stride 1; a copy only where the strides require one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def flat(tensor: Tensor | None) -> Tensor | None:
    """The tensor with one dimension, contiguous; None stays None."""
    return None if tensor is None else tensor.reshape(-1).contiguous()


def row_stride(input: Tensor) -> int | None:
    """The distance between rows along the last dimension, in elements.

    None where a row is not contiguous, or where the rows have no common distance.
    """
    if input.dim() == 0 or (input.shape[-1] != 1 and input.stride(-1) != 1):
        return None
    stride = None
    expected = 0
    for size, step in zip(reversed(input.shape[:-1]), reversed(input.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = expected = step
        elif step != expected:
            return None
        expected *= size
    return input.shape[-1] if stride is None else stride


# ---------------------------------------------------------------- scales of every granularity


def spans_for(
    input: Tensor, scale: Tensor, axis: int | None, group_size: int | None
) -> Spans | None:
    """The spans of ``input`` that share a scale; None if ``scale`` does not have their shape."""
    found = spans_of(input.shape, axis, group_size)
    if found is None or scale.dtype != torch.float32 or scale.device != input.device:
        return None
    spans, shape = found
    if axis is None and group_size is None:
        return spans if scale.numel() == 1 else None
    return spans if tuple(scale.shape) == shape else None


def kind_of_zero_point(zero_point: Tensor | None, scale: Tensor) -> str | None:
    """ "none", "integer" or "real"; None if the zero point does not fit the scale."""
    if zero_point is None:
        return "none"
    if zero_point.device != scale.device:
        return None
    if not (zero_point.numel() == 1 and zero_point.dim() <= 1) and zero_point.shape != scale.shape:
        return None
    return {torch.int32: "integer", torch.float32: "real"}.get(zero_point.dtype)


def zero_point_step(zero_point: Tensor | None, scale: Tensor) -> int:
    """The distance between the zero points of two scales: 0 where all scales share one."""
    return 0 if zero_point is None or zero_point.numel() < scale.numel() else 1


def matches_scale(tensor: Tensor | None, scale: Tensor, dtype: torch.dtype) -> bool:
    """True for a tensor of the scale's shape and device, and for None."""
    return tensor is None or (
        tensor.dtype == dtype and tensor.shape == scale.shape and tensor.device == scale.device
    )
