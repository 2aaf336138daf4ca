"""onnxruntime's `MatMulNBits`: weights of 2, 4 or 8 bits in groups."""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from torchquant.bench.peers.base import Call
from torchquant.bench.peers.lowbit_base import LowbitLayer, LowbitPeer, NoSuchFormat, in_turn

BITS = (2, 4, 8)
SMALLEST_GROUP = 16


class OnnxNBits(LowbitPeer):
    """int8 compute: `accuracy_level` 4 quantizes the activations, a scale per group.

    Called with an IO binding, which writes into the same buffer every time, and with `run()`. All
    sessions share one thread pool, so that copies of a layer do not have threads that compete.
    """

    accuracy_level = 4
    # False: each session has threads of its own, as sessions that other code makes expect.
    shares_threads = True

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        if self.shares_threads:
            share_threads(threads)

    def load(self, layer: LowbitLayer) -> None:
        if layer.bits not in BITS:
            raise NoSuchFormat("2, 4 and 8 bits only")
        if layer.group_size is None:
            raise NoSuchFormat("groups only")
        if layer.group_size < SMALLEST_GROUP or layer.group_size & (layer.group_size - 1):
            raise NoSuchFormat("groups of 16, 32, 64, ... only")
        q, scales = _quantize(layer.weight, layer.bits, layer.group_size)
        model = nbits_model(q, scales, layer, self.accuracy_level)
        self.out_features = len(layer.weight)
        self.sessions = layer.repeat(q.size, lambda: self._open(model))

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        made = [self._calls(session, x.numpy()) for session in self.sessions]
        return {name: in_turn([calls[name] for calls in made]) for name in made[0]}

    def about(self) -> dict[str, str]:
        import onnx
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}

    def _open(self, model: bytes) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = not self.shares_threads
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def _calls(self, session: Any, x: np.ndarray[Any, Any]) -> dict[str, Call]:
        from onnxruntime import OrtValue

        feed, binding = {"x": x}, session.io_binding()
        y = OrtValue.ortvalue_from_numpy(np.empty((len(x), self.out_features), np.float32))
        binding.bind_ortvalue_input("x", OrtValue.ortvalue_from_numpy(x))
        binding.bind_ortvalue_output("y", y)

        def bound() -> Any:
            session.run_with_iobinding(binding)
            return y

        return {"io_binding": bound, "run": lambda: session.run(None, feed)[0]}


class OnnxNBitsFloat(OnnxNBits):
    """fp32 compute: the activations stay as they are (`accuracy_level` 1)."""

    accuracy_level = 1


@functools.cache
def share_threads(threads: int) -> None:
    """Create the process's thread pool, which cannot be replaced by another one."""
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(threads, 1)


def _quantize(
    weight: torch.Tensor, bits: int, group_size: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Packed integers `[N, groups, bytes]` and scales `[N, groups]`, by onnxruntime, symmetric."""
    from onnxruntime.capi import _pybind_state

    n, k = weight.shape
    groups = -(-k // group_size)
    padded = torch.nn.functional.pad(weight, (0, groups * group_size - k))
    packed = np.zeros((n, groups, group_size * bits // 8), np.uint8)
    scales = np.zeros((n, groups), np.float32)
    zeros = np.zeros((n, -(-groups * bits // 8)), np.uint8)
    quantize = getattr(_pybind_state, f"quantize_matmul_{bits}bits")
    columns = np.ascontiguousarray(padded.numpy().T)
    quantize(packed, columns, scales, zeros, group_size, n, groups * group_size, True)
    return packed, scales


def nbits_model(
    q: np.ndarray[Any, Any], scales: np.ndarray[Any, Any], layer: LowbitLayer, accuracy_level: int
) -> bytes:
    """An onnx file of one `MatMulNBits`, fp32 in and out."""
    from onnx import TensorProto, helper, numpy_helper

    n, k = layer.weight.shape
    node = helper.make_node(
        "MatMulNBits",
        ["x", "q", "scales"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=layer.bits,
        block_size=layer.group_size,
        accuracy_level=accuracy_level,
    )
    constants = [numpy_helper.from_array(q, "q"), numpy_helper.from_array(scales.ravel(), "scales")]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", k), ("y", n))
    )
    graph = helper.make_graph([node], "linear", [x], [y], constants)
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=8)
    return bytes(model.SerializeToString())
