"""AdaRound: learn for each weight whether to round it down or up.

The error of a layer is measured at its outputs, on captured inputs, and not at its weights. For a
matrix product this error depends on the inputs only through their second moments, so that the
inputs themselves need not be kept:

``sum |Q x' - W x|^2 = trace(Q A Q^T) - 2 trace(W B Q^T) + constant``

with ``A = sum x' x'^T`` and ``B = sum x x'^T``, where x is the input in the float model and x' in
the quantized model. Each iteration therefore sees all inputs, and its cost does not depend on
their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "Settings", "adaptive_rounding", "least_error_scale", "rounding_error"]

_GAMMA, _ZETA = -0.1, 1.1  # the rectified sigmoid reaches 0 and 1


@dataclass(frozen=True)
class Moments:
    """The second moments of the inputs of a layer, for each group of its channels.

    Attributes:
        quantized: float32 ``[G, K, K]``, the sum of ``x' x'^T`` over the inputs ``x'`` of the
            quantized layer.
        mixed: float32 ``[G, K, K]``, the sum of ``x x'^T``, where x is the input of the float
            layer for the same data.

    Example:
        >>> Moments.of(torch.ones(1, 2, 5), torch.ones(1, 2, 5)).mixed
        tensor([[[5., 5.],
                 [5., 5.]]])
    """

    quantized: Tensor
    mixed: Tensor

    @classmethod
    def of(cls, quantized: Tensor, floating: Tensor) -> Moments:
        """The moments of inputs ``[G, K, samples]``, as the two models see them."""
        columns = quantized.transpose(1, 2)
        return cls(quantized @ columns, floating @ columns)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.quantized + other.quantized, self.mixed + other.mixed)


def rounding_error(weight: Tensor, rounded: Tensor, moments: Moments) -> Tensor:
    """The sum of the squared errors at each output, without a constant.

    Args:
        weight: float32 ``[G, N, K]``, the weight of the float layer.
        rounded: float32 ``[G, N, K]``, the weight that the integers represent.
        moments: the moments of the inputs.

    Returns:
        float32 ``[G, N]``. The constant is the sum of the squared outputs of the float layer, so
        the values may be negative; their differences have a meaning.

    Example:
        >>> x = torch.randn(1, 3, 10)
        >>> w, q = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
        >>> error = rounding_error(w, q, Moments.of(x, x)) + (w @ x).square().sum(-1)
        >>> torch.allclose(error, ((q - w) @ x).square().sum(-1), atol=1e-4)
        True
    """
    half = rounded @ moments.quantized - 2 * (weight @ moments.mixed)
    return (half * rounded).sum(-1)


def least_error_scale(
    weight: Tensor,
    scale: Tensor,
    moments: Moments,
    *,
    qmin: int,
    qmax: int,
    shared: bool = False,
    steps: int = 40,
) -> Tensor:
    """The scale with the least error at the outputs if weights are rounded to the nearest.

    Args:
        weight: float32 ``[G, N, K]``.
        scale: float32 ``[G, N]``, the scales that cover the whole range of the weights.
        moments: the moments of the inputs.
        qmin, qmax: the range of the integers.
        shared: if True, all scales are multiplied by the same factor.
        steps: number of factors that are tried, from 1 down to more than 0.3.

    Returns:
        float32 ``[G, N]``; each is at most the given scale.

    Example:
        >>> x = torch.randn(1, 8, 100)
        >>> w = torch.randn(1, 4, 8)
        >>> scale = w.abs().amax(-1) / 7
        >>> found = least_error_scale(w, scale, Moments.of(x, x), qmin=-8, qmax=7)
        >>> bool((found <= scale).all())
        True
    """
    best = torch.full_like(scale, math.inf)
    if shared:
        best = best[:1, :1]
    chosen = scale.clone()
    for step in range(steps):
        candidate = scale * (1 - 0.7 * step / steps)
        grid = candidate.unsqueeze(-1)
        rounded = (weight / grid).round().clamp(qmin, qmax) * grid
        error = rounding_error(weight, rounded, moments)
        if shared:
            error = error.sum().reshape(1, 1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, candidate, chosen)
    return chosen


def adaptive_rounding(
    weight: Tensor,
    scale: Tensor,
    moments: Moments,
    *,
    qmin: int,
    qmax: int,
    iterations: int = 500,
    learning_rate: float = 0.02,
    regularization: float = 2.0,
    beta: tuple[float, float] = (20.0, 2.0),
    warmup: float = 0.2,
) -> Tensor:
    """Integers of a weight, each rounded down or up so that the outputs change least.

    A continuous variable for each weight passes through a rectified sigmoid and moves the weight
    between its two integers. Adam minimizes the error at the outputs; after a warm-up, a
    regularizer whose exponent falls from ``beta[0]`` to ``beta[1]`` drives the variables to 0 and
    1. Single weights are then rounded the other way as long as this lowers the error. No output
    gets a greater error than from rounding to the nearest integer.

    The error is measured in units of the error of rounding to the nearest integer, so that
    ``regularization`` and ``learning_rate`` suit layers of all sizes.

    Args:
        weight: float32 ``[G, N, K]``: groups, outputs of a group, terms of an output.
        scale: float32 ``[G, N]``, positive.
        moments: the moments of the inputs.
        qmin, qmax: the range of the integers.
        iterations: number of steps of Adam, each of ``G * N * K * K`` multiply-adds; 0 leaves only
            the last part, single weights.
        learning_rate: of Adam.
        regularization: weight of the regularizer.
        beta: exponent of the regularizer after the warm-up and at the end.
        warmup: fraction of the iterations without the regularizer.

    Returns:
        int8 ``[G, N, K]``, from qmin to qmax.

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2020).

    Example:
        >>> x = torch.rand(1, 16, 200)
        >>> w = torch.randn(1, 4, 16)
        >>> scale, moments = w.abs().amax(-1) / 7, Moments.of(x, x)
        >>> q = adaptive_rounding(w, scale, moments, qmin=-8, qmax=7, iterations=100)
        >>> learned = rounding_error(w, q * scale.unsqueeze(-1), moments)
        >>> nearest = (w / scale.unsqueeze(-1)).round() * scale.unsqueeze(-1)
        >>> bool((learned <= rounding_error(w, nearest, moments)).all())
        True
    """
    settings = Settings(iterations, learning_rate, regularization, beta, warmup)
    with torch.no_grad():
        choices = _Choices.of(weight.float(), scale.float().unsqueeze(-1), qmin, qmax)
        if not iterations:
            return _improved(choices, choices.nearest, moments).to(torch.int8)
        learned = _improved(choices, _learned(choices, moments, settings), moments)
        errors = [
            rounding_error(choices.weight, integers * choices.grid, moments)
            for integers in (learned, choices.nearest)
        ]
        better = (errors[0] < errors[1]).unsqueeze(-1)
        return torch.where(better, learned, choices.nearest).to(torch.int8)


@dataclass(frozen=True)
class Settings:
    """The arguments of :func:`adaptive_rounding` that concern the learning.

    Example:
        >>> Settings(iterations=200).exponent(1.0)
        2.0
    """

    iterations: int = 500
    learning_rate: float = 0.02
    regularization: float = 2.0
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2

    def exponent(self, progress: float) -> float:
        """The exponent of the regularizer; ``progress`` is from 0 to 1, after the warm-up."""
        first, last = self.beta
        return last + 0.5 * (first - last) * (1 + math.cos(progress * math.pi))


@dataclass(frozen=True)
class _Choices:
    """A weight, its scales ``[G, N, 1]``, and its integers below, above and nearest."""

    weight: Tensor
    grid: Tensor
    down: Tensor
    up: Tensor
    nearest: Tensor

    @classmethod
    def of(cls, weight: Tensor, grid: Tensor, qmin: int, qmax: int) -> _Choices:
        position = weight / grid
        down = position.floor()
        integers = (down, down + 1, position.round())
        return cls(weight, grid, *(one.clamp(qmin, qmax) for one in integers))


def _learned(choices: _Choices, moments: Moments, settings: Settings) -> Tensor:
    """The integers that Adam finds, by the rectified sigmoid and its regularizer."""
    weight, grid, down = choices.weight, choices.grid, choices.down
    difference = choices.nearest * grid - weight
    unit = float(((difference @ moments.quantized) * difference).sum()) / max(1, weight.numel())
    if not unit > 0:  # all weights lie on the grid, or all inputs are 0
        return choices.nearest
    fraction = (weight / grid - down).clamp(0, 1)
    variable = -((_ZETA - _GAMMA) / (fraction - _GAMMA) - 1).log()
    first, second = torch.zeros_like(variable), torch.zeros_like(variable)
    quiet = settings.warmup * settings.iterations
    for iteration in range(settings.iterations):
        exponent = None
        if iteration >= quiet:
            exponent = settings.exponent((iteration - quiet) / (settings.iterations - quiet))
        slope = _slope(choices, moments, unit, variable, exponent, settings.regularization)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope.square()
        mean = first / (1 - 0.9 ** (iteration + 1))
        square = second / (1 - 0.999 ** (iteration + 1))
        variable = variable - settings.learning_rate * mean / (square.sqrt() + 1e-8)
    return torch.where(variable >= 0, choices.up, down)


def _slope(
    choices: _Choices,
    moments: Moments,
    unit: float,
    variable: Tensor,
    exponent: float | None,
    regularization: float,
) -> Tensor:
    """The gradient of the error and the regularizer with respect to the variables."""
    width = choices.up - choices.down  # 0 where a weight lies outside of the range
    sigmoid = variable.sigmoid()
    raw = sigmoid * (_ZETA - _GAMMA) + _GAMMA
    part = raw.clamp(0, 1)
    rounded = (choices.down + width * part) * choices.grid
    error = rounded @ moments.quantized - choices.weight @ moments.mixed
    slope = (2 / unit) * choices.grid * width * error
    if exponent is not None:
        distance = 2 * part - 1
        # The regularizer is 1 - |2 h - 1| ** exponent.
        inner = distance.abs().pow(exponent - 1) * distance.sign()
        slope = slope - 2 * exponent * regularization * inner
    inside = (raw > 0) & (raw < 1)
    return slope * inside * (_ZETA - _GAMMA) * sigmoid * (1 - sigmoid)


def _improved(choices: _Choices, chosen: Tensor, moments: Moments) -> Tensor:
    """Round single weights the other way, the best of each output first, while that helps."""
    grid, down, up = choices.grid, choices.down, choices.up
    chosen = chosen.clone()
    slope = chosen * grid @ moments.quantized - choices.weight @ moments.mixed
    curvature = moments.quantized.diagonal(dim1=1, dim2=2).unsqueeze(1)
    for _ in range(2 * chosen.shape[2]):
        step = (torch.where(chosen == down, up, down) - chosen) * grid
        change = 2 * step * slope + step.square() * curvature
        best, place = change.min(dim=-1, keepdim=True)
        useful = best < -1e-6 * curvature.amax() * grid.square()
        if not bool(useful.any()):
            break
        moved = torch.where(useful, step.gather(-1, place), torch.zeros_like(grid))
        chosen.scatter_add_(-1, place, (moved / grid).round())
        rows = moments.quantized.gather(1, place.expand(-1, -1, chosen.shape[2]))
        slope = slope + moved * rows
    return chosen
