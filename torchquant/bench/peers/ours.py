"""torchquant itself, as a user gets it.

TORCHQUANT_ISA in the environment forces the instruction set.
"""

from __future__ import annotations

from importlib.metadata import version

import torch

import torchquant
from torchquant.bench.peers.base import (
    Call,
    LinearPeer,
    float_linear,
    quantize_input,
    quantize_weight,
)


class Torchquant(LinearPeer):
    """`QuantizedLinear.from_float`, fp32 in and out.

    Per-token symmetric int8 activations, per-channel int8 weights.
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


class TorchquantBfloat16(Torchquant):
    """The same layer in a bf16 model: bf16 in, bf16 out."""

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        layer, x = self.layer, x.bfloat16()
        return {"module": lambda: layer(x)}


class TorchquantStatic(Torchquant):
    """The operator on int8 activations with one scale, fp32 out."""

    def load(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        qweight, self.scale = quantize_weight(weight)
        self.packed, self.bias = torchquant.ops.pack_weight(qweight), bias

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        q, x_scale = quantize_input(x)
        linear, input_scale = torchquant.ops.linear_static, torch.tensor([x_scale])
        packed, scale, bias, n = self.packed, self.scale, self.bias, len(self.scale)
        return {
            "linear_static": lambda: linear(
                q, input_scale, None, packed, scale, None, bias, out_features=n
            )
        }
