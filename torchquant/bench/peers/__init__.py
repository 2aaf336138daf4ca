"""The peers: one class each, listed here without importing their libraries.

Each suite is of comparable peers. Linear layers: `dynamic`, fp32 in, fp32 out, quantization inside
the call; `prequantized`, 8-bit integers in, fp32 out. `conv`: a convolution with bias and relu,
8-bit integers in and out. `cnn`: a whole network, fp32 in and out. `lowbit` and `lowbit-float`: a
linear layer whose weights have 2 to 8 bits, with int8 activations inside the call, and with float
activations.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchquant.bench.peers.base import LinearPeer

OURS = "torchquant"
PACKAGES = {"llama_cpp": "llama-cpp-python"}  # whose name is not that of its module


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
        return f"pip install {' '.join(PACKAGES.get(name, name) for name in self.missing())}"


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

CONV = {
    OURS: PeerInfo("ours_conv:TorchquantConv", (), "torchquant.ops.conv_static, int8 in and out"),
    "fp32": PeerInfo("torch_conv:TorchConv", (), "F.conv2d and relu, fp32, channels-last"),
    "bf16": PeerInfo("torch_conv:TorchConvBfloat16", (), "the same in bf16"),
    "onednn": PeerInfo(
        "torch_ao_conv:OnednnConv", (), "torch.ops.onednn.qconv_pointwise, uint8 in and out"
    ),
    "ao-onednn": PeerInfo(
        "torch_ao_conv:TorchAoConvOnednn", (), "quantized::conv2d_relu, engine onednn"
    ),
    "ao-x86": PeerInfo("torch_ao_conv:TorchAoConvX86", (), "quantized::conv2d_relu, engine x86"),
    "ao-fbgemm": PeerInfo(
        "torch_ao_conv:TorchAoConvFbgemm", (), "quantized::conv2d_relu, engine fbgemm"
    ),
    "onnxruntime": PeerInfo(
        "onnx_conv:OnnxRuntimeConv",
        ("onnxruntime", "onnx"),
        "QLinearConv, uint8 in and out, NHWC and NCHW",
    ),
    "openvino": PeerInfo(
        "onnx_conv:OpenvinoConv", ("openvino", "onnx"), "int8 inference of a QDQ file, NHWC"
    ),
}

CNN = {
    OURS: PeerInfo(
        "ours_cnn:TorchquantNetwork", (), "prepare_, calibrate, convert_ on the network as it is"
    ),
    "fp32": PeerInfo("torch_cnn:TorchNetwork", (), "fp32, channels-last, batch norm folded"),
    "bf16": PeerInfo("torch_cnn:TorchNetworkBfloat16", (), "the same in bf16, bf16 in and out"),
    "ao-onednn": PeerInfo("torch_cnn:TorchAoNetworkOnednn", (), "torch.ao FX, engine onednn"),
    "ao-x86": PeerInfo("torch_cnn:TorchAoNetworkX86", (), "torch.ao FX, engine x86"),
    "ao-fbgemm": PeerInfo("torch_cnn:TorchAoNetworkFbgemm", (), "torch.ao FX, engine fbgemm"),
    "onnxruntime-fp32": PeerInfo(
        "onnx_cnn:OnnxRuntimeFloatNetwork", ("onnxruntime", "onnx"), "fp32, batch norm folded"
    ),
    "onnxruntime": PeerInfo(
        "onnx_cnn:OnnxRuntimeNetwork", ("onnxruntime", "onnx"), "int8 QDQ, weights per channel"
    ),
    "openvino": PeerInfo(
        "onnx_cnn:OpenvinoNetwork", ("openvino", "onnx"), "int8 inference of the same QDQ file"
    ),
}

_LOWBIT_PEERS = {
    "torchquant-int8": PeerInfo(
        "ours_lowbit:TorchquantInt8", (), "QuantizedLinear, int8 per channel", ours=True
    ),
    "fp32": PeerInfo("torch_lowbit:TorchFloat", (), "nn.Linear, fp32"),
    "bf16": PeerInfo("torch_lowbit:TorchBfloat16", (), "nn.Linear in bf16, bf16 in and out"),
    "torch-int4": PeerInfo(
        "torch_lowbit:TorchInt4", (), "torch's _weight_int4pack_mm_for_cpu, bf16 or fp32"
    ),
}

LOWBIT = {
    OURS: PeerInfo("ours_lowbit:Torchquant", (), "int8 per token x 2 to 8 bits per group"),
    **_LOWBIT_PEERS,
    "onnxruntime": PeerInfo(
        "onnx_nbits:OnnxNBits", ("onnxruntime", "onnx"), "MatMulNBits, accuracy_level 4 (int8)"
    ),
    "llama.cpp": PeerInfo(
        "ggml_lowbit:Ggml", ("llama_cpp",), "ggml_mul_mat of llama.cpp's types of as many bits"
    ),
}

LOWBIT_FLOAT = {
    OURS: PeerInfo("ours_lowbit:TorchquantFloat", (), "fp32 activations x 2 to 8 bits per group"),
    **_LOWBIT_PEERS,
    "onnxruntime": PeerInfo(
        "onnx_nbits:OnnxNBitsFloat", ("onnxruntime", "onnx"), "MatMulNBits, accuracy_level 1 (fp32)"
    ),
}

SUITES = {"dynamic": DYNAMIC, "prequantized": PREQUANTIZED}


LOWBIT_SUITES = {"lowbit": LOWBIT, "lowbit-float": LOWBIT_FLOAT}
EVERY_SUITE = SUITES | {"conv": CONV, "cnn": CNN} | LOWBIT_SUITES


def all_peer_names(suites: Mapping[str, Mapping[str, PeerInfo]] = SUITES) -> list[str]:
    """Every name of every suite, once; of linear layers by default."""
    return list(dict.fromkeys(name for peers in suites.values() for name in peers))


def peer_info(suite: str, name: str) -> PeerInfo:
    """What is known of a peer; of a name that no suite has, a peer without requirements."""
    return EVERY_SUITE[suite].get(name, PeerInfo("", (), ""))


def make_peer(suite: str, name: str, threads: int) -> Any:
    """Import the peer's library and create the peer, in the peer's own process."""
    module, _, class_name = EVERY_SUITE[suite][name].target.partition(":")
    module = f"torchquant.bench.peers.{module}"
    return getattr(importlib.import_module(module), class_name)(threads)


def make_linear_peer(suite: str, name: str, threads: int) -> LinearPeer:
    """A peer of a suite of linear layers."""
    peer: LinearPeer = make_peer(suite, name, threads)
    return peer
