"""torchquant itself, as a user gets it: `QuantizedLinear.from_float`, fp32 in, fp32 out."""

from __future__ import annotations

from importlib.metadata import version

import torch

import torchquant
from peers.base import Call, LinearPeer, float_linear


class Torchquant(LinearPeer):
    """Per-token symmetric int8 activations, per-channel int8 weights.

    TORCHQUANT_ISA in the environment forces the instruction set.
    """

    layer: torch.nn.Module

    def load(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        config = torchquant.Int8DynamicActivationInt8WeightConfig()
        self.layer = torchquant.nn.QuantizedLinear.from_float(float_linear(weight, bias), config)

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        layer = self.layer
        return {"module": lambda: layer(x)}

    def about(self) -> dict[str, str]:
        return {"torchquant": version("torchquant"), "isa": torchquant.cpu.active_isa()}
