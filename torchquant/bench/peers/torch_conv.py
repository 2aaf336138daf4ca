"""torch's own float convolution, channels-last: fp32, and bf16 with bf16 activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from torchquant.bench.peers.base import Call
from torchquant.bench.peers.conv_base import ConvCall, ConvLayer, ConvPeer, channels_last


class TorchConv(ConvPeer):
    """`F.conv2d` and an in-place relu. The input is converted outside the measured call."""

    dtype = torch.float32

    def load(self, layer: ConvLayer) -> None:
        self.layer = layer
        self.weight = channels_last(layer.weight.to(self.dtype))
        self.bias = layer.bias.to(self.dtype)

    def calls(self, call: ConvCall) -> dict[str, Call]:
        x, weight, bias, layer = call.x.to(self.dtype), self.weight, self.bias, self.layer
        stride, padding, groups = layer.stride, layer.padding, layer.groups
        return {"conv2d": lambda: conv2d(x, weight, bias, stride, padding, 1, groups).relu_()}

    def values(self, call: ConvCall, way: str, result: Tensor) -> Tensor:
        return result.float()

    def about(self) -> dict[str, str]:
        return {"torch": torch.__version__}


class TorchConvBfloat16(TorchConv):
    """bf16 weights, activations and result: no conversion is measured."""

    dtype = torch.bfloat16
