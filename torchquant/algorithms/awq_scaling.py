"""AWQ: scales of input channels that keep the weights that matter accurate.

A weight matters as much as the inputs that it meets. Multiplying the weights of an input channel by
a scale above 1 makes their rounding errors smaller in proportion, and the channel is divided by the
scale where it is produced. Scales follow from the mean magnitudes of the inputs, raised to a power,
which is searched by the error of the outputs with quantized weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant.algorithms.integer_weight import nearest
from torchquant.configs import Weights

__all__ = ["AWQScales", "awq_scales", "scaled_rounding", "search_scales"]

_LEAST = 1e-4


@dataclass(frozen=True, eq=False)
class AWQScales:
    """The scales of input channels that a search found.

    Attributes:
        scales: float32 ``[K]``.
        exponent: the power of the mean magnitudes, from 0 to 1.
        errors: the error of each exponent of the grid, from 0 to 1.

    Example:
        >>> AWQScales(torch.ones(2), 0.0, (1.0, 2.0)).errors[0]
        1.0
    """

    scales: Tensor
    exponent: float
    errors: tuple[float, ...]


def awq_scales(importance: Tensor, exponent: float) -> Tensor:
    """Scales of input channels: powers of their importance, from 1 / c to c with some c.

    Args:
        importance: float ``[K]``, the mean magnitude of each input channel.
        exponent: 0 gives scales of 1.

    Returns:
        float32 ``[K]``.

    Example:
        >>> awq_scales(torch.tensor([1.0, 4.0, 16.0]), 0.5)
        tensor([0.5000, 1.0000, 2.0000])
    """
    scales = importance.float().pow(exponent).clamp(min=_LEAST)
    return scales / (scales.max() * scales.min()).sqrt()


def search_scales(
    importance: Tensor, error: Callable[[Tensor], float], *, steps: int = 20
) -> AWQScales:
    """Search the exponent whose scales give the least error.

    Args:
        importance: float ``[K]``, the mean magnitude of each input channel.
        error: takes scales ``[K]`` and returns the error of the outputs with the rounded weights of
            :func:`scaled_rounding`.
        steps: the exponents are ``0, 1 / steps, ..., 1``.

    Returns:
        The scales of the least error; of equal errors the smaller exponent wins. An error that is
        NaN loses.

    Raises:
        ValueError: importance is not finite, or steps is not a positive integer.

    Source: Lin et al., "AWQ: Activation-aware Weight Quantization" (2023).

    Example:
        >>> found = search_scales(torch.tensor([1.0, 16.0]), lambda scales: float(scales[0] - 0.5)
        ...     ** 2)
        >>> found.exponent, found.scales
        (0.5, tensor([0.5000, 2.0000]))
    """
    if not bool(importance.isfinite().all()):
        raise ValueError("search_scales: importance must be finite, got NaN or infinities")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"search_scales: steps must be a positive integer, got {steps!r}")
    exponents = [step / steps for step in range(steps + 1)]
    errors = [float(error(awq_scales(importance, exponent))) for exponent in exponents]
    comparable = [value if value == value else float("inf") for value in errors]
    best = min(range(steps + 1), key=comparable.__getitem__)
    return AWQScales(awq_scales(importance, exponents[best]), exponents[best], tuple(errors))


@torch.no_grad()
def scaled_rounding(weight: Tensor, scales: Tensor, weights: Weights) -> Tensor:
    """A weight whose columns are scaled, rounded, and scaled back.

    Args:
        weight: float ``[N, K]``.
        scales: float ``[K]``.
        weights: bits, symmetry and granularity.

    Returns:
        float32 ``[N, K]``.

    Example:
        >>> scaled_rounding(torch.tensor([[7.0, 0.4]]), torch.tensor([1.0, 2.0]), Weights(4))
        tensor([[7.0000, 0.5000]])
    """
    return nearest(weight.float() * scales, weights).dequantize() / scales
