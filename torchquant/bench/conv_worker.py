"""The worker of the convolution benchmark: one peer, one layer, one batch at a time.

Requests (see :mod:`torchquant.bench.workers`)::

    {"do": "load", "channels": 64, "outputs": 64, "kernel": 3, "stride": 1, "groups": 1}  -> {}
    {"do": "input", "batch": 8, "height": 56, "width": 56}  -> {"error": 0.008, "seconds": {...}}
    {"do": "block", "seconds": 0.05}                        -> {"seconds": {"op": 1e-5}}
    {"do": "about"}                                         -> {"torch": "2.13.0", ...}
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from torchquant.bench.layer_worker import Server
from torchquant.bench.peers import make_peer
from torchquant.bench.peers.conv_base import ConvLayer, ConvPeer, quantized_call
from torchquant.bench.workers import Answer, serve


class ConvServer(Server):
    """A peer's answers."""

    def __init__(self, peer: ConvPeer) -> None:
        super().__init__()
        self.peer = peer

    @classmethod
    def create(cls, suite: str, peer: str, threads: int) -> ConvServer:
        """Load the peer's library."""
        torch.set_num_threads(threads)
        return cls(make_peer(suite, peer, threads))

    def load(self, channels: int, outputs: int, kernel: int, stride: int, groups: int) -> Answer:
        """Prepare a layer."""
        inner = channels // groups * kernel * kernel
        generator = torch.Generator().manual_seed(outputs * 100_003 + inner)
        weight = torch.randn(outputs, channels // groups, kernel, kernel, generator=generator)
        bias = torch.randn(outputs, generator=generator)
        self.layer = ConvLayer(weight / inner**0.5, bias, stride, kernel // 2, groups)
        self.peer.load(self.layer)
        return {}

    def input(self, batch: int, height: int, width: int) -> Answer:
        """Prepare a batch, and call the layer once in every way."""
        channels = self.layer.weight.shape[1] * self.layer.groups
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, channels, height, width, generator=generator).relu_()
        with torch.inference_mode():
            call = quantized_call(self.layer, x)
            self.calls = self.peer.calls(call)
            error = max(
                _error(self.peer.values(call, way, run()), call.expected)
                for way, run in self.calls.items()
            )
            return {"error": error, "seconds": self.seconds_once()}

    def about(self) -> Answer:
        """Versions and settings of the peer's library."""
        return self.peer.about()


def _error(result: Any, expected: torch.Tensor) -> float:
    """Relative error against the float layer.

    It keeps a peer from being fast because it computes something else.
    """
    if result.shape != expected.shape:
        raise ValueError(f"the result must be {[*expected.shape]}, got {[*result.shape]}")
    return float((result.float() - expected).norm() / expected.norm())


if __name__ == "__main__":
    suite, peer, threads = sys.argv[1:]
    serve(lambda: ConvServer.create(suite, peer, int(threads)))
