"""A BERT encoder for onnxruntime: exported, fused by onnxruntime's own optimizer, quantized."""

# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers import optimizer
from torch import Tensor, nn


class HiddenStates(nn.Module):
    """The model with two tensors in and one out, as an exporter wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`[B, T]` tokens to `[B, T, C]`."""
        hidden: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden


def export(model: nn.Module, heads: int, width: int, folder: Path) -> dict[str, int]:
    """Write `onnxruntime-fp32.onnx` and `onnxruntime-int8.onnx` into the folder.

    The optimizer knows attention in the form that the older of torch's exporters gives to a model
    with `attn_implementation="eager"`; then every layer's attention becomes one node. int8 is
    `quantize_dynamic` with one scale per channel, its more accurate setting.

    Returns:
        How many nodes of which kind were fused.
    """
    exported, fused = folder / "exported.onnx", folder / "onnxruntime-fp32.onnx"
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
    graph = optimizer.optimize_model(
        str(exported), model_type="bert", num_heads=heads, hidden_size=width, opt_level=0
    )
    graph.save_model_to_file(str(fused))
    quantize_dynamic(
        fused,
        folder / "onnxruntime-int8.onnx",
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    counts: dict[str, int] = graph.get_fused_operator_statistics()
    return counts
