"""Observed ranges as tensors: updated by a batch, turned into scales and zero points.

These are plain functions that write into tensors. Graphs of torch.compile call them through custom
operators: inside a graph, fusion could round differently, and whether a backward pass is running is
known only at run time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant._extension import load
from torchquant.functional.qparams import qparams_from_range
from torchquant.training.processes import gather, processes_of
from torchquant.training.state import inside_backward

load()


def range_to_qparams(
    min_val: Tensor, max_val: Tensor, qmin: int, qmax: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of observed ranges; +inf and -inf (no data) count as a range of zero.

    Args:
        min_val, max_val: float32 of one shape, as an observer keeps them.
        qmin, qmax, symmetric: see :func:`torchquant.functional.qparams_from_range`.

    Returns:
        ``(scale float32, zero_point int32)`` of min_val's shape.

    Example:
        >>> range_to_qparams(torch.tensor([-1.0]), torch.tensor([3.0]), -128, 127, False)
        (tensor([0.0157]), tensor([-64], dtype=torch.int32))
    """
    empty = min_val > max_val
    return qparams_from_range(
        torch.where(empty, 0.0, min_val),
        torch.where(empty, 0.0, max_val),
        qmin=qmin,
        qmax=qmax,
        symmetric=symmetric,
    )


@torch.no_grad()
def update_range(
    input: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    num_batches: Tensor,
    nonfinite: Tensor,
    axis: int | None,
    group_size: int | None,
    averaging_constant: float | None,
    group_name: str | None,
) -> None:
    """Update an observer's four buffers with one batch, over all processes.

    ``averaging_constant`` is the weight of this batch in a moving average; with None the range only
    grows.
    """
    least, greatest, bad = torch.ops.torchquant.minmax.default(input.detach(), axis, group_size)
    fresh = torch.stack([least, greatest])
    if processes_of(group_name) > 1:
        # float64 holds float32 values and counts exactly, so one collective carries all three.
        everyone = gather(torch.cat([fresh.flatten().double(), bad.double()]), group_name)
        size = least.numel()
        ends = torch.stack([everyone[:, :size].amin(0), everyone[:, size:-1].amax(0)])
        fresh = ends.float().view(fresh.shape)
        bad = everyone[:, -1:].sum(0).long()
    if averaging_constant is None:
        min_val.copy_(torch.minimum(min_val, fresh[0]))
        max_val.copy_(torch.maximum(max_val, fresh[1]))
    else:
        old = torch.stack([min_val, max_val])
        # In float64 the difference cannot overflow.
        mixed = (old.double() + averaging_constant * (fresh.double() - old.double())).float()
        updated = torch.where(fresh.isinf(), old, torch.where(old.isinf(), fresh, mixed))
        min_val.copy_(updated[0])
        max_val.copy_(updated[1])
    num_batches.add_(1)
    nonfinite.add_(bad)


@torch.no_grad()
def update_qparams(
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    symmetric: bool,
) -> None:
    """Write the scale and the zero point of an observed range into two buffers."""
    new_scale, new_zero_point = range_to_qparams(min_val, max_val, qmin, qmax, symmetric)
    scale.copy_(new_scale)
    zero_point.copy_(new_zero_point)


@torch.library.custom_op(
    "torchquant_training::update_range_",
    mutates_args=("min_val", "max_val", "num_batches", "nonfinite"),
)
def update_range_operator(
    input: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    num_batches: Tensor,
    nonfinite: Tensor,
    axis: int | None,
    group_size: int | None,
    averaging_constant: float | None,
    group_name: str | None,
) -> None:
    """:func:`update_range` as one opaque step of a compiled graph; not in a backward pass."""
    if not inside_backward():
        state = (min_val, max_val, num_batches, nonfinite)
        update_range(input, *state, axis, group_size, averaging_constant, group_name)


@torch.library.custom_op(
    "torchquant_training::update_qparams_", mutates_args=("scale", "zero_point")
)
def update_qparams_operator(
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    symmetric: bool,
) -> None:
    """:func:`update_qparams` as one opaque step of a compiled graph; not in a backward pass."""
    if not inside_backward():
        update_qparams(min_val, max_val, scale, zero_point, qmin, qmax, symmetric)


__all__ = ["range_to_qparams"]
