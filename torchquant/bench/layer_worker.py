"""The worker of the linear benchmarks: one peer, one layer, one input at a time.

Requests (see :mod:`torchquant.bench.workers`)::

    {"do": "load", "n": 384, "k": 384}      -> {}
    {"do": "input", "m": 16}                -> {"error": 0.008, "seconds": {"run": 2e-5, ...}}
    {"do": "block", "seconds": 0.05}        -> {"seconds": {"run": 1e-5, "io_binding": 8e-6}}
    {"do": "about"}                         -> {"torch": "2.13.0", ...}
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from torchquant.bench.peers import make_linear_peer
from torchquant.bench.peers.base import LinearPeer
from torchquant.bench.timing import seconds_per_call
from torchquant.bench.workers import Answer, serve

CHECKED_ROWS = 4
SLOWER_WAY = 1.3  # a way of calling that takes this many times as long as the fastest is dropped


class Server:
    """What the workers of all benchmarks have in common: calls by name, and their blocks."""

    def __init__(self) -> None:
        self.calls: dict[str, Callable[[], Any]] = {}

    def block(self, seconds: float) -> Answer:
        """Median seconds per call, for every way of calling that is nearly as fast as the best."""
        with torch.inference_mode():
            found = {name: seconds_per_call(call, seconds) for name, call in self.calls.items()}
        limit = SLOWER_WAY * min(found.values())
        self.calls = {name: call for name, call in self.calls.items() if found[name] <= limit}
        return {"seconds": found}

    def seconds_once(self) -> dict[str, float]:
        """Seconds of one call in every way."""
        return {name: _seconds_once(call) for name, call in self.calls.items()}


class LayerServer(Server):
    """A peer's answers."""

    def __init__(self, peer: LinearPeer) -> None:
        super().__init__()
        self.peer = peer

    @classmethod
    def create(cls, suite: str, peer: str, threads: int) -> LayerServer:
        """Load the peer's library."""
        torch.set_num_threads(threads)
        return cls(make_linear_peer(suite, peer, threads))

    def load(self, n: int, k: int) -> Answer:
        """Prepare a layer of ``k`` inputs and ``n`` outputs."""
        generator = torch.Generator().manual_seed(n * 100_003 + k)
        self.weight = torch.randn(n, k, generator=generator) / k**0.5
        self.bias = torch.randn(n, generator=generator)
        self.peer.load(self.weight, self.bias)
        return {}

    def input(self, m: int) -> Answer:
        """Prepare an input of ``m`` rows, and call the layer once in every way."""
        x = torch.randn(m, self.weight.shape[1], generator=torch.Generator().manual_seed(m))
        with torch.inference_mode():
            self.calls = self.peer.calls(x)
            error = max(self._error(x, call()) for call in self.calls.values())
            seconds = self.seconds_once()
        return {"error": error, "seconds": seconds}

    def about(self) -> Answer:
        """Versions and settings of the peer's library."""
        return self.peer.about()

    def _error(self, x: torch.Tensor, result: Any) -> float:
        """Relative error of the first rows against the float layer.

        It keeps a peer from being fast because it computes something else.
        """
        if not isinstance(result, torch.Tensor):
            result = torch.as_tensor(result.numpy() if hasattr(result, "numpy") else result)
        if result.shape != (len(x), len(self.weight)):
            raise ValueError(
                f"the result must be {[len(x), len(self.weight)]}, got {list(result.shape)}"
            )
        if result.is_quantized:
            result = result.dequantize()
        expected = torch.nn.functional.linear(x[:CHECKED_ROWS], self.weight, self.bias)
        return float((result[:CHECKED_ROWS].float() - expected).norm() / expected.norm())


def _seconds_once(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    suite, peer, threads = sys.argv[1:]
    serve(lambda: LayerServer.create(suite, peer, int(threads)))
