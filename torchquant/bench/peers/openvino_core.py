"""openvino: compiling a graph, and a call on bound tensors.

Latency hint, one stream, the benchmark's number of threads; an inference request whose input and
output tensors stay the same.
"""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np

from torchquant.bench.peers.base import Call


class OpenvinoCore:
    """openvino on a number of threads."""

    def __init__(self, threads: int) -> None:
        import openvino

        self.core = openvino.Core()
        self.threads = threads

    def read(self, model: bytes) -> Any:
        """The graph of an ONNX file."""
        return self.core.read_model(model=model)

    def compile(self, model: Any, **options: Any) -> Any:
        """A graph, compiled for the CPU."""
        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        return self.core.compile_model(model, "CPU", settings | options)

    def call(self, compiled: Any, x: np.ndarray[Any, Any]) -> Call:
        """Run the compiled graph on `x`; the result is an array."""
        import openvino

        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(x))
        infer = request.infer

        def call() -> Any:
            infer()
            return request.get_output_tensor().data

        return call

    def about(self) -> dict[str, str]:
        """openvino's version."""
        return {"openvino": version("openvino")}
