"""torchquant's own layers with weights of few bits, and its int8 layer for comparison."""

from __future__ import annotations

import copy
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

import torchquant
from torchquant.bench.peers.base import Call, float_linear
from torchquant.bench.peers.lowbit_base import (
    LowbitLayer,
    LowbitPeer,
    SameForAllFormats,
    in_turn,
    quantize_groups,
)


def about() -> dict[str, str]:
    """Version and instruction set."""
    return {"torchquant": version("torchquant"), "isa": torchquant.cpu.active_isa()}


class Torchquant(LowbitPeer):
    """`ops.linear_dynamic_intx`: activations quantized per token, with zero points."""

    def load(self, layer: LowbitLayer) -> None:
        q, scale = quantize_groups(layer.weight, layer.bits, layer.group_size)
        if layer.group_size is None:
            scale = scale[:, 0].contiguous()
        packed = torchquant.ops.pack_intx_weight(
            q, scale, bits=layer.bits, group_size=layer.group_size
        )
        self.packed = layer.repeat(packed.numel(), packed.clone)
        self.options: dict[str, Any] = {
            "out_features": len(q),
            "bits": layer.bits,
            "group_size": layer.group_size,
            "symmetric": False,
        }

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        linear, options = torchquant.ops.linear_dynamic_intx, self.options
        return {"operator": in_turn(partial(linear, x, p, **options) for p in self.packed)}

    def about(self) -> dict[str, str]:
        return about()


class TorchquantInt8(SameForAllFormats):
    """`QuantizedLinear` as `quantize_` makes it: int8 per channel, activations per token."""

    def convert(self, layer: LowbitLayer) -> None:
        made = torchquant.nn.QuantizedLinear.from_float(float_linear(layer.weight, None))
        self.layers = layer.repeat(layer.weight.numel(), lambda: copy.deepcopy(made))

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        return {"module": in_turn(partial(layer, x) for layer in self.layers)}

    def about(self) -> dict[str, str]:
        return about()
