"""What the wrappers do with their arguments before C++ checks the rest."""

from __future__ import annotations

from torch import Tensor

from torchquant.functional._checks import describe, scale_tensor, zero_point_tensor
from torchquant.scheme import Granularity, PerAxis, PerGroup, PerTensor, PerToken


def layout_arguments(who: str, granularity: Granularity, input: Tensor) -> dict[str, int]:
    """A granularity as the operators' ``axis`` or ``group_size``."""
    if isinstance(granularity, PerTensor):
        return {}
    if isinstance(granularity, PerAxis):
        return {"axis": granularity.normalized_axis(input.shape)}
    if isinstance(granularity, PerGroup):
        return {"group_size": granularity.group_size}
    if isinstance(granularity, PerToken):
        granularity.scale_shape(input.shape)  # raises for a 0-dimensional input
        return {"group_size": max(1, input.shape[-1])}
    raise TypeError(
        f"{who}: granularity must be PerTensor(), PerAxis(axis), PerGroup(group_size) or "
        f"PerToken(), got {describe(granularity)}"
    )


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
