"""llama.cpp's products, through the libraries that the package llama-cpp-python contains.

`ggml_mul_mat` quantizes fp32 activations to 8 bits in groups of 32 (256 for the K types) and
multiplies integers. The weight lies in the buffer type that llama.cpp itself chooses for it on a
CPU: repacked for the CPU's instructions where llama.cpp can, else as the file has it.
"""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchquant.bench.peers.base import Call
from torchquant.bench.peers.lowbit_base import LowbitLayer, LowbitPeer, NoSuchFormat, in_turn

# Types by their bits, with their numbers in `enum ggml_type` and the inputs that share a scale.
TYPES: dict[int, dict[str, tuple[int, int]]] = {
    2: {"Q2_K": (10, 256)},
    3: {"Q3_K": (11, 256)},
    4: {"Q4_0": (2, 32), "Q4_1": (3, 32), "Q4_K": (12, 256)},
    5: {"Q5_0": (6, 32), "Q5_1": (7, 32), "Q5_K": (13, 256)},
    6: {"Q6_K": (14, 256)},
    8: {"Q8_0": (8, 32)},
}
FLOAT32 = 0
# Functions: result, arguments. `void *` stands for every pointer.
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, []),  # its argument is a structure, below
    "ggml_free": (None, [c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead": (c_size_t, []),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_set_threadpool": (None, [c_void_p, c_void_p]),
    "ggml_threadpool_params_init": (None, [c_void_p, c_int]),
    "ggml_threadpool_new": (c_void_p, [c_void_p]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
}


class InitParameters(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Library:
    """ggml's functions by name, from the shared libraries of llama-cpp-python."""

    def __init__(self) -> None:
        found = find_spec("llama_cpp")
        assert found is not None and found.origin is not None
        folder = Path(found.origin).parent / "lib"
        self._libraries = [
            ctypes.CDLL(str(folder / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml-cpu", "ggml")
        ]
        for name, (result, arguments) in SIGNATURES.items():
            function = self._function(name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.ggml_init.argtypes = [InitParameters]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ggml has no {name}")

    def _function(self, name: str) -> Any:
        for library in self._libraries:
            if hasattr(library, name):
                return getattr(library, name)
        raise RuntimeError(f"the libraries of llama-cpp-python have no {name}")


class Ggml(LowbitPeer):
    """Every type of as many bits is measured; the fastest one counts."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.ggml = ggml = Library()
        self.backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(self.backend, threads)
        # Threads that stay, as llama.cpp's own programs have them. The structure is of an unknown
        # size: of 1 kB, with its default values.
        parameters = ctypes.create_string_buffer(4096)
        ggml.ggml_threadpool_params_init(parameters, threads)
        pool = ggml.ggml_threadpool_new(parameters)
        ggml.ggml_backend_cpu_set_threadpool(self.backend, pool)
        self.device = ggml.ggml_backend_reg_dev_get(ggml.ggml_backend_cpu_reg(), 0)
        self.used: dict[str, str] = {}
        self.weights: dict[str, list[Product]] = {}

    def load(self, layer: LowbitLayer) -> None:
        for products in self.weights.values():
            for product in products:
                product.free()
        self.weights = {}
        n, k = layer.weight.shape
        types = {
            name: number
            for name, (number, block) in TYPES.get(layer.bits, {}).items()
            if k % block == 0
        }
        if not types:
            raise NoSuchFormat("none of as many bits for as many inputs")
        for name, number in types.items():
            data = self._quantized(number, layer.weight)
            self.weights[name] = layer.repeat(data.size, partial(Product, self, number, n, k, data))
            self.used[name] = self.weights[name][0].buffer_type

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        rows = np.ascontiguousarray(x.numpy())
        return {
            name: in_turn([product.call(rows) for product in products])
            for name, products in self.weights.items()
        }

    def about(self) -> dict[str, str]:
        return {"llama-cpp-python": version("llama-cpp-python")}

    def _quantized(self, number: int, weight: torch.Tensor) -> np.ndarray[Any, Any]:
        n, k = weight.shape
        data = np.empty(n * self.ggml.ggml_row_size(number, k), np.uint8)
        source = np.ascontiguousarray(weight.numpy())
        self.ggml.ggml_quantize_chunk(number, source.ctypes.data, data.ctypes.data, 0, n, k, None)
        return data


class Product:
    """A weight `[n, k]` in ggml's memory, and the graph of one product with it."""

    def __init__(self, peer: Ggml, number: int, n: int, k: int, data: np.ndarray[Any, Any]) -> None:
        self.peer, self.n, self.k = peer, n, k
        ggml = peer.ggml
        self.held: list[tuple[Any, Any]] = []  # contexts and buffers
        for buffer_type in self._buffer_types():
            context = self._context()
            weight = ggml.ggml_new_tensor_2d(context, number, k, n)
            buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
            if buffer and self._multiplies(weight):
                break
            if buffer:
                ggml.ggml_backend_buffer_free(buffer)
            ggml.ggml_free(context)
        self.held.append((context, buffer))
        self.weight = weight
        self.buffer_type = ggml.ggml_backend_buft_name(buffer_type).decode()
        ggml.ggml_backend_tensor_set(weight, data.ctypes.data, 0, data.size)

    def call(self, rows: np.ndarray[Any, Any]) -> Call:
        """The product with `rows` `[m, k]`; it writes into the same memory every time."""
        ggml, m = self.peer.ggml, len(rows)
        while len(self.held) > 1:  # the inputs of an earlier call
            self._drop(*self.held.pop())
        context = self._context()
        x = ggml.ggml_new_tensor_2d(context, FLOAT32, self.k, m)
        y = ggml.ggml_mul_mat(context, self.weight, x)
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, y)
        buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(
            context, ggml.ggml_backend_cpu_buffer_type()
        )
        self.held.append((context, buffer))
        ggml.ggml_backend_tensor_set(x, rows.ctypes.data, 0, rows.nbytes)
        address = ggml.ggml_get_data(y)
        values: Any = (ctypes.c_float * (m * self.n)).from_address(address)
        result = np.frombuffer(values, np.float32).reshape(m, self.n)
        compute, backend = ggml.ggml_backend_graph_compute, self.peer.backend

        def call() -> Any:
            if compute(backend, graph):
                raise RuntimeError("ggml_backend_graph_compute failed")
            return result

        return call

    def free(self) -> None:
        """Release the memory."""
        while self.held:
            self._drop(*self.held.pop())

    def _drop(self, context: Any, buffer: Any) -> None:
        self.peer.ggml.ggml_backend_buffer_free(buffer)
        self.peer.ggml.ggml_free(context)

    def _context(self) -> Any:
        ggml = self.peer.ggml
        size = 4 * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead() + 1024
        return ggml.ggml_init(InitParameters(size, None, True))

    def _buffer_types(self) -> Iterator[Any]:
        """Those that repack, then the plain one, which takes every weight."""
        ggml = self.peer.ggml
        address = ggml.ggml_backend_reg_get_proc_address(
            ggml.ggml_backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts"
        )
        if address:
            extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(self.peer.device)
            index = 0
            while extra and extra[index]:
                yield extra[index]
                index += 1
        yield ggml.ggml_backend_cpu_buffer_type()

    def _multiplies(self, weight: Any) -> bool:
        """Whether the CPU multiplies a weight that lies in such a buffer."""
        ggml, context = self.peer.ggml, self._context()
        x = ggml.ggml_new_tensor_2d(context, FLOAT32, self.k, 512)
        y = ggml.ggml_mul_mat(context, weight, x)
        supported = bool(ggml.ggml_backend_dev_supports_op(self.peer.device, y))
        ggml.ggml_free(context)
        return supported
