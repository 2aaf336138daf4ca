"""onnxruntime and openvino: one convolution as an ONNX graph, uint8 in and out."""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchquant.bench.peers.base import Call
from torchquant.bench.peers.conv_base import ConvCall, ConvLayer, ConvPeer
from torchquant.bench.peers.onnx_graph import Graph, open_session, session_calls
from torchquant.bench.peers.openvino_core import OpenvinoCore

NHWC = "nhwc"


def _attributes(layer: ConvLayer) -> dict[str, Any]:
    kernel = layer.weight.shape[-1]
    return {
        "kernel_shape": [kernel, kernel],
        "strides": [layer.stride] * 2,
        "pads": [layer.padding] * 4,
        "group": layer.groups,
    }


def integer_model(layer: ConvLayer, call: ConvCall) -> bytes:
    """One `QLinearConv` of onnxruntime with channels last. uint8 with zero point 0 is the relu."""
    graph = Graph()
    weight, scale = layer.weight_integers()
    bias = (layer.bias.double() / (scale.double() * call.scale)).round()
    inputs = [
        "x",
        *graph.qparams(call.scale, 0),
        graph.constant(weight.numpy()),
        graph.constant(scale.numpy()),
        graph.constant(np.zeros(len(weight), np.int8)),
        *graph.qparams(call.out_scale, 0),
        graph.constant(bias.numpy().astype(np.int32)),
    ]
    attributes = _attributes(layer) | {"channels_last": 1}
    result = graph.add("QLinearConv", inputs, domain="com.microsoft", **attributes)
    return _finished(graph, result, _shapes(call, NHWC))


def qdq_model(layer: ConvLayer, call: ConvCall, layout: str) -> bytes:
    """DequantizeLinear, Conv, Relu, QuantizeLinear; with channels last, between transposes."""
    graph = Graph()
    x = graph.add("Transpose", ["x"], perm=[0, 3, 1, 2]) if layout == NHWC else "x"
    weight, scale = graph.weight(layer.weight)
    bias = graph.bias(layer.bias, scale * call.scale)
    inputs = [graph.dequantize(x, call.scale, 0), weight, bias]
    value = graph.add("Relu", [graph.add("Conv", inputs, **_attributes(layer))])
    value = graph.quantize(value, call.out_scale, 0)
    if layout == NHWC:
        value = graph.add("Transpose", [value], perm=[0, 2, 3, 1])
    return _finished(graph, value, _shapes(call, layout))


def _shapes(call: ConvCall, layout: str) -> tuple[list[int], list[int]]:
    shapes = []
    for tensor in (call.q, call.expected):
        n, c, h, w = tensor.shape
        shapes.append([n, h, w, c] if layout == NHWC else [n, c, h, w])
    return shapes[0], shapes[1]


def _finished(graph: Graph, value: str, shapes: tuple[list[int], list[int]]) -> bytes:
    graph.nodes[-1].output[0] = "y"
    return graph.model({"x": ("UINT8", shapes[0])}, {"y": ("UINT8", shapes[1])})


def _array(call: ConvCall, layout: str) -> np.ndarray[Any, Any]:
    q = call.q.permute(0, 2, 3, 1) if layout == NHWC else call.q
    found: np.ndarray[Any, Any] = q.contiguous().numpy()
    return found


class OnnxConv(ConvPeer):
    """A graph is made for each input, outside of the measured calls."""

    def load(self, layer: ConvLayer) -> None:
        self.layer = layer

    def values(self, call: ConvCall, way: str, result: Any) -> Tensor:
        found = torch.as_tensor(np.array(result))
        if way.startswith(NHWC):
            found = found.permute(0, 3, 1, 2)
        return found.float() * call.out_scale


class OnnxRuntimeConv(OnnxConv):
    """`QLinearConv` with channels last, and what a QDQ file with channels first becomes.

    Channels last is the layout inside a network, where onnxruntime keeps it from layer to layer.
    """

    def calls(self, call: ConvCall) -> dict[str, Call]:
        models = {
            NHWC: integer_model(self.layer, call),
            "qdq nchw": qdq_model(self.layer, call, "nchw"),
        }
        found: dict[str, Call] = {}
        for name, model in models.items():
            layout = name.split()[-1]
            session = open_session(model, self.threads)
            out = np.empty(_shapes(call, layout)[1], np.uint8)
            ways = session_calls(session, _array(call, layout), out)
            found |= {f"{name} {way}": run for way, run in ways.items()}
        return found

    def about(self) -> dict[str, str]:
        return {"onnxruntime": version("onnxruntime"), "onnx": version("onnx")}


class OpenvinoConv(OnnxConv):
    """The QDQ file with channels last, where openvino drops the transposes, and first."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.openvino = OpenvinoCore(threads)

    def calls(self, call: ConvCall) -> dict[str, Call]:
        found: dict[str, Call] = {}
        for layout in (NHWC, "nchw"):
            model = self.openvino.read(qdq_model(self.layer, call, layout))
            found[layout] = self.openvino.call(self.openvino.compile(model), _array(call, layout))
        return found

    def about(self) -> dict[str, str]:
        return self.openvino.about()
