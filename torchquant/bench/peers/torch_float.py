"""torch's own float layers: fp32, and bf16 with bf16 activations in and out, which favours it."""

from __future__ import annotations

import torch

from torchquant.bench.peers.base import Call, LinearPeer, float_linear


class TorchFloat(LinearPeer):
    """`nn.Linear` in one float type. The input is converted outside the measured call."""

    dtype = torch.float32
    layer: torch.nn.Module

    def load(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.layer = float_linear(weight, bias).to(self.dtype)

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        layer, x = self.layer, x.to(self.dtype)
        return {"module": lambda: layer(x)}

    def about(self) -> dict[str, str]:
        return {"torch": torch.__version__}


class TorchBfloat16(TorchFloat):
    """bf16 weights, activations and result: no conversion is measured."""

    dtype = torch.bfloat16
