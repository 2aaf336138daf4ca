"""torchquant's own network. TORCHQUANT_ISA in the environment forces the instruction set."""

from __future__ import annotations

from importlib.metadata import version

import torch
from torch import Tensor, nn

import torchquant
from torchquant.bench.peers.base import Call
from torchquant.bench.peers.cnn_base import NetworkPeer


class TorchquantNetwork(NetworkPeer):
    """The network as it is, in three calls; images channels-last and contiguous."""

    model: nn.Module

    def load(self, model: nn.Module, calibration: Tensor) -> None:
        config = torchquant.Int8StaticActivationInt8WeightConfig()
        torchquant.prepare_(model, config, (calibration,), strict=False)
        torchquant.calibrate(model, [calibration], progress=False)
        torchquant.convert_(model)
        self.model = model

    def calls(self, x: Tensor) -> dict[str, Call]:
        model, last = self.model, x.contiguous(memory_format=torch.channels_last)
        return {"channels last": lambda: model(last), "contiguous": lambda: model(x)}

    def about(self) -> dict[str, str]:
        return {"torchquant": version("torchquant"), "isa": torchquant.cpu.active_isa()}
