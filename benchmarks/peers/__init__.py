"""Who is measured: one class per peer, named here without importing any of their libraries."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peers.base import LinearPeer

OURS = "torchquant"


@dataclass(frozen=True)
class PeerInfo:
    """A peer's class, as `module:Class`, and what must be installed for it."""

    target: str
    requires: tuple[str, ...]
    description: str
    default: bool = True

    def missing(self) -> list[str]:
        """The packages that it needs and that are not installed."""
        return [name for name in self.requires if find_spec(name) is None]


LINEAR_PEERS = {
    OURS: PeerInfo(
        "ours:Torchquant",
        ("torchquant",),
        "torchquant.nn.QuantizedLinear, int8 per token x int8 per channel",
    ),
    "fp32": PeerInfo("torch_float:TorchFloat", (), "nn.Linear, fp32"),
    "bf16": PeerInfo(
        "torch_float:TorchBfloat16", (), "nn.Linear in bf16, bf16 activations in and out"
    ),
    "ao-onednn": PeerInfo("torch_ao:TorchAoOnednn", (), "torch.ao dynamic int8, engine onednn"),
    "ao-fbgemm": PeerInfo("torch_ao:TorchAoFbgemm", (), "torch.ao dynamic int8, engine fbgemm"),
    "ao-x86": PeerInfo(
        "torch_ao:TorchAoX86",
        (),
        "torch.ao dynamic int8, engine x86 (oneDNN or FBGEMM, its choice)",
    ),
    "ao-qnnpack": PeerInfo(
        "torch_ao:TorchAoQnnpack", (), "torch.ao dynamic int8, engine qnnpack", default=False
    ),
    "onednn": PeerInfo(
        "torch_ao:OnednnPointwise", (), "quantize + torch.ops.onednn.qlinear_pointwise"
    ),
    "onnxruntime": PeerInfo(
        "onnx_runtime:OnnxRuntime",
        ("onnxruntime", "onnx"),
        "DynamicQuantizeMatMul, int8 per channel",
    ),
    "torchao": PeerInfo(
        "torchao_int8:TorchaoInt8", ("torchao",), "Int8DynamicActivationInt8WeightConfig, eager"
    ),
    "torchao-compiled": PeerInfo(
        "torchao_int8:TorchaoInt8Compiled",
        ("torchao",),
        "the same through torch.compile",
        default=False,
    ),
}


def make_linear_peer(name: str, threads: int) -> LinearPeer:
    """Import the peer's library and create it. For the peer's own process."""
    module, _, class_name = LINEAR_PEERS[name].target.partition(":")
    peer: LinearPeer = getattr(importlib.import_module(f"peers.{module}"), class_name)(threads)
    return peer
