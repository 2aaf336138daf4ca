"""The peers: one class each, listed here without importing their libraries.

There are two suites, each of comparable peers. `dynamic`: fp32 in, fp32 out, quantization inside
the call. `prequantized`: 8-bit integers in, fp32 out.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchquant.bench.peers.base import LinearPeer

OURS = "torchquant"


@dataclass(frozen=True)
class PeerInfo:
    """A peer's class, as `module:Class`, and the packages that must be installed for it.

    `ours`: another way of using torchquant, measured, but not compared with torchquant.
    """

    target: str
    requires: tuple[str, ...]
    description: str
    default: bool = True
    ours: bool = False

    def missing(self) -> list[str]:
        """The required packages that are not installed."""
        return [name for name in self.requires if find_spec(name) is None]

    def how_to_install(self) -> str:
        """One command that installs all missing packages."""
        return f"pip install {' '.join(self.missing())}"


DYNAMIC = {
    OURS: PeerInfo(
        "ours:Torchquant", (), "torchquant.nn.QuantizedLinear, int8 per token x int8 per channel"
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
    "openvino": PeerInfo(
        "openvino_int8:OpenvinoDynamic",
        ("openvino",),
        "int8 weights, dynamic quantization of activations or its own default, whichever is faster",
    ),
    "torchao": PeerInfo(
        "torchao_int8:TorchaoInt8", ("torchao",), "Int8DynamicActivationInt8WeightConfig, eager"
    ),
    "torchao-compiled": PeerInfo(
        "torchao_int8:TorchaoInt8Compiled", ("torchao",), "the same through torch.compile"
    ),
}

PREQUANTIZED = {
    OURS: PeerInfo("ours:TorchquantStatic", (), "torchquant.ops.linear_static, int8 in, fp32 out"),
    "torchquant-fp32-in": PeerInfo(
        "ours:Torchquant", (), "QuantizedLinear on fp32: the same layer, dynamic", ours=True
    ),
    "torchquant-bf16-in": PeerInfo(
        "ours:TorchquantBfloat16", (), "QuantizedLinear on bf16, bf16 out", ours=True
    ),
    "ao-onednn": PeerInfo(
        "torch_ao_static:TorchAoStaticOnednn", (), "quantized::linear, uint8 in and out, onednn"
    ),
    "ao-fbgemm": PeerInfo(
        "torch_ao_static:TorchAoStaticFbgemm", (), "quantized::linear, uint8 in and out, fbgemm"
    ),
    "onednn": PeerInfo(
        "torch_ao_static:OnednnPointwiseStatic", (), "torch.ops.onednn.qlinear_pointwise"
    ),
    "onnxruntime": PeerInfo(
        "onnx_runtime:OnnxRuntimeStatic",
        ("onnxruntime", "onnx"),
        "MatMulIntegerToFloat, uint8 in",
    ),
    "openvino": PeerInfo(
        "openvino_int8:OpenvinoStatic", ("openvino",), "int8 inference of a quantized graph"
    ),
}

SUITES = {"dynamic": DYNAMIC, "prequantized": PREQUANTIZED}


def all_peer_names() -> list[str]:
    """Every name of every suite, once."""
    return list(dict.fromkeys(name for peers in SUITES.values() for name in peers))


def make_linear_peer(suite: str, name: str, threads: int) -> LinearPeer:
    """Import the peer's library and create the peer, in the peer's own process."""
    module, _, class_name = SUITES[suite][name].target.partition(":")
    module = f"torchquant.bench.peers.{module}"
    peer: LinearPeer = getattr(importlib.import_module(module), class_name)(threads)
    return peer
