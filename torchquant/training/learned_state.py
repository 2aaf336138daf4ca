"""Initial values and projections that the learned quantizers write into their parameters.

These are plain functions that write into tensors. Graphs of torch.compile call them through custom
operators: inside a graph, fusion could round differently, and autograd would count a parameter that
the graph writes as modified since it was saved.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchquant.functional._checks import MIN_SCALE
from torchquant.training.processes import gather
from torchquant.training.range_search import least_squares_range
from torchquant.training.state import inside_backward


@torch.no_grad()
def project(step: Tensor, offset: Tensor | None, qmin: int, qmax: int) -> None:
    """Make steps positive and keep the offsets' zero points within [qmin, qmax]; NaN stays NaN."""
    step.clamp_(min=MIN_SCALE)
    if offset is not None:
        offset.clamp_(min=-qmax * step, max=-qmin * step)


@torch.no_grad()
def initialize(
    input: Tensor,
    step: Tensor,
    offset: Tensor | None,
    initialized: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    group_name: str | None,
) -> bool:
    """Write the first step and offset. Returns False, and writes nothing, if all values are 0.

    The values that share a step are slices along ``axis``, runs of ``group_size`` values along the
    last axis, or all of them.
    """
    x = input.detach()
    if group_size is not None:
        rows = _groups(x, group_size)
    elif axis is not None:
        rows = x.movedim(axis, 0).reshape(x.shape[axis], -1)
    else:
        rows = x.reshape(1, -1)
    if offset is None:
        first = _mean_step(rows, qmax, group_name)
    else:
        found = least_squares_range(rows, qmin, qmax, group_name)
        first = None if found is None else found[0]
        if found is not None:
            offset.copy_((-found[1] * found[0]).view_as(offset))
    if first is None:
        return False
    step.copy_(first.view_as(step))
    initialized.fill_(1)
    return True


def _groups(x: Tensor, group_size: int) -> Tensor:
    """The groups of x as rows; NaN, which does not count, fills up the last group of each run."""
    missing = -x.shape[-1] % group_size
    filled = torch.nn.functional.pad(x, (0, missing), value=math.nan) if missing else x
    return filled.reshape(-1, group_size)


def _mean_step(rows: Tensor, qmax: int, group_name: str | None) -> Tensor | None:
    """``2 * mean|v| / sqrt(Qp)`` of each row over all processes, or None if all values are 0."""
    finite = rows.isfinite()
    # Sums and counts, so that processes with batches of different sizes are weighted correctly.
    total = torch.where(finite, rows, 0.0).abs().sum(1, dtype=torch.float64)
    everyone = gather(torch.cat([total, finite.sum(1).double()]), group_name).sum(0)
    total, count = everyone.chunk(2)
    step = 2.0 * (total / count.clamp(min=1.0)) / math.sqrt(qmax)
    empty = step == 0
    if bool(empty.all()):
        return None
    # A channel of zeros gets the mean step of the others: its values may change in training.
    step = torch.where(empty, step.sum() / (~empty).sum(), step)
    return step.clamp(MIN_SCALE, torch.finfo(torch.float32).max).float()


@torch.library.custom_op(
    "torchquant_training::lsq_initialize_", mutates_args=("step", "offset", "initialized")
)
def initialize_operator(
    input: Tensor,
    step: Tensor,
    offset: Tensor | None,
    initialized: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    group_name: str | None,
) -> None:
    """:func:`initialize` in a compiled graph that was traced before the step was initialised."""
    if not inside_backward() and not bool(initialized.item()):
        initialize(input, step, offset, initialized, qmin, qmax, axis, group_size, group_name)


@torch.library.custom_op("torchquant_training::lsq_project_", mutates_args=("step", "offset"))
def project_operator(step: Tensor, offset: Tensor | None, qmin: int, qmax: int) -> None:
    """:func:`project` as one opaque step of a compiled graph."""
    project(step, offset, qmin, qmax)


@torch.library.custom_op("torchquant_training::clamp_", mutates_args=("value",))
def clamp_operator(value: Tensor, least: float) -> None:
    """``value`` at least ``least``, as one opaque step of a compiled graph."""
    value.clamp_(min=least)
