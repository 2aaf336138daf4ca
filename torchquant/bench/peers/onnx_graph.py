"""ONNX graphs of quantized networks, node by node, in the form that onnxruntime's tools write.

Activations are uint8 with one scale per tensor, weights int8 with one scale per output channel,
both with QuantizeLinear and DequantizeLinear around float operators (QDQ).
"""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from torchquant.bench.peers.base import quantize_weight

OPSET = 17


class Graph:
    """Nodes and constants so far. Values are named by the text of their number."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._names = 0

    def constant(self, value: Any) -> str:
        """A named constant of the graph."""
        from onnx import numpy_helper

        name = self._new("constant")
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, op: str, inputs: Sequence[str], domain: str = "", **attributes: Any) -> str:
        """The result of a new node."""
        from onnx import helper

        name = self._new(op.lower())
        self.nodes.append(
            helper.make_node(op, list(inputs), [name], domain=domain or None, **attributes)
        )
        return name

    def quantize(self, value: str, scale: float, zero_point: int) -> str:
        """uint8 of a float value."""
        return self.add("QuantizeLinear", [value, *self.qparams(scale, zero_point)])

    def dequantize(self, value: str, scale: float, zero_point: int) -> str:
        """Floats of a uint8 value."""
        return self.add("DequantizeLinear", [value, *self.qparams(scale, zero_point)])

    def qparams(self, scale: float, zero_point: int) -> list[str]:
        """Scale and zero point as constants."""
        return [self.constant(np.float32(scale)), self.constant(np.uint8(zero_point))]

    def weight(self, weight: Tensor) -> tuple[str, Tensor]:
        """int8 weight per output channel as floats, and its scales."""
        q, scale = quantize_weight(weight.flatten(1))
        zeros = self.constant(np.zeros(len(q), np.int8))
        inputs = [self.constant(q.view(weight.shape).numpy()), self.constant(scale.numpy()), zeros]
        return self.add("DequantizeLinear", inputs, axis=0), scale

    def bias(self, bias: Tensor, scale: Tensor) -> str:
        """int32 bias as floats; its scale is the product of the input's and the weight's."""
        q = (bias.double() / scale.double()).round().clamp(-(2**31), 2**31 - 1)
        inputs = [self.constant(q.numpy().astype(np.int32)), self.constant(scale.numpy())]
        return self.add("DequantizeLinear", inputs, axis=0)

    def model(self, inputs: dict[str, Any], outputs: dict[str, Any]) -> bytes:
        """The file. Inputs and outputs: name to element type and shape."""
        from onnx import TensorProto, helper

        def infos(values: dict[str, Any]) -> list[Any]:
            return [
                helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape)
                for name, (kind, shape) in values.items()
            ]

        graph = helper.make_graph(
            self.nodes, "network", infos(inputs), infos(outputs), self.constants
        )
        versions = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=versions, ir_version=8)
        return bytes(model.SerializeToString())

    def _new(self, stem: str) -> str:
        self._names += 1
        return f"{stem}_{self._names}"


def open_session(model: bytes, threads: int) -> Any:
    """An onnxruntime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def session_calls(session: Any, x: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> Any:
    """Both ways of calling a session of one input `x` and one result `y`.

    Args:
        out: an array of the result's type and shape, into which the binding writes.
    """
    from onnxruntime import OrtValue

    feed, binding = {"x": x}, session.io_binding()
    y = OrtValue.ortvalue_from_numpy(out)
    binding.bind_ortvalue_input("x", OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output("y", y)

    def bound() -> Any:
        session.run_with_iobinding(binding)
        return y.numpy()

    return {"run": lambda: session.run(None, feed)[0], "io_binding": bound}
