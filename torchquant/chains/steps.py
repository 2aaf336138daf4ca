"""The steps of a chain: what runs between the float inputs and outputs of a program.

Values are images ``[n, h, w, c]`` with adjacent channels. A vector ``[n, c]`` is an image with
h = w = 1, a sequence ``[n, c, l]`` is one with h = 1 and w = l. A value is int8 if it has
:class:`Qparams`, otherwise float32. Each value is the output of exactly one step and comes before
the steps that read it.

The meaning of a step is that of the float function on the dequantized values, then the activation,
then one rounding to the output's integers. :mod:`torchquant.chains.interpreter` computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

Pair: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Qparams:
    """The integers of an int8 value.

    Args:
        scale: one scale for the whole value, a float32 number.
        zero_point: the integer of the number 0.
        qmin: the least integer.
        qmax: the greatest integer.
    """

    scale: float
    zero_point: int
    qmin: int = -128
    qmax: int = 127


@dataclass(frozen=True)
class Value:
    """What a step writes and other steps read.

    Args:
        index: the number of the value in its program.
        qparams: the integers of an int8 value; None for float32.
    """

    index: int
    qparams: Qparams | None


@dataclass(frozen=True)
class Input:
    """An argument of the program as a value; quantized if the value has qparams.

    The argument is a float tensor ``[n, c, h, w]`` of any strides, ``[n, c]`` or ``[n, c, l]``.
    """

    output: Value
    argument: int


@dataclass(frozen=True)
class Conv:
    """A convolution; ``layer`` is a quantized layer with static activations.

    ``residual`` is added before the activation.
    """

    input: Value
    output: Value
    layer: nn.Module
    activation: str = "none"
    residual: Value | None = None


@dataclass(frozen=True)
class Linear:
    """A linear layer on ``[n, c]``, or on the channels of each pixel of an image.

    ``layer`` is a quantized layer with static activations.

    ``residual`` is added before the activation.
    """

    input: Value
    output: Value
    layer: nn.Module
    activation: str = "none"
    residual: Value | None = None


@dataclass(frozen=True)
class Add:
    """The sum of two values of one shape."""

    left: Value
    right: Value
    output: Value
    activation: str = "none"


@dataclass(frozen=True)
class Mul:
    """The product of two values; ``right`` may have h = w = 1, one factor per channel."""

    left: Value
    right: Value
    output: Value
    activation: str = "none"


@dataclass(frozen=True)
class Map:
    """A pointwise function; with the activation "none" it only changes the integers."""

    input: Value
    output: Value
    activation: str = "none"


@dataclass(frozen=True)
class Affine:
    """``input * gain + shift`` with one number for each channel, then perhaps a residual.

    With both numbers it is one fused operation, ``fmaf(input, gain, shift)``. ``residual`` is added
    before the activation.

    Args:
        input, output: of one shape.
        channels: how many there are.
        gain: float32 ``[channels]``; None for 1.
        shift: float32 ``[channels]``; None for 0.
    """

    input: Value
    output: Value
    channels: int
    gain: Tensor | None = None
    shift: Tensor | None = None
    activation: str = "none"
    residual: Value | None = None


@dataclass(frozen=True)
class Norm:
    """``functional.layer_norm`` over the channels of each pixel; weight and bias are float32."""

    input: Value
    output: Value
    channels: int
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class MaxPool:
    """The greatest integer of each window; input and output have the same qparams."""

    input: Value
    output: Value
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair = (1, 1)
    ceil_mode: bool = False


@dataclass(frozen=True)
class AdaptiveMaxPool:
    """The greatest integers of ``size`` windows; None keeps the input's height or width."""

    input: Value
    output: Value
    size: tuple[int | None, int | None]


@dataclass(frozen=True)
class AvgPool:
    """The mean of each window; ``divisor`` replaces the number of elements.

    The means of float values are those of ``functional.float_avg_pool``.
    """

    input: Value
    output: Value
    kernel: Pair
    stride: Pair
    padding: Pair
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int | None = None


@dataclass(frozen=True)
class AdaptiveAvgPool:
    """The means of ``size`` windows; None keeps the input's height or width."""

    input: Value
    output: Value
    size: tuple[int | None, int | None]


@dataclass(frozen=True)
class Concat:
    """The channels of several values after each other."""

    inputs: tuple[Value, ...]
    output: Value


@dataclass(frozen=True)
class Channels:
    """Some channels in some order: channel i of the output is channel ``index[i]`` of the input.

    Adjacent channels are not copied.
    """

    input: Value
    output: Value
    index: tuple[int, ...]


@dataclass(frozen=True)
class Crop:
    """Rows and columns from ``begin`` to before ``end``; negative numbers count from the end."""

    input: Value
    output: Value
    begin: Pair
    end: Pair


@dataclass(frozen=True)
class Pad:
    """Zeros around each image: ``before`` at the top and the left, ``after`` at the other sides."""

    input: Value
    output: Value
    before: Pair
    after: Pair


@dataclass(frozen=True)
class PixelShuffle:
    """Channels to pixels as torch's ``pixel_shuffle``; ``inverse``: ``pixel_unshuffle``."""

    input: Value
    output: Value
    factor: int
    inverse: bool = False


@dataclass(frozen=True)
class Upsample:
    """Nearest-neighbour upsampling to ``size``, or by the whole numbers ``factor``."""

    input: Value
    output: Value
    size: Pair | None = None
    factor: Pair | None = None


@dataclass(frozen=True)
class Flatten:
    """``[n, h, w, c]`` as ``[n, c * h * w]``, channels first as torch flattens them."""

    input: Value
    output: Value


@dataclass(frozen=True)
class Output:
    """A value as a float32 result of the program; integers are dequantized.

    The result has the memory format of the program's first argument, or channels_last if ``last``.
    """

    input: Value
    result: int
    last: bool = False


Step: TypeAlias = (
    Input
    | Conv
    | Linear
    | Add
    | Mul
    | Map
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
    | Output
)
