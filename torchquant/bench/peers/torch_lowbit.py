"""torch's own layers for the low-bit benchmark: fp32, bf16, and its int4 operator."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from torchquant.bench.peers.base import Call, NotInThisTorch, float_linear
from torchquant.bench.peers.lowbit_base import (
    LowbitLayer,
    LowbitPeer,
    NoSuchFormat,
    SameForAllFormats,
    in_turn,
)


class TorchFloat(SameForAllFormats):
    """`nn.Linear` in fp32."""

    dtype = torch.float32

    def convert(self, layer: LowbitLayer) -> None:
        weight = layer.weight.to(self.dtype)
        size = weight.numel() * weight.element_size()
        self.layers = layer.repeat(size, lambda: float_linear(weight.clone(), None))

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        x = x.to(self.dtype)
        return {"module": in_turn(partial(layer, x) for layer in self.layers)}

    def about(self) -> dict[str, str]:
        return {"torch": torch.__version__}


class TorchBfloat16(TorchFloat):
    """bf16 weights, activations and result: no conversion is measured."""

    dtype = torch.bfloat16


class TorchInt4(LowbitPeer):
    """`_weight_int4pack_mm_for_cpu`: 4-bit weights in groups, float activations.

    Measured in bf16, as torchao uses it, and in fp32; the faster one counts.
    """

    groups = (32, 64, 128, 256)

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
            raise NotInThisTorch(f"torch {torch.__version__} has no _weight_int4pack_mm_for_cpu")

    def load(self, layer: LowbitLayer) -> None:
        if layer.bits != 4 or layer.group_size not in self.groups:
            raise NoSuchFormat("4 bits in groups of 32, 64, 128 or 256 only")
        if layer.weight.shape[1] % layer.group_size:
            raise NoSuchFormat("inputs that are no multiple of the group size")
        self.group_size = layer.group_size
        groups = layer.weight.unflatten(1, (-1, layer.group_size))
        low, high = groups.aminmax(dim=-1)
        scale = (high - low).clamp_min(1e-9) / 15
        q = ((groups - low[..., None]) / scale[..., None]).round_().clamp_(0, 15)
        integers = q.flatten(1).to(torch.int32)
        # A value is (q - 8) * scale + zero.
        pairs = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
        self.packed = layer.repeat(packed.numel() * packed.element_size(), packed.clone)
        self.pairs = {"bf16": pairs.bfloat16(), "fp32": pairs}

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        return {name: self._call(x.to(pairs.dtype), pairs) for name, pairs in self.pairs.items()}

    def about(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def _call(self, x: torch.Tensor, pairs: torch.Tensor) -> Call:
        product: Any = torch.ops.aten._weight_int4pack_mm_for_cpu
        size = self.group_size
        return in_turn(partial(product, x, packed, size, pairs) for packed in self.packed)
