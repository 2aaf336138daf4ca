"""torch.ao's convolution on each of its engines, and oneDNN's operator, on uint8 activations."""

# mypy: disable-error-code="no-untyped-call,assignment"

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from torchquant.bench.peers.base import Call
from torchquant.bench.peers.conv_base import ConvCall, ConvLayer, ConvPeer
from torchquant.bench.peers.torch_ao import require_quantized_tensors, select_engine


class OnednnConv(ConvPeer):
    """`torch.ops.onednn.qconv_pointwise`, Inductor's int8 convolution.

    Its weight is packed for the shape of the input, with which oneDNN chooses the best layout.
    """

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        require_quantized_tensors()

    def load(self, layer: ConvLayer) -> None:
        warnings.filterwarnings("ignore")  # the quantized dtypes announce their removal
        self.layer = layer

    def calls(self, call: ConvCall) -> dict[str, Call]:
        layer = self.layer
        weight, weight_scale = layer.weight_integers()
        geometry = [layer.stride] * 2, [layer.padding] * 2, [1, 1], layer.groups
        packed = torch.ops.onednn.qconv_prepack(
            weight, weight_scale, call.scale, 0, *geometry, list(call.q.shape)
        )
        convolve = torch.ops.onednn.qconv_pointwise.default
        zeros, q, bias = torch.zeros(len(weight_scale), dtype=torch.int32), call.q, layer.bias
        scale, out_scale = call.scale, call.out_scale

        def run() -> Tensor:
            result: Tensor = convolve(
                q,
                scale,
                0,
                packed,
                weight_scale,
                zeros,
                bias,
                *geometry,
                out_scale,
                0,
                torch.uint8,
                "relu",
                [],
                "",
            )
            return result

        return {"eager": run}

    def about(self) -> dict[str, str]:
        return {"torch": torch.__version__}


class TorchAoConv(ConvPeer):
    """`torch.ops.quantized.conv2d_relu`: a quint8 tensor in, a quint8 tensor out."""

    engine: str

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        select_engine(self.engine)

    def load(self, layer: ConvLayer) -> None:
        _, scale = layer.weight_integers()
        zero_point = torch.zeros(len(scale), dtype=torch.int64)
        weight = torch.quantize_per_channel(
            layer.weight, scale.double(), zero_point, axis=0, dtype=torch.qint8
        )
        self.packed = torch.ops.quantized.conv2d_prepack(
            weight, layer.bias, [layer.stride] * 2, [layer.padding] * 2, [1, 1], layer.groups
        )

    def calls(self, call: ConvCall) -> dict[str, Call]:
        q = torch.quantize_per_tensor(call.x, call.scale, 0, torch.quint8)
        convolve, packed, scale = torch.ops.quantized.conv2d_relu.new, self.packed, call.out_scale
        return {"quantized::conv2d_relu": lambda: convolve(q, packed, scale, 0)}

    def values(self, call: ConvCall, way: str, result: Tensor) -> Tensor:
        return result.dequantize()

    def about(self) -> dict[str, str]:
        return {"torch": torch.__version__, "engine": self.engine}


class TorchAoConvOnednn(TorchAoConv):
    """oneDNN, on every CPU."""

    engine = "onednn"


class TorchAoConvX86(TorchAoConv):
    """torch.ao's default on x86, which picks oneDNN or FBGEMM by the CPU and the layer."""

    engine = "x86"


class TorchAoConvFbgemm(TorchAoConv):
    """FBGEMM, on every CPU."""

    engine = "fbgemm"
