"""torch.ao's static linear on each of its engines, and oneDNN's operator, on uint8 activations."""

# mypy: disable-error-code="no-untyped-call,assignment"

from __future__ import annotations

import warnings

import torch

from torchquant.bench.peers.base import (
    Call,
    LinearPeer,
    as_uint8,
    float_linear,
    quantize_input,
)
from torchquant.bench.peers.torch_ao import OnednnPointwise, require_quantized_tensors


class TorchAoStatic(LinearPeer):
    """`torch.ops.quantized.linear`: a quint8 tensor in, a quint8 tensor out.

    It writes a quarter of the bytes of the other peers, which favours it.
    """

    engine: str

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        require_quantized_tensors()
        warnings.filterwarnings("ignore")  # the whole stack announces its removal
        torch.backends.quantized.engine = self.engine

    def load(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        scale = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
        zero_point = torch.zeros(len(scale), dtype=torch.int64)
        qweight = torch.quantize_per_channel(
            weight, scale.double(), zero_point, axis=0, dtype=torch.qint8
        )
        self.packed = torch.ops.quantized.linear_prepack(qweight, bias)
        self.float = float_linear(weight, bias)

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        _, x_scale = quantize_input(x)
        qx = torch.quantize_per_tensor(x, x_scale, 128, torch.quint8)
        y_scale = max(float(self.float(x).abs().max()), 1e-12) / 127
        linear, packed = torch.ops.quantized.linear.default, self.packed
        return {"quantized::linear": lambda: linear(qx, packed, y_scale, 128)}

    def about(self) -> dict[str, str]:
        return {"torch": torch.__version__, "engine": self.engine}


class TorchAoStaticOnednn(TorchAoStatic):
    """oneDNN."""

    engine = "onednn"


class TorchAoStaticFbgemm(TorchAoStatic):
    """FBGEMM. FBGEMM_ENABLE_INSTRUCTIONS=AVX2 in the environment takes its AVX2 kernels."""

    engine = "fbgemm"


class OnednnPointwiseStatic(OnednnPointwise):
    """The operator alone: uint8 in, fp32 out."""

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        q, x_scale = quantize_input(x)
        qx = as_uint8(q)
        linear = torch.ops.onednn.qlinear_pointwise.default
        packed, scale, zero_point, bias = self.packed, self.scale, self.zero_point, self.bias

        def call() -> torch.Tensor:
            result: torch.Tensor = linear(
                qx,
                x_scale,
                128,
                packed,
                scale,
                zero_point,
                bias,
                1.0,
                0,
                torch.float32,
                "none",
                [],
                "",
            )
            return result

        return {"eager": call}
