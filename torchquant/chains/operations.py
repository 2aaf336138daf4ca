"""The few words of a chain for what a call computes.

A call that has no word here is :class:`Other`; it runs in float, and its reason is in the report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torchquant.chains.steps import Pair
from torchquant.graph.trace import Ref

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
class Affine:
    """One number for each channel, or one for all: a batch norm, ``x * gamma``, ``x + 1``.

    Args:
        source: the index of the result that it computes with.
        channels: of this result.
        gain: what multiplies: a number, or the result of a call that reads only parameters.
        shift: what is added then.
        norm: True for a batch norm, whose module has the numbers.
        negative: True if ``shift`` is subtracted.
        dim: the dimension of the numbers in the result's shape; None for one number for all.
    """

    source: int
    channels: int
    gain: Ref | float | None = None
    shift: Ref | float | None = None
    norm: bool = False
    negative: bool = False
    dim: int | None = 1


@dataclass(frozen=True)
class Norm:
    """A layer norm over the last dimension.

    Args:
        source: the index of the result that it computes with.
        channels: the size of the last dimension.
        eps: the summand of the variance.
        weight, bias: results of calls that read only parameters; None if the call has none.
        module: True if the module that is called has weight and bias.
    """

    source: int
    channels: int
    eps: float
    weight: Ref | None = None
    bias: Ref | None = None
    module: bool = False


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
class AdaptiveMaxPool:
    """The argument of the step of this name."""

    size: tuple[int | None, int | None]


@dataclass(frozen=True)
class Concat:
    """The results after each other in the dimension of channels."""


@dataclass(frozen=True)
class Channels:
    """Some channels of the result ``source``; several calls may pick them, the last is this one."""

    source: int
    index: tuple[int, ...]


@dataclass(frozen=True)
class Crop:
    """The arguments of the step of this name."""

    begin: Pair
    end: Pair


@dataclass(frozen=True)
class Pad:
    """The arguments of the step of this name."""

    before: Pair
    after: Pair


@dataclass(frozen=True)
class PixelShuffle:
    """The arguments of the step of this name."""

    factor: int
    inverse: bool = False


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
    """The argument itself: an identity, dropout in evaluation, another order of dimensions.

    Args:
        last: True if the call takes ``[n, c, h, w]`` to ``[n, h, w, c]``, False if it takes it
            back; None if the dimensions stay.
    """

    last: bool | None = None


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
    | Affine
    | Norm
    | MaxPool
    | AvgPool
    | AdaptiveMaxPool
    | AdaptiveAvgPool
    | Concat
    | Channels
    | Crop
    | Pad
    | PixelShuffle
    | Upsample
    | Flatten
    | Same
    | Other
)
