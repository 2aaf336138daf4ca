"""openvino: one linear layer as a graph, each of the ways in which it can run int8 weights.

Latency hint, one stream, the benchmark's number of threads; an inference request whose input and
output tensors stay the same. What was tried and is never the fastest here: group sizes of 0 and 32,
a uint8 weight with a zero point, uint8 input with `Convert, Subtract, Multiply` in front of a
weight that is stored as int8 (it then computes in fp32 or bf16), a fixed number of rows.
"""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from torchquant.bench.peers.base import (
    Call,
    LinearPeer,
    as_uint8,
    quantize_input,
    quantize_weight,
)


class Openvino(LinearPeer):
    """The common part of both suites: compiling a graph, and a call on bound tensors."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        import openvino

        self.core = openvino.Core()

    def about(self) -> dict[str, str]:
        return {"openvino": version("openvino")}

    def _compile(self, model: Any, **options: Any) -> Any:
        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        return self.core.compile_model(model, "CPU", settings | options)

    def _call(self, compiled: Any, x: np.ndarray[Any, Any]) -> Call:
        import openvino

        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(x))
        infer = request.infer

        def call() -> Any:
            infer()
            return request.get_output_tensor().data

        return call


class OpenvinoDynamic(Openvino):
    """A MatMul with an int8 weight, decompressed by its scales per channel.

    `group128` and `row` quantize the activations to int8 inside the product, in groups of 128 or a
    whole row; `default` is what openvino does unasked (on a CPU with bf16 units: bf16).
    """

    def load(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        model = _weight_only(weight, bias)
        int8 = {"INFERENCE_PRECISION_HINT": "f32"}
        self.compiled = {
            "group128": self._compile(model, DYNAMIC_QUANTIZATION_GROUP_SIZE=128, **int8),
            "row": self._compile(model, DYNAMIC_QUANTIZATION_GROUP_SIZE=weight.shape[1], **int8),
            "default": self._compile(model),
        }

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        return {name: self._call(compiled, x.numpy()) for name, compiled in self.compiled.items()}


class OpenvinoStatic(Openvino):
    """A quantized graph with integer input; its low-precision passes make an int8 product of it.

    `int8`: the input passes a FakeQuantize that changes no value; `uint8`: the weight does.
    """

    def load(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.weight, self.bias = weight, bias  # the input's scale is part of the graph

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        q, scale = quantize_input(x)
        signed = self._compile(_quantized_input(self.weight, self.bias, scale))
        unsigned = self._compile(_quantized_weight(self.weight, self.bias, scale))
        return {
            "int8": self._call(signed, q.numpy()),
            "uint8": self._call(unsigned, as_uint8(q).numpy()),
        }


def _weight_only(weight: torch.Tensor, bias: torch.Tensor) -> Any:
    from openvino import Model
    from openvino import opset13 as op

    x = op.parameter([-1, weight.shape[1]], np.float32)
    product = op.matmul(x, _int8_weight(weight), False, True)
    return Model([op.add(product, op.constant(bias.numpy()[None]))], [x])


def _quantized_input(weight: torch.Tensor, bias: torch.Tensor, scale: float) -> Any:
    from openvino import Model
    from openvino import opset13 as op

    x = op.parameter([-1, weight.shape[1]], np.int8)
    low, high = op.constant(np.float32(-128)), op.constant(np.float32(127))
    real_low, real_high = (
        op.constant(np.float32(-128 * scale)),
        op.constant(np.float32(127 * scale)),
    )
    real = op.fake_quantize(op.convert(x, np.float32), low, high, real_low, real_high, 256)
    product = op.matmul(real, _int8_weight(weight), False, True)
    return Model([op.add(product, op.constant(bias.numpy()[None]))], [x])


def _quantized_weight(weight: torch.Tensor, bias: torch.Tensor, scale: float) -> Any:
    from openvino import Model
    from openvino import opset13 as op

    x = op.parameter([-1, weight.shape[1]], np.uint8)
    zero = op.convert(op.constant(np.uint8(128)), np.float32)
    real = op.multiply(op.subtract(op.convert(x, np.float32), zero), op.constant(np.float32(scale)))
    q, weight_scale = quantize_weight(weight)
    most = op.constant((127 * weight_scale[:, None]).numpy())
    least = op.constant((-127 * weight_scale[:, None]).numpy())
    values = op.constant((q * weight_scale[:, None]).numpy())
    quantized = op.fake_quantize(values, least, most, least, most, 255)
    product = op.matmul(real, quantized, False, True)
    return Model([op.add(product, op.constant(bias.numpy()[None]))], [x])


def _int8_weight(weight: torch.Tensor) -> Any:
    from openvino import opset13 as op

    q, scale = quantize_weight(weight)
    integers = op.convert(op.constant(q.numpy()), np.float32)
    return op.multiply(integers, op.constant(scale.numpy()[:, None]))
