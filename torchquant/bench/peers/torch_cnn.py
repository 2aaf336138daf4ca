"""torch's own networks: fp32 and bf16, channels-last, and torch.ao's static int8 by FX."""

# mypy: disable-error-code="no-untyped-call,attr-defined"

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchquant.bench.peers.base import Call, NotInThisTorch
from torchquant.bench.peers.cnn_base import NetworkPeer, channels_last, folded_graph
from torchquant.bench.peers.torch_ao import select_engine


class TorchNetwork(NetworkPeer):
    """Batch norms folded, weights and images channels-last, eager."""

    dtype = torch.float32
    model: nn.Module

    def load(self, model: nn.Module, calibration: Tensor) -> None:
        self.model = channels_last(folded_graph(model), self.dtype)

    def calls(self, x: Tensor) -> dict[str, Call]:
        model, x = self.model, x.to(self.dtype, memory_format=torch.channels_last)
        return {"eager": lambda: model(x)}

    def about(self) -> dict[str, str]:
        return {"torch": torch.__version__}


class TorchNetworkBfloat16(TorchNetwork):
    """bf16 weights, activations, images and result: no conversion is measured."""

    dtype = torch.bfloat16


class TorchAoNetwork(NetworkPeer):
    """`prepare_fx` and `convert_fx` with the engine's default settings."""

    engine: str
    model: nn.Module

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        select_engine(self.engine)

    def load(self, model: nn.Module, calibration: Tensor) -> None:
        try:
            from torch.ao.quantization import get_default_qconfig_mapping
            from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
        except ImportError as error:
            raise NotInThisTorch(f"torch {torch.__version__} has no torch.ao: {error}") from error

        mapping = get_default_qconfig_mapping(self.engine)
        prepared = prepare_fx(folded_graph(model), mapping, (calibration,))
        prepared(calibration)
        self.model = convert_fx(prepared)

    def calls(self, x: Tensor) -> dict[str, Call]:
        model, x = self.model, x.contiguous(memory_format=torch.channels_last)
        return {"eager": lambda: model(x)}

    def about(self) -> dict[str, str]:
        return {"torch": torch.__version__, "engine": self.engine}


class TorchAoNetworkOnednn(TorchAoNetwork):
    """oneDNN, on every CPU."""

    engine = "onednn"


class TorchAoNetworkX86(TorchAoNetwork):
    """torch.ao's default on x86, which picks oneDNN or FBGEMM by the CPU and the layer."""

    engine = "x86"


class TorchAoNetworkFbgemm(TorchAoNetwork):
    """FBGEMM, on every CPU."""

    engine = "fbgemm"
