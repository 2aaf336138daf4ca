"""onnxruntime and openvino: whole networks from ONNX files, float and QDQ."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchquant.bench.peers.base import Call
from torchquant.bench.peers.cnn_base import NetworkPeer, folded_graph
from torchquant.bench.peers.onnx_graph import open_session, session_calls
from torchquant.bench.peers.onnx_network import Writer
from torchquant.bench.peers.openvino_core import OpenvinoCore


def network_file(model: nn.Module, calibration: Tensor, integers: bool) -> tuple[bytes, int]:
    """The ONNX file and the number of results per image."""
    graph = folded_graph(model)
    with torch.no_grad():
        classes = graph(calibration[:1]).shape[1]
    return Writer(graph, calibration if integers else None).write(calibration.shape[-1]), classes


class OnnxRuntimeNetwork(NetworkPeer):
    """The QDQ file, whose nodes onnxruntime's optimiser fuses into integer ones."""

    integers = True

    def load(self, model: nn.Module, calibration: Tensor) -> None:
        file, self.classes = network_file(model, calibration, self.integers)
        self.session = open_session(file, self.threads)

    def calls(self, x: Tensor) -> dict[str, Call]:
        out = np.empty((len(x), self.classes), np.float32)
        found: dict[str, Call] = session_calls(self.session, x.numpy(), out)
        return found

    def about(self) -> dict[str, str]:
        return {"onnxruntime": version("onnxruntime"), "onnx": version("onnx")}


class OnnxRuntimeFloatNetwork(OnnxRuntimeNetwork):
    """The float file."""

    integers = False


class OpenvinoNetwork(NetworkPeer):
    """The QDQ file, read by openvino and compiled for each batch outside of the calls."""

    model: Any

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.openvino = OpenvinoCore(threads)

    def load(self, model: nn.Module, calibration: Tensor) -> None:
        file, _ = network_file(model, calibration, integers=True)
        self.model = self.openvino.read(file)

    def calls(self, x: Tensor) -> dict[str, Call]:
        self.model.reshape(list(x.shape))
        return {"latency": self.openvino.call(self.openvino.compile(self.model), x.numpy())}

    def about(self) -> dict[str, str]:
        return self.openvino.about()
