"""onnxruntime with dynamic int8: its optimiser fuses the graph into one `DynamicQuantizeMatMul`."""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from peers.base import Call, LinearPeer


def dynamic_linear_model(weight: np.ndarray, bias: np.ndarray) -> bytes:
    """An onnx file of `DynamicQuantizeLinear -> MatMulInteger -> scale -> + bias`.

    The same nodes that `onnxruntime.quantization.quantize_dynamic` writes.

    Args:
        weight: fp32 `[N, K]`, quantized here per channel to int8. bias: fp32 `[N]`.
    """
    out_features, in_features = weight.shape
    scale = (np.maximum(np.abs(weight).max(axis=1), 1e-12) / 127).astype(np.float32)
    qweight = np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8)
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
    constants = [
        numpy_helper.from_array(np.ascontiguousarray(qweight.T), "qweight"),
        numpy_helper.from_array(np.zeros(out_features, np.int8), "w_zero_point"),
        numpy_helper.from_array(scale, "w_scale"),
        numpy_helper.from_array(bias, "bias"),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", out_features])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


class OnnxRuntime(LinearPeer):
    """uint8 activations with one scale per tensor, int8 weights per channel; numpy in and out.

    Called with `run()`, which allocates its result, and with an IO binding, which writes into the
    same buffer every time. The faster one counts.
    """

    session: onnxruntime.InferenceSession

    def load(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        model = dynamic_linear_model(weight.numpy(), bias.numpy())
        self.out_features = len(weight)
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        session, feed = self.session, {"x": x.numpy()}
        binding = session.io_binding()
        result = np.empty((len(x), self.out_features), np.float32)
        y = onnxruntime.OrtValue.ortvalue_from_numpy(result)
        binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(feed["x"]))
        binding.bind_ortvalue_output("y", y)

        def bound() -> onnxruntime.OrtValue:
            session.run_with_iobinding(binding)
            return y

        return {"run": lambda: session.run(None, feed)[0], "io_binding": bound}

    def about(self) -> dict[str, str]:
        return {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
