"""The interface of a peer of the convolution benchmark, and one layer's numbers for all of them.

A call is convolution, bias and relu on 8-bit integers, with 8-bit integers as its result, as inside
a quantized network. The input is not negative, like the output of a relu: its uint8 zero point is
0, the one that costs the other libraries least. Float peers take and return floats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchquant.bench.peers.base import Call


@dataclass(frozen=True)
class ConvLayer:
    """A float layer: weight `[O, C / groups, k, k]`, bias `[O]`; equal for both dimensions."""

    weight: Tensor
    bias: Tensor
    stride: int
    padding: int
    groups: int

    def weight_integers(self) -> tuple[Tensor, Tensor]:
        """int8 weight in [-127, 127] and fp32 scale per output channel."""
        scale = self.weight.abs().amax((1, 2, 3)).clamp_min(1e-12) / 127
        q = (self.weight / scale[:, None, None, None]).round().clamp(-127, 127)
        return q.to(torch.int8), scale

    def float_result(self, x: Tensor) -> Tensor:
        """Convolution, bias and relu in the type of `x`."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        out = torch.nn.functional.conv2d(
            x, weight, bias, self.stride, self.padding, groups=self.groups
        )
        return out.relu()


@dataclass(frozen=True)
class ConvCall:
    """One input: floats and uint8 with zero point 0, both channels-last; the float result.

    `out_scale` is the one of the result, whose zero point is 0 in uint8.
    """

    x: Tensor
    q: Tensor
    scale: float
    expected: Tensor
    out_scale: float


def quantized_call(layer: ConvLayer, x: Tensor) -> ConvCall:
    """The input's integers, with scales as after a calibration on `x`, which is not negative."""
    x, expected = channels_last(x), layer.float_result(x)
    scale, out_scale = (max(float(t.max()), 1e-12) / 255 for t in (x, expected))
    q = channels_last((x / scale).round().clamp(0, 255).to(torch.uint8))
    return ConvCall(x, q, scale, expected, out_scale)


def channels_last(x: Tensor) -> Tensor:
    """The same values with channels as the innermost dimension in memory."""
    return x.contiguous(memory_format=torch.channels_last)


class ConvPeer(ABC):
    """One library's convolution. Each instance lives alone in its own process.

    Preparing the weight is not part of a call; a library that prepares it for an input's shape
    does so in `calls`, outside of the functions that it returns.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @abstractmethod
    def load(self, layer: ConvLayer) -> None:
        """Take a float layer."""

    @abstractmethod
    def calls(self, call: ConvCall) -> dict[str, Call]:
        """Ways of applying the layer to an input, by name; the fastest one counts."""

    def values(self, call: ConvCall, way: str, result: Any) -> Tensor:
        """The result of the call named `way` as floats `[N, O, H, W]`; here from uint8."""
        return torch.as_tensor(result).float() * call.out_scale

    @abstractmethod
    def about(self) -> dict[str, str]:
        """Version, engine and instruction set, for readers of the results."""
