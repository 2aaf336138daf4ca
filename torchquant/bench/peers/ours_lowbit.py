"""torchquant's own layers with weights of few bits, and its int8 layer for comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import torch

import torchquant
from torchquant.bench.peers.base import Call, float_linear
from torchquant.bench.peers.lowbit_base import (
    LowbitLayer,
    LowbitPeer,
    SameForAllFormats,
    in_turn,
)
from torchquant.configs import QuantizationConfig


class _Layers:
    """Layers that take turns."""

    layers: list[torchquant.nn.QuantizedModule]

    def take(self, layer: LowbitLayer, made: torchquant.nn.QuantizedModule) -> None:
        """One layer, or copies of it."""
        packed = made.get_buffer("packed")
        size = packed.numel() * packed.element_size()
        self.layers = layer.repeat(size, lambda: copy.deepcopy(made))

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        """The module's call."""
        return {"module": in_turn(partial(layer, x) for layer in self.layers)}

    def about(self) -> dict[str, str]:
        """Version and instruction set."""
        return {"torchquant": version("torchquant"), "isa": torchquant.cpu.active_isa()}


class Torchquant(_Layers, LowbitPeer):
    """`QuantizedIntxLinear` as `quantize_` makes it: activations with a scale per token."""

    config: Callable[..., QuantizationConfig] = staticmethod(
        torchquant.Int8DynamicActivationIntxWeightConfig
    )

    def load(self, layer: LowbitLayer) -> None:
        config = self.config(bits=layer.bits, group_size=layer.group_size)
        linear = float_linear(layer.weight, None)
        self.take(layer, torchquant.nn.QuantizedIntxLinear.from_float(linear, config))


class TorchquantFloat(Torchquant):
    """The same weights, and activations that stay floats."""

    config = staticmethod(torchquant.IntxWeightOnlyConfig)


class TorchquantInt8(_Layers, SameForAllFormats):
    """`QuantizedLinear` as `quantize_` makes it: int8 per channel, activations per token."""

    def convert(self, layer: LowbitLayer) -> None:
        linear = float_linear(layer.weight, None)
        self.take(layer, torchquant.nn.QuantizedLinear.from_float(linear))
