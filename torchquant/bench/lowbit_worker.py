"""The worker of the low-bit benchmark: one peer, one layer in one format, one input at a time.

Requests (see :mod:`torchquant.bench.workers`)::

    {"do": "load", "n": 384, "k": 384, "bits": 4, "group_size": 32, "cold": false}  -> {}
    {"do": "input", "m": 16}                -> {"error": 0.07, "seconds": {"operator": 2e-5}}
    {"do": "block", "seconds": 0.05}        -> {"seconds": {"operator": 1e-5}}
    {"do": "about"}                         -> {"torch": "2.13.0", ...}
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from torchquant.bench.layer_worker import CHECKED_ROWS, Server
from torchquant.bench.peers import make_peer
from torchquant.bench.peers.lowbit_base import LowbitLayer, LowbitPeer
from torchquant.bench.workers import Answer, serve


class LowbitServer(Server):
    """A peer's answers."""

    def __init__(self, peer: LowbitPeer) -> None:
        super().__init__()
        self.peer = peer
        self.weights: dict[tuple[int, int], torch.Tensor] = {}  # of the last layer

    @classmethod
    def create(cls, suite: str, peer: str, threads: int) -> LowbitServer:
        """Load the peer's library."""
        torch.set_num_threads(threads)
        return cls(make_peer(suite, peer, threads))

    def load(self, n: int, k: int, bits: int, group_size: int | None, cold: bool) -> Answer:
        """Prepare a layer of ``k`` inputs and ``n`` outputs, without bias."""
        if (n, k) not in self.weights:
            generator = torch.Generator().manual_seed(n * 100_003 + k)
            # Uniform, because few bits hold uniform weights well: the check of results is stricter.
            self.weights = {(n, k): torch.rand(n, k, generator=generator) * 2 - 1}
        self.layer = LowbitLayer(self.weights[n, k], bits, group_size, cold)
        self.calls = {}
        self.peer.load(self.layer)
        return {}

    def input(self, m: int) -> Answer:
        """Prepare an input of ``m`` rows, and call the layer once in every way."""
        k = self.layer.weight.shape[1]
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        with torch.inference_mode():
            self.calls = self.peer.calls(x)
            error = max(self._error(x, call()) for call in self.calls.values())
            if not error <= most_error(self.layer.bits):  # NaN as well
                raise ValueError(
                    f"relative error {error:.3f} against float, at most "
                    f"{most_error(self.layer.bits):.3f} for {self.layer.bits} bits"
                )
            return {"error": error, "seconds": self.seconds_once()}

    def about(self) -> Answer:
        """Versions and settings of the peer's library."""
        return self.peer.about()

    def _error(self, x: torch.Tensor, result: Any) -> float:
        """Relative error of the first rows against the float layer.

        It keeps a peer from being fast because it computes something else.
        """
        if not isinstance(result, torch.Tensor):
            result = torch.as_tensor(result.numpy() if hasattr(result, "numpy") else result)
        if result.shape != (len(x), len(self.layer.weight)):
            raise ValueError(
                f"the result must be {[len(x), len(self.layer.weight)]}, got {list(result.shape)}"
            )
        expected = torch.nn.functional.linear(x[:CHECKED_ROWS], self.layer.weight)
        return float((result[:CHECKED_ROWS].float() - expected).norm() / expected.norm())


def most_error(bits: int) -> float:
    """The largest relative error of a product with uniform weights that were rounded to few bits.

    Rounding alone gives half of a step over the largest weight; all other rounding is small.

    >>> round(most_error(4), 3)
    0.137
    """
    most = 2 ** (bits - 1) - 1
    return 1.5 * 0.5 / float(most) + 0.03


if __name__ == "__main__":
    suite, peer, threads = sys.argv[1:]
    serve(lambda: LowbitServer.create(suite, peer, int(threads)))
