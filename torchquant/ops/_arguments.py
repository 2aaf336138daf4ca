"""What the wrappers do with their arguments before C++ checks the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.functional._checks import describe, scale_tensor, zero_point_tensor
from torchquant.scheme import Granularity


def layout_arguments(who: str, granularity: Granularity, input: Tensor) -> dict[str, int]:
    """A granularity as the operators' ``axis`` or ``group_size``."""
    if not isinstance(granularity, Granularity):
        raise TypeError(
            f"{who}: granularity must be PerTensor(), PerAxis(axis), PerGroup(group_size) or "
            f"PerToken(), got {describe(granularity)}"
        )
    axis, group_size = granularity.axis_and_group_size(input.shape)
    if axis is not None:
        return {"axis": axis}
    return {} if group_size is None else {"group_size": group_size}


def numbers_to_tensors(
    who: str,
    scale: float | Tensor,
    zero_point: int | Tensor | None,
    input: Tensor,
    low: int,
    high: int,
) -> tuple[Tensor, Tensor | None]:
    """Numbers as one-element tensors on input's device; tensors as they are, for C++ to check."""
    if not isinstance(scale, Tensor):
        scale = scale_tensor(who, "scale", scale, input.device, (1,))
    if zero_point is not None and not isinstance(zero_point, Tensor):
        zero_point = zero_point_tensor(
            who, "zero_point", zero_point, input.device, low, high, (1,), allow_real=True
        )
    return scale, zero_point


def has_kernels(tensor: Tensor) -> bool:
    """True for a tensor on the CPU or on a CUDA device: the operators have kernels for these."""
    return tensor.is_cpu or tensor.is_cuda


def wait_for_copy(before: Tensor, after: Tensor) -> None:
    """Wait until ``after``, a copy of ``before``, holds its values.

    ``.to("cpu", non_blocking=True)`` returns before the GPU has written them; reading them on the
    host any earlier gives garbage.
    """
    if before.is_cuda and after.is_cpu and torch.cuda.is_initialized():
        torch.cuda.current_stream(before.device).synchronize()


def layout_of(device: torch.device) -> str:
    """The layout of packed weights on a device.

    "rows" on CUDA (csrc/formats/int8_rows.h), "tiles" otherwise (csrc/formats/int8_tiles.h).
    """
    return "rows" if device.type == "cuda" else "tiles"


def packed_shape(out_features: Any, in_features: Any, device: torch.device) -> tuple[Any, Any]:
    """Shape of :func:`pack_weight`'s result on a device; also for symbolic sizes."""
    tiles, width = (out_features + 15) // 16, (in_features + 63) // 64 * 64
    if layout_of(device) == "tiles":
        return tiles, width * 16 + 128
    return tiles * 16 + (tiles * 64 + width - 1) // width, width  # int32 sums after the rows
