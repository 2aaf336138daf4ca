"""Convolutions in float: the float layer, and the simulation of the integer layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchquant import functional
from torchquant.nn.conv_geometry import before_and_after, padded
from torchquant.nn.qat_parts import StraightThrough
from torchquant.scheme import PER_TENSOR, PerAxis, PerToken


def float_conv(layer: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The float convolution of given tensors.

    Args:
        layer: a convolution of any form, which gives the sizes.
        input: ``[N, C, ...]``.
        weight, bias: in place of the layer's own.

    Example:
        >>> conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")
        >>> x = torch.randn(1, 2, 4, 4)
        >>> torch.equal(float_conv(conv, x, conv.weight, conv.bias), conv(x))
        True
    """
    both = before_and_after(layer)
    if layer.padding_mode != "zeros":
        input, both = padded(layer, input)
    padding: Any = both[::2]
    if both[::2] != both[1::2]:
        padding = "same"
    function: Any = nn.functional.conv1d if len(both) == 2 else nn.functional.conv2d
    output: Tensor = function(
        input, weight, bias, layer.stride, padding, layer.dilation, layer.groups
    )
    return output


def simulated_input(input: Tensor, part: Any) -> Tensor:
    """An input whose samples are rounded to dynamic integers; gradients pass straight through.

    Args:
        input: float ``[N, C, ...]``.
        part: the dynamic activations of a configuration.
    """
    with torch.no_grad():
        rows = input.reshape(input.shape[0], -1)
        _, scale, zero_point = functional.quantize_per_token(
            rows, symmetric=part.symmetric, bits=part.bits
        )
        qmin, qmax = part.range
        values = functional.fake_quantize(
            rows, scale, zero_point, qmin=qmin, qmax=qmax, granularity=PerToken()
        )
    rounded: Tensor = StraightThrough.apply(input, values.reshape(input.shape))
    return rounded


def simulated_weight(weight: Tensor, part: Any) -> Tensor:
    """A weight that is rounded to integers with scales from ranges; gradients pass through.

    Args:
        weight: float ``[O, C / groups, ...]``.
        part: the weights of a configuration.
    """
    qmin, qmax = part.range
    with torch.no_grad():
        rows = weight.reshape(weight.shape[0], -1)
        least, greatest = torch.aminmax(rows, dim=1)
        if part.granularity == PER_TENSOR:
            least = least.amin().expand(least.shape).contiguous()
            greatest = greatest.amax().expand(greatest.shape).contiguous()
        scale, zero_point = functional.qparams_from_range(
            least.float(), greatest.float(), qmin=qmin, qmax=qmax, symmetric=True
        )
        values = functional.fake_quantize(
            rows, scale, zero_point, qmin=qmin, qmax=qmax, granularity=PerAxis(0)
        )
    rounded: Tensor = StraightThrough.apply(weight, values.reshape(weight.shape))
    return rounded


__all__ = ["float_conv"]
