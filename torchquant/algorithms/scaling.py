"""Cross-layer equalization: the factors that balance the ranges of two consecutive layers.

A layer, an activation function f with ``f(s x) = s f(x)`` for positive s, and a second layer
compute the same function if channel i of the first layer is divided by a factor ``s_i`` and the
weights of the second layer that read this channel are multiplied by it. The factors are chosen so
that both layers use the range of their weights equally well in each channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["channel_ranges", "equalization_factors", "range_spread", "scale_channels"]


def equalization_factors(first: Tensor, second: Tensor) -> Tensor:
    """The factors that give each channel the same range in both layers.

    Args:
        first: float ``[C]``, the greatest magnitude of the weights that produce each channel.
        second: float ``[C]``, the greatest magnitude of the weights that read each channel.

    Returns:
        float ``[C]``, ``sqrt(first / second)``; 1 for a channel without weights in either layer.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
    (2019).

    Example:
        >>> first, second = torch.tensor([8.0, 0.5]), torch.tensor([2.0, 2.0])
        >>> factors = equalization_factors(first, second)
        >>> first / factors, second * factors
        (tensor([4., 1.]), tensor([4., 1.]))
    """
    factors = (first / second).sqrt()
    usable = (first > 0) & (second > 0) & factors.isfinite() & (factors > 0)
    return torch.where(usable, factors, torch.ones_like(factors))


def channel_ranges(weight: Tensor, groups: int, *, inputs: bool, block: int = 1) -> Tensor:
    """The greatest magnitude of the weights that produce, or that read, each channel.

    Args:
        weight: float ``[O, I / groups, ...]`` of a convolution, or ``[O, I]`` of a linear layer.
        groups: groups of the convolution; 1 for a linear layer.
        inputs: if True, the weights that read an input channel; if False, the weights that produce
            an output channel.
        block: number of adjacent inputs that belong to a channel; more than 1 where a flatten
            precedes a linear layer.

    Returns:
        float ``[C]``.

    Example:
        >>> depthwise = torch.tensor([[[1.0, -3.0]], [[0.5, 0.0]]])
        >>> channel_ranges(depthwise, 2, inputs=True)
        tensor([3.0000, 0.5000])
    """
    if not inputs:
        return weight.abs().flatten(1).amax(1)
    return _by_input(weight, groups, block).abs().amax(dim=(1, 3)).flatten()


def scale_channels(
    weight: Tensor, factors: Tensor, groups: int, *, inputs: bool, block: int = 1
) -> Tensor:
    """A weight whose input channels are multiplied, or output channels divided, by factors.

    Args:
        weight, groups, inputs, block: as for :func:`channel_ranges`.
        factors: float ``[C]``.

    Returns:
        A new tensor of the weight's shape.

    Example:
        >>> weight = torch.ones(2, 4)
        >>> scale_channels(weight, torch.tensor([2.0, 3.0]), 1, inputs=True, block=2)
        tensor([[2., 2., 3., 3.],
                [2., 2., 3., 3.]])
    """
    if not inputs:
        return weight / factors.view(-1, *[1] * (weight.dim() - 1))
    scaled = _by_input(weight, groups, block) * factors.view(groups, 1, -1, 1)
    return scaled.reshape(weight.shape)


def range_spread(ranges: Tensor) -> float:
    """How many times the greatest range exceeds the least, without channels of range 0.

    Example:
        >>> range_spread(torch.tensor([0.0, 0.5, 4.0]))
        8.0
    """
    used = ranges[ranges > 0]
    return float(used.amax() / used.amin()) if len(used) else 1.0


def _by_input(weight: Tensor, groups: int, block: int) -> Tensor:
    """A weight as ``[groups, outputs of a group, channels of a group, weights of a channel]``."""
    outputs, inputs = weight.shape[:2]
    return weight.reshape(groups, outputs // groups, inputs // block, -1)
