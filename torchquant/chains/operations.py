"""The few words of a chain for what a call computes.

A call that has no word here is :class:`Other`; it runs in float, and its reason is in the report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torchquant.chains.steps import Pair

Shape: TypeAlias = tuple[int, ...] | None  # None: the result is no float tensor


@dataclass(frozen=True)
class Layer:
    """A layer that will have static activations.

    Args:
        path: its path.
        linear: True for a linear layer, False for a convolution.
        rank: the number of dimensions of the weight, and of a batch of inputs of a convolution.
    """

    path: str
    linear: bool
    rank: int = 2


@dataclass(frozen=True)
class Activate:
    """A pointwise function by its name in ``functional.ACTIVATIONS``."""

    function: str


@dataclass(frozen=True)
class Add:
    """The sum of two results of one shape."""


@dataclass(frozen=True)
class Mul:
    """The product of two results of one shape, or with one factor per channel.

    Args:
        left_is_factor: True if the first result is the factor per channel.
    """

    left_is_factor: bool = False


@dataclass(frozen=True)
class MaxPool:
    """The arguments of the step of this name."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool


@dataclass(frozen=True)
class AvgPool:
    """The arguments of the step of this name."""

    kernel: Pair
    stride: Pair
    padding: Pair
    ceil_mode: bool
    count_include_pad: bool
    divisor: int | None


@dataclass(frozen=True)
class AdaptiveAvgPool:
    """The argument of the step of this name; ``flat`` if the result has no height and width."""

    size: tuple[int | None, int | None]
    flat: bool = False


@dataclass(frozen=True)
class Concat:
    """The results after each other in the dimension of channels."""


@dataclass(frozen=True)
class Upsample:
    """The arguments of the step of this name."""

    size: Pair | None
    factor: Pair | None


@dataclass(frozen=True)
class Flatten:
    """``[n, c, h, w]`` as ``[n, c * h * w]``."""


@dataclass(frozen=True)
class Same:
    """The argument itself: an identity, dropout in evaluation."""


@dataclass(frozen=True)
class Other:
    """Something else, which runs in float.

    Args:
        reason: what it is.
        moves: True if it only moves elements, so that the integers of its argument remain.
        quiet: True if it computes no tensor, such as a size.
    """

    reason: str
    moves: bool = False
    quiet: bool = False


Operation: TypeAlias = (
    Layer
    | Activate
    | Add
    | Mul
    | MaxPool
    | AvgPool
    | AdaptiveAvgPool
    | Concat
    | Upsample
    | Flatten
    | Same
    | Other
)
