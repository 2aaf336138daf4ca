"""torchquant's own convolution. TORCHQUANT_ISA in the environment forces the instruction set."""

from __future__ import annotations

from importlib.metadata import version

import torch
from torch import Tensor

import torchquant
from torchquant.bench.peers.base import Call
from torchquant.bench.peers.conv_base import ConvCall, ConvLayer, ConvPeer, channels_last


class TorchquantConv(ConvPeer):
    """`ops.conv_static`, int8 in and out. Its zero points are -128, where uint8 has 0."""

    def load(self, layer: ConvLayer) -> None:
        weight, self.scale = layer.weight_integers()
        self.layer, self.weight_shape = layer, list(weight.shape)
        self.packed = torchquant.ops.pack_conv_weight(weight, layer.groups)

    def calls(self, call: ConvCall) -> dict[str, Call]:
        q = channels_last((call.q.to(torch.int16) - 128).to(torch.int8))
        layer, convolve = self.layer, torchquant.ops.conv_static
        packed, scale, shape = self.packed, self.scale, self.weight_shape
        input_scale, zero_point = torch.tensor([call.scale]), torch.tensor([-128]).int()
        out_scale, stride, padding = (
            torch.tensor([call.out_scale]),
            [layer.stride] * 2,
            [layer.padding] * 4,
        )

        def run() -> Tensor:
            return convolve(
                q,
                input_scale,
                zero_point,
                packed,
                scale,
                layer.bias,
                weight_shape=shape,
                stride=stride,
                padding=padding,
                dilation=[1, 1],
                groups=layer.groups,
                activation="relu",
                output_dtype=torch.int8,
                output_scale=out_scale,
                output_zero_point=-128,
            )

        return {"conv_static": run}

    def values(self, call: ConvCall, way: str, result: Tensor) -> Tensor:
        return (result.float() + 128) * call.out_scale

    def about(self) -> dict[str, str]:
        return {"torchquant": version("torchquant"), "isa": torchquant.cpu.active_isa()}
