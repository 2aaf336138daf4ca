"""onnxruntime: dynamic int8, which its optimiser fuses into one `DynamicQuantizeMatMul`, and
prequantized, as its own fused operator `MatMulIntegerToFloat`.
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


def dynamic_linear_model(weight: torch.Tensor, bias: torch.Tensor) -> bytes:
    """An onnx file of `DynamicQuantizeLinear -> MatMulInteger -> scale -> + bias`.

    The same nodes that `onnxruntime.quantization.quantize_dynamic` writes.

    Args:
        weight: fp32 `[N, K]`, quantized here per channel to int8. bias: fp32 `[N]`.
    """
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["qx", "x_scale", "x_zero_point"]),
        helper.make_node(
            "MatMulInteger", ["qx", "qweight", "x_zero_point", "w_zero_point"], ["sums"]
        ),
        helper.make_node("Cast", ["sums"], ["float_sums"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x_scale", "w_scale"], ["scale"]),
        helper.make_node("Mul", ["float_sums", "scale"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    return _model(nodes, weight, bias, {}, "FLOAT")


def static_linear_model(weight: torch.Tensor, bias: torch.Tensor, x_scale: float) -> bytes:
    """An onnx file of one `MatMulIntegerToFloat`: uint8 `x` with zero point 128 in, fp32 out."""
    from onnx import helper

    inputs = ["x", "qweight", "x_scale", "w_scale", "x_zero_point", "w_zero_point", "bias"]
    nodes = [helper.make_node("MatMulIntegerToFloat", inputs, ["y"], domain="com.microsoft")]
    constants = {"x_scale": np.float32(x_scale), "x_zero_point": np.uint8(128)}
    return _model(nodes, weight, bias, constants, "UINT8")


def _model(
    nodes: list[Any],
    weight: torch.Tensor,
    bias: torch.Tensor,
    constants: dict[str, Any],
    input_type: str,
) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    out_features, in_features = weight.shape
    qweight, scale = quantize_weight(weight)
    constants = constants | {
        "qweight": np.ascontiguousarray(qweight.numpy().T),
        "w_zero_point": np.zeros(out_features, np.int8),
        "w_scale": scale.numpy(),
        "bias": bias.numpy(),
    }
    x_type = getattr(TensorProto, input_type)
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", x_type, ["rows", in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", out_features])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=8)
    return bytes(model.SerializeToString())


class OnnxRuntime(LinearPeer):
    """uint8 activations with one scale per tensor, int8 weights per channel; numpy in and out.

    Called with `run()`, which allocates its result, and with an IO binding, which writes into the
    same buffer every time. The faster one counts.
    """

    session: Any

    def load(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self._open(dynamic_linear_model(weight, bias), len(weight))

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        return self._calls(x.numpy())

    def about(self) -> dict[str, str]:
        import onnx
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}

    def _open(self, model: bytes, out_features: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.out_features = out_features
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )

    def _calls(self, x: np.ndarray[Any, Any]) -> dict[str, Call]:
        from onnxruntime import OrtValue

        session, feed = self.session, {"x": x}
        binding = session.io_binding()
        y = OrtValue.ortvalue_from_numpy(np.empty((len(x), self.out_features), np.float32))
        binding.bind_ortvalue_input("x", OrtValue.ortvalue_from_numpy(x))
        binding.bind_ortvalue_output("y", y)

        def bound() -> Any:
            session.run_with_iobinding(binding)
            return y

        return {"run": lambda: session.run(None, feed)[0], "io_binding": bound}


class OnnxRuntimeStatic(OnnxRuntime):
    """uint8 in, fp32 out. For signed input onnxruntime uses a path that is 100 times slower."""

    def load(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.weight, self.bias = weight, bias  # the input's scale is part of the graph

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        q, scale = quantize_input(x)
        self._open(static_linear_model(self.weight, self.bias, scale), len(self.weight))
        return self._calls(as_uint8(q).numpy())
