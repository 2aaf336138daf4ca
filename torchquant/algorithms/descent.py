"""Coordinate descent: better single integers and scales of a weight, one after the other.

The error of a layer's outputs is a quadratic form of the change E of its weight,
``trace(E H E^T)``. Along a single integer, and along the scale of a group, it is a parabola, whose
least point is known from ``R = H E``. Each step goes to the integer nearest this point, or to the
scale at it, so that no step makes the error greater.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from torchquant.algorithms.least_error import column_groups
from torchquant.configs import Weights
from torchquant.functional._arithmetic import reciprocal
from torchquant.functional._checks import MIN_SCALE

__all__ = ["descend"]

Limits: TypeAlias = tuple[Any, Any]  # numbers or tensors

_BLOCK = 64  # columns that are rounded again before R changes as a whole


@torch.no_grad()
def descend(
    columns: Tensor,
    hessian: Tensor,
    steps: Tensor,
    scale: Tensor,
    zero: Tensor,
    weights: Weights,
    *,
    sweeps: int,
    shared: bool = False,
) -> None:
    """Improve integers and scales, in place.

    Args:
        columns: float32 ``[G, K, n]``, the weight.
        hessian: float32 ``[G, K, K]`` with a positive diagonal.
        steps: float32 ``[G, K, n]``, the integers minus their zero points.
        scale: float32 ``[G, groups, n]``.
        zero: float32 ``[G, groups, n]``, the zero points, which stay as they are.
        weights: bits, symmetry and groups.
        sweeps: how often each scale and each integer is improved.
        shared: whether all outputs share a scale.

    Example:
        >>> columns, hessian = torch.tensor([[[1.0], [0.45]]]), torch.tensor([[[2.0, 1], [1, 1]]])
        >>> steps, scale = torch.tensor([[[1.0], [1.0]]]), torch.ones(1, 1, 1)
        >>> descend(columns, hessian, steps, scale, torch.zeros(1, 1, 1), Weights(4), sweeps=1)
        >>> steps.flatten(), scale.flatten()
        (tensor([1., 1.]), tensor([0.7800]))
    """
    parts = column_groups(columns.shape[1], weights)
    sizes = torch.tensor([part.stop - part.start for part in parts], device=scale.device)
    residual = hessian @ (columns - steps * scale.repeat_interleave(sizes, 1))
    for _ in range(sweeps):
        for group, part in enumerate(parts):
            limits = _limits(zero[:, group], weights)
            found = (steps[:, part], scale[:, group])
            if len(parts) == 1:
                _improve(hessian, residual, *found, limits, shared)
                continue
            before = found[0] * found[1].unsqueeze(1)
            _improve(hessian[:, part, part], residual[:, part].clone(), *found, limits, shared)
            change = found[0] * found[1].unsqueeze(1) - before
            residual.baddbmm_(hessian[:, :, part], change, alpha=-1)


def _improve(
    hessian: Tensor, residual: Tensor, steps: Tensor, scale: Tensor, limits: Limits, shared: bool
) -> None:
    """Improve the scale ``[G, n]`` of some columns, and their integers, in place.

    All other tensors are those of these columns; ``residual`` is R, which follows the changes.
    """
    _fit_scale(hessian, residual, steps, scale, shared)
    inverse = reciprocal(scale)
    for first in range(0, steps.shape[1], _BLOCK):
        block = slice(first, first + _BLOCK)
        inner = hessian[:, block, block]
        diagonal = inner.diagonal(dim1=1, dim2=2).unsqueeze(2)
        # How far each column is from the least point of its parabola, and what moves this point.
        distance, ratio = residual[:, block] / diagonal, (inner / diagonal).unsqueeze(3)
        change = torch.empty_like(distance)
        for column in range(distance.shape[1]):
            before, moved = steps[:, first + column], change[:, column]
            after = torch.addcmul(before, distance[:, column], inverse).round_().clamp_(*limits)
            torch.sub(after, before, out=moved).mul_(scale)
            before.copy_(after)
            later = distance[:, column + 1 :]
            later.addcmul_(ratio[:, column + 1 :, column], moved.unsqueeze(1), value=-1)
        residual.baddbmm_(hessian[:, :, block], change, alpha=-1)


def _fit_scale(
    hessian: Tensor, residual: Tensor, steps: Tensor, scale: Tensor, shared: bool
) -> None:
    """Move a scale to the least point of its parabola."""
    product = hessian @ steps
    slope, curvature = (steps * residual).sum(1), (steps * product).sum(1)
    if shared:
        slope, curvature = (total.sum().expand_as(scale) for total in (slope, curvature))
    fitted = scale + slope / curvature
    fitted = torch.where(fitted.isfinite() & (fitted >= MIN_SCALE), fitted, scale)
    residual.addcmul_(product, (fitted - scale).unsqueeze(1), value=-1)
    scale.copy_(fitted)


def _limits(zero: Tensor, weights: Weights) -> Limits:
    """The least and greatest ``q - z``."""
    qmin, qmax = weights.range
    return (qmin, qmax) if weights.symmetric else (qmin - zero, qmax - zero)
