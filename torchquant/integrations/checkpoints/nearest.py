"""The nearest weight of our formats to one that they do not hold exactly.

Rows are dequantized a few at a time, so no float copy of a whole weight exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torchquant.configs import Weights
from torchquant.integrations.checkpoints.stored import Integers, StoredWeight
from torchquant.nn.intx_weight import integers_of, values_of
from torchquant.scheme import PerGroup

GROUP = 32  # inputs that share a scale
_CHUNK = 1 << 20  # weights that are floats at once
_SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # parts of the range that are tried


def nearest(stored: StoredWeight, bits: int) -> tuple[Integers, float]:
    """Integers near the values of a stored weight, and their relative error.

    The layout's own way is taken if it has one. Otherwise groups of 32 inputs get scales and zero
    points of their range, or of a part of it with a smaller squared error.

    Returns:
        The integers, and the root of the squared error over the squared weights.
    """
    found = stored.nearest(bits)
    if found is not None:
        return found
    size = min(GROUP, stored.shape[1])
    weights = Weights(bits, symmetric=False, granularity=PerGroup(size))
    parts = []
    for first, last in row_chunks(stored.shape):
        parts.append(least_error(stored.rows(first, last), weights, size))
    qweight, scale, zero_point = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    integers = Integers(qweight, scale, zero_point, weights)
    return integers, relative_error(stored, integers)


def row_chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of pieces of a weight with about a million values.

    Example:
        >>> list(row_chunks((3, 1 << 19)))
        [(0, 2), (2, 3)]
    """
    step = max(1, _CHUNK // max(1, shape[1]))
    for first in range(0, shape[0], step):
        yield first, min(shape[0], first + step)


def relative_error(stored: StoredWeight, integers: Integers) -> float:
    """The root of the squared error of integers over the squared values of a stored weight."""
    error = norm = 0.0
    for first, last in row_chunks(stored.shape):
        values = stored.rows(first, last)
        rows = slice(first, last)
        zero = None if integers.zero_point is None else integers.zero_point[rows]
        ours = values_of(integers.qweight[rows], integers.scale[rows], zero, integers.weights)
        error += float((ours - values).double().square().sum())
        norm += float(values.double().square().sum())
    return math.sqrt(error / norm if norm > 0 else error)


def least_error(values: Tensor, weights: Weights, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, scales and zero points with the least squared error among a few ranges.

    Example:
        >>> weights = Weights(8, symmetric=False, granularity=PerGroup(2))
        >>> q, scale, zero = least_error(torch.tensor([[0.0, 255.0]]), weights, 2)
        >>> (q.int() - zero) * scale
        tensor([[  0., 255.]])
    """
    qweight, scale, zero_point = integers_of(values, weights)
    assert zero_point is not None
    if weights.bits == 8:  # no smaller range has a smaller error
        return qweight, scale, zero_point
    error = squared_errors(values, qweight, scale, zero_point, weights, size)
    whole = scale
    for part in _SHRUNK[1:]:
        # The ends of the range move towards zero, so the zero point stays.
        tried = integers_of(values, weights, whole * part, zero_point)[0]
        new = squared_errors(values, tried, whole * part, zero_point, weights, size)
        better = new < error
        columns = better.repeat_interleave(size, 1)[:, : values.shape[1]]
        qweight = torch.where(columns, tried, qweight)
        scale = torch.where(better, whole * part, scale)
        error = torch.where(better, new, error)
    return qweight, scale, zero_point


def squared_errors(
    values: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor, weights: Weights, size: int
) -> Tensor:
    """The sum of squared errors in each group of ``size`` inputs."""
    error = (values_of(qweight, scale, zero, weights) - values).square()
    padded = torch.nn.functional.pad(error, (0, -values.shape[1] % size))
    total: Tensor = padded.unflatten(1, (-1, size)).sum(2)
    return total


__all__ = ["least_error", "row_chunks"]
