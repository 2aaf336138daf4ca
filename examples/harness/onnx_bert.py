"""A BERT encoder for onnxruntime: exported, fused if that is faster, quantized."""

# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers import optimizer
from onnxruntime.transformers.fusion_options import FusionOptions
from torch import Tensor, nn


class HiddenStates(nn.Module):
    """The model with two input tensors and one output tensor, for an exporter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`[B, T]` tokens to `[B, T, C]`."""
        hidden: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden


def export(model: nn.Module, heads: int, width: int, folder: Path) -> None:
    """Write one file per onnxruntime engine into the folder.

    Measurements decide what is fused: onnxruntime's CPU kernels SkipLayerNormalization and
    BiasGelu take 4.0 and 2.0 ms per layer of MiniLM (int8, one thread, batch 8, onnxruntime 1.31),
    their parts 0.5 and 1.1.

    The optimizer recognizes attention in the form that torch's older exporter gives to a model
    with `attn_implementation="eager"`; then every layer's attention becomes one node, and int8 with
    it. int8 is `quantize_dynamic` with signed weights and one scale per channel: unsigned weights
    are half as fast, one scale per tensor is as fast and less accurate.

    `onnxruntime-fp32`, `-int8`: attention in one node. `-int8-parts`: as exported, fused by the
    session. `-int8-documented`: everything fused that the optimizer fuses.
    """
    exported = folder / "exported.onnx"
    names = ["input_ids", "attention_mask"]
    ids = torch.ones(2, 16, dtype=torch.int64)
    torch.onnx.export(
        HiddenStates(model).eval(),
        (ids, ids),
        str(exported),
        input_names=names,
        output_names=["hidden_states"],
        dynamic_axes={name: {0: "batch", 1: "tokens"} for name in [*names, "hidden_states"]},
        dynamo=False,
    )

    def fuse(path: Path, everything: bool) -> Path:
        options = FusionOptions("bert")
        if not everything:
            options.enable_embed_layer_norm = False
            options.enable_skip_layer_norm = options.enable_bias_skip_layer_norm = False
            options.enable_bias_gelu = False
        graph = optimizer.optimize_model(
            str(exported),
            model_type="bert",
            num_heads=heads,
            hidden_size=width,
            opt_level=1,
            optimization_options=options,
        )
        if not graph.get_fused_operator_statistics()["Attention"]:
            raise RuntimeError("onnxruntime's optimizer did not recognise the attention")
        graph.save_model_to_file(str(path))
        return path

    fused = fuse(folder / "onnxruntime-fp32.onnx", everything=False)
    _quantize(fused, folder / "onnxruntime-int8.onnx")
    _quantize(exported, folder / "onnxruntime-int8-parts.onnx")
    documented = fuse(folder / "fused.onnx", everything=True)
    _quantize(documented, folder / "onnxruntime-int8-documented.onnx")


def _quantize(source: Path, target: Path) -> None:
    quantize_dynamic(
        source,
        target,
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
