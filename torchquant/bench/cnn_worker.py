"""The worker of the network benchmark: one peer, one network, one batch at a time.

Requests (see :mod:`torchquant.bench.workers`)::

    {"do": "load", "network": "ResNet-18", "pixels": 224}  -> {}
    {"do": "input", "batch": 8}           -> {"error": 0.02, "seconds": {"eager": 0.03}}
    {"do": "block", "seconds": 0.05}      -> {"seconds": {"eager": 0.02}, "megabytes": 35.0}
    {"do": "about"}                       -> {"torch": "2.13.0", ...}

Memory is what the process has held at most since the network was converted, above what it held
when the library had been imported.
"""

from __future__ import annotations

import gc
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from torchquant.bench.layer_worker import Server
from torchquant.bench.networks import images, random_network, statistics_images
from torchquant.bench.peers import make_peer
from torchquant.bench.peers.cnn_base import NetworkPeer
from torchquant.bench.workers import Answer, peak_megabytes, release_freed_memory, serve


class NetworkServer(Server):
    """A peer's answers."""

    def __init__(self, peer: NetworkPeer) -> None:
        super().__init__()
        self.peer = peer
        self.imported = 0.0

    @classmethod
    def create(cls, suite: str, peer: str, threads: int) -> NetworkServer:
        """Load the peer's library."""
        torch.set_num_threads(threads)
        return cls(make_peer(suite, peer, threads))

    def load(self, network: str, pixels: int) -> Answer:
        """Prepare a network, and keep its float results for the comparison."""
        self.pixels = pixels
        model = random_network(network, pixels)
        with torch.inference_mode():
            self.expected = {n: model(images(n, pixels)) for n in (1,)}
        calibration = images(statistics_images(pixels), pixels)
        _forget_peak()
        self.imported = self.imported or (peak_megabytes() or 0.0) - _megabytes(model)
        with torch.no_grad():
            self.peer.load(model, calibration)
        return {}

    def input(self, batch: int) -> Answer:
        """Prepare a batch whose first image has known results; call in every way."""
        x = images(batch, self.pixels)
        x[:1] = images(1, self.pixels)
        with torch.inference_mode():
            self.calls = self.peer.calls(x)
            _forget_peak()
            error = max(self._error(batch, call()) for call in self.calls.values())
            return {"error": error, "seconds": self.seconds_once()}

    def block(self, seconds: float) -> Answer:
        """The times of a block, and the peak memory so far."""
        answer = super().block(seconds)
        peak = peak_megabytes()
        if peak is not None:
            answer["megabytes"] = round(max(peak - self.imported, 0.0), 1)
        return answer

    def about(self) -> Answer:
        """Versions and settings of the peer's library."""
        return self.peer.about()

    def _error(self, batch: int, result: Any) -> float:
        """Relative error of the first image's results against the float network."""
        found = torch.as_tensor(result)
        expected = self.expected[1]
        if found.shape != (batch, expected.shape[1]):
            raise ValueError(
                f"the result must be {[batch, expected.shape[1]]}, got {[*found.shape]}"
            )
        return float((found[:1].float() - expected).norm() / expected.norm())


def _megabytes(model: torch.nn.Module) -> float:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors) / 2**20


def _forget_peak() -> None:
    """Free what is not needed, and start a new peak (Linux only)."""
    gc.collect()
    release_freed_memory()
    if sys.platform.startswith("linux"):
        with suppress(OSError):  # not allowed: the peak then includes the preparation
            Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    suite, peer, threads = sys.argv[1:]
    serve(lambda: NetworkServer.create(suite, peer, int(threads)))
