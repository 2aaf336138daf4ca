"""openvino: one linear layer as a graph, each of the ways in which it can run int8 weights.

What was tried and is never the fastest here: group sizes of 0 and 32, a uint8 weight with a zero
point, uint8 input with `Convert, Subtract, Multiply` in front of a weight that is stored as int8
(it then computes in fp32 or bf16), a fixed number of rows.
"""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

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
from torchquant.bench.peers.openvino_core import OpenvinoCore


class Openvino(LinearPeer):
    """The common part of both suites."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.openvino = OpenvinoCore(threads)

    def about(self) -> dict[str, str]:
        return self.openvino.about()


class OpenvinoDynamic(Openvino):
    """A MatMul with an int8 weight, decompressed by its scales per channel.

    `group128` and `row` quantize the activations to int8 inside the product, in groups of 128 or a
    whole row; `default` is what openvino does unasked (on a CPU with bf16 units: bf16).
    """

    def load(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        model, compile = _weight_only(weight, bias), self.openvino.compile
        int8 = {"INFERENCE_PRECISION_HINT": "f32"}
        self.compiled = {
            "group128": compile(model, DYNAMIC_QUANTIZATION_GROUP_SIZE=128, **int8),
            "row": compile(model, DYNAMIC_QUANTIZATION_GROUP_SIZE=weight.shape[1], **int8),
            "default": compile(model),
        }

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        call = self.openvino.call
        return {name: call(compiled, x.numpy()) for name, compiled in self.compiled.items()}


class OpenvinoStatic(Openvino):
    """A quantized graph with integer input; its low-precision passes make an int8 product of it.

    `int8`: the input passes a FakeQuantize that changes no value; `uint8`: the weight does.
    """

    def load(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.weight, self.bias = weight, bias  # the input's scale is part of the graph

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        q, scale = quantize_input(x)
        signed = self.openvino.compile(_quantized_input(self.weight, self.bias, scale))
        unsigned = self.openvino.compile(_quantized_weight(self.weight, self.bias, scale))
        return {
            "int8": self.openvino.call(signed, q.numpy()),
            "uint8": self.openvino.call(unsigned, as_uint8(q).numpy()),
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
