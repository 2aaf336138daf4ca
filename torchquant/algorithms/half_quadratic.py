"""hqq: scales and zero points without data, by half-quadratic optimization.

The sum ``sum |w - s (q - z)|^p`` with p below 1 forgives the few weights that a range cuts off, and
counts the many small errors. Half-quadratic optimization splits the error of each weight into a
part e, which a shrinkage formula gives, and a rest with a squared error, which has a closed
solution::

    e = shrink(w - s (q - z))
    s, z = least squares of w - e on q
    q = round(w / s) + z

The paper keeps the scale of the range and moves a real-valued zero point alone. The kernels have
integer zero points, so both are fitted here: the zero point is rounded in each iteration, and the
scale then fitted to it. Symmetric weights have a scale only. The best iteration counts, by the sum
above.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchquant.algorithms.integer_weight import IntegerWeight, check_weights, rounded
from torchquant.algorithms.least_error import (
    column_groups,
    fitted_parameters,
    range_parameters,
    steps_of,
)
from torchquant.configs import Weights
from torchquant.scheme import PerGroup, PerTensor

__all__ = ["hqq", "shrink"]


@torch.no_grad()
def hqq(
    weight: Tensor,
    weights: Weights,
    *,
    norm: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    iterations: int = 20,
) -> IntegerWeight:
    """Round a weight on scales and zero points that half-quadratic optimization finds.

    Args:
        weight: float32, bfloat16 or float16 ``[N, K]``; finite.
        weights: per tensor, per output channel or in groups.
        norm: p, more than 0 and at most 1.
        beta: how closely e follows the errors at first; errors are measured in steps of the scale,
            so that the size of the weights does not matter.
        growth: what beta is multiplied by after each iteration.
        iterations: the greatest number of iterations.

    Returns:
        The integers. No channel or group has a greater ``sum |w - s (q - z)|^p`` than with the
        scale of its range.

    Raises:
        TypeError: weight is not a float tensor, or weights is not a :class:`torchquant.Weights`.
        ValueError: a shape is wrong, the weight is not finite, or a number is out of range.

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023).

    Example:
        >>> weight = torch.cat([torch.linspace(-1, 1, 63), torch.tensor([4.0])]).view(1, 64)
        >>> bool(hqq(weight, Weights(4)).scale < 4 / 7)
        True
    """
    check_weights("hqq", weight, weights)
    _check(weight, norm, beta, growth, iterations)
    columns = weight.detach().float().t().contiguous()  # [K, N]
    shared = weights.granularity == PerTensor()
    scales, zeros = [], []
    for part in column_groups(weight.shape[1], weights):
        scale, zero = range_parameters(columns[part], weights, shared=shared)
        best, least = (scale, zero), _sum(columns[part], scale, zero, weights, norm, shared)
        strength = beta
        for _ in range(iterations):
            steps = steps_of(columns[part], scale, zero, weights)
            size = scale.unsqueeze(-2)
            sparse = shrink(columns[part] / size - steps, norm, strength) * size
            rest = columns[part] - sparse
            scale, zero = fitted_parameters(rest, steps, scale, zero, weights, shared=shared)
            found = _sum(columns[part], scale, zero, weights, norm, shared)
            better = found < least
            least = torch.where(better, found, least)
            best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
            strength *= growth
        scales.append(best[0])
        zeros.append(best[1])
    grouped = isinstance(weights.granularity, PerGroup)
    scale, zero = (torch.stack(some, 1) if grouped else some[0] for some in (scales, zeros))
    return rounded(weight, weights, scale, None if weights.symmetric else zero.to(torch.int8))


def shrink(error: Tensor, norm: float, beta: float) -> Tensor:
    """The part of an error that ``|e|^p`` pays for: small errors give 0.

    Example:
        >>> shrink(torch.tensor([-1.0, 0.01]), norm=0.7, beta=10.0)
        tensor([-0.9000,  0.0000])
    """
    size = error.abs()
    return error.sign() * (size - size.pow(norm - 1) / beta).relu_()


def _sum(
    columns: Tensor, scale: Tensor, zero: Tensor, weights: Weights, norm: float, shared: bool
) -> Tensor:
    """``sum |w - s (q - z)|^p`` of each output; of all outputs if they share a scale."""
    steps = steps_of(columns, scale, zero, weights)
    found = (columns - steps * scale.unsqueeze(-2)).abs().pow(norm).sum(-2)
    return found.sum().expand_as(found) if shared else found


def _check(weight: Tensor, norm: float, beta: float, growth: float, iterations: int) -> None:
    if not bool(weight.isfinite().all()):
        raise ValueError("hqq: weight must be finite, got NaN or infinities")
    if not 0 < norm <= 1:
        raise ValueError(f"hqq: norm must be more than 0 and at most 1, got {norm!r}")
    for name, value in (("beta", beta), ("growth", growth)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"hqq: {name} must be a positive finite number, got {value!r}")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"hqq: iterations must be an integer of at least 0, got {iterations!r}")
