"""A folded graph of torch as an ONNX file: float, or int8 with QuantizeLinear and DequantizeLinear.

The integers are placed as onnxruntime's own static quantization places them: every activation that
a convolution, a linear layer, an addition, a pool or a relu reads or writes is uint8 with one
scale, except between a layer and the relu that follows it; weights are int8 per output channel.
"""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from torchquant.bench.peers.onnx_graph import Graph

ADDITIONS = (operator.add, operator.iadd, torch.add)
RELUS = (nn.ReLU, nn.ReLU6)


class Unsupported(ValueError):
    """A node that this writer does not know."""


class _Ranges(fx.Interpreter):
    """Least and greatest value of every node's result."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.found: dict[fx.Node, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = min(float(result.min()), 0.0), max(float(result.max()), 0.0)
        return result


class Writer:
    """Writes one network.

    Args:
        model: from :func:`torchquant.bench.peers.cnn_base.folded_graph`.
        calibration: images whose ranges the activations' scales cover; None writes a float file.
    """

    def __init__(self, model: fx.GraphModule, calibration: Tensor | None) -> None:
        self.model, self.graph = model, Graph()
        self.values: dict[fx.Node, str] = {}
        self.ranges: dict[fx.Node, tuple[float, float]] = {}
        self.integers = calibration is not None
        if calibration is not None:
            interpreter = _Ranges(model)
            with torch.no_grad():
                interpreter.run(calibration)
            self.ranges = interpreter.found

    def write(self, pixels: int) -> bytes:
        """The file, for any number of images of one size.

        Raises:
            Unsupported: the network has a node that this writer does not know.
        """
        for node in self.model.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._stored(node, "x")
            elif node.op == "output":
                self._name_result(self.values[node.args[0]])
            else:
                self.values[node] = self._stored(node, self._node(node))
        images = ("FLOAT", ["images", 3, pixels, pixels])
        return self.graph.model({"x": images}, {"y": ("FLOAT", ["images", "classes"])})

    def _name_result(self, value: str) -> None:
        self.graph.nodes.append(_identity(value))

    def _scale(self, node: fx.Node) -> tuple[float, int]:
        least, greatest = self.ranges[node]
        scale = max(greatest - least, 1e-12) / 255
        return scale, round(-least / scale)

    def _stored(self, node: fx.Node, value: str) -> str:
        """The value after a way through uint8, unless its only reader is a relu."""
        users = list(node.users)
        alone = len(users) == 1 and users[0].op in ("call_module", "call_function")
        before_relu = alone and self._is_relu(users[0]) and node.op != "placeholder"
        at_the_end = any(user.op == "output" for user in users)
        if not self.integers or before_relu or at_the_end:
            return value
        qparams = self._scale(node)
        return self.graph.dequantize(self.graph.quantize(value, *qparams), *qparams)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _is_relu(self, node: fx.Node) -> bool:
        return isinstance(self._module(node), RELUS)

    def _node(self, node: fx.Node) -> str:
        inputs = [self.values[arg] for arg in node.args if isinstance(arg, fx.Node)]
        module = self._module(node)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            return self._layer(node, module, inputs)
        if isinstance(module, nn.ReLU6):
            bounds = [self.graph.constant(np.float32(bound)) for bound in (0, 6)]
            return self.graph.add("Clip", [*inputs, *bounds])
        if isinstance(module, nn.ReLU):
            return self.graph.add("Relu", inputs)
        if isinstance(module, nn.MaxPool2d) and not module.ceil_mode:
            kernel, stride, padding = (
                _pair(v) for v in (module.kernel_size, module.stride, module.padding)
            )
            return self.graph.add(
                "MaxPool", inputs, kernel_shape=kernel, strides=stride, pads=padding * 2
            )
        if node.op == "call_function" and node.target in ADDITIONS and len(inputs) == 2:
            return self.graph.add("Add", inputs)
        if self._is_global_pool(node, module):
            return self.graph.add("GlobalAveragePool", inputs)
        if isinstance(module, nn.Flatten) or node.target is torch.flatten:
            return self.graph.add("Flatten", inputs)
        raise Unsupported(f"no ONNX for {node.format_node()}: {module}")

    def _is_global_pool(self, node: fx.Node, module: nn.Module | None) -> bool:
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return module.output_size in (1, (1, 1))
        if node.target is nn.functional.adaptive_avg_pool2d:
            return node.args[1] in (1, (1, 1))
        return False

    def _layer(self, node: fx.Node, layer: nn.Conv2d | nn.Linear, inputs: list[str]) -> str:
        weight, bias = layer.weight.detach(), layer.bias
        offset = torch.zeros(len(weight)) if bias is None else bias.detach()
        if self.integers:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            values, scale = self.graph.weight(weight)
            inputs = [*inputs, values, self.graph.bias(offset, scale * self._read_scale(source))]
        else:
            inputs = [*inputs, *(self.graph.constant(t.numpy()) for t in (weight, offset))]
        if isinstance(layer, nn.Linear):
            return self.graph.add("Gemm", inputs, transB=1)
        return self.graph.add(
            "Conv",
            inputs,
            kernel_shape=list(layer.kernel_size),
            strides=list(layer.stride),
            pads=_pair(layer.padding) * 2,
            dilations=list(layer.dilation),
            group=layer.groups,
        )

    def _read_scale(self, node: fx.Node) -> float:
        return self._scale(node)[0]


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _identity(value: str) -> Any:
    from onnx import helper

    return helper.make_node("Identity", [value], ["y"])
