"""Changes to a model that `quantize_` does not make, because they concern the code between layers.

Each is one function of the model and changes it in place. They know transformers' models by what
these have in common (the names of a block's children), not by class.
"""

# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

import torchquant

if TYPE_CHECKING:
    from torch import Tensor

BFLOAT16_ATTENTION = "sdpa_bfloat16"


def bfloat16_attention(model: Any) -> None:
    """Attention in bfloat16 in a float32 model: queries, keys and values are cast, results back.

    Single tokens are left as they are: casting the whole cache for one query costs more than it
    saves.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if query.shape[2] == 1 or query.dtype != torch.float32:
            result: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, **options
            )
            return result
        query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            attention_mask = attention_mask.to(torch.bfloat16)
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output.to(torch.float32), None

    AttentionInterface.register(BFLOAT16_ATTENTION, attention)
    AttentionMaskInterface.register(BFLOAT16_ATTENTION, sdpa_mask)
    model.set_attn_implementation(BFLOAT16_ATTENTION)


class DenseAddNorm(nn.Module):
    """`LayerNorm(dense(x) + residual)`, the end of a BERT block, the addition inside the norm."""

    def __init__(self, dense: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.dense, self.LayerNorm = dense, norm

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """`[..., C]` and `[..., D]` to `[..., D]`."""
        result: Tensor = self.LayerNorm(self.dense(hidden_states), residual=input_tensor)
        return result


def add_in_norms(model: nn.Module) -> None:
    """Every `LayerNorm(dropout(dense(x)) + residual)` becomes a `DenseAddNorm`; for inference.

    Call it after `torchquant.replace_norms_`: torch's norm cannot add.
    """
    for name, module in list(model.named_modules()):
        children = dict(module.named_children())
        norm = children.get("LayerNorm")
        if children.keys() == {"dense", "LayerNorm", "dropout"} and isinstance(
            norm, torchquant.nn.LayerNorm
        ):
            model.set_submodule(name, DenseAddNorm(children["dense"], norm))


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`, the gating in one pass over its two inputs."""

    def __init__(self, mlp: Any, activation: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to `[..., C]`."""
        gated = torchquant.ops.gated_activation(self.gate_proj(x), self.up_proj(x), self.activation)
        result: Tensor = self.down_proj(gated)
        return result


def gate_mlps(model: nn.Module) -> None:
    """Every gated MLP of a Llama-like model with SiLU becomes a `GatedMLP`."""
    for name, module in list(model.named_modules()):
        children = dict(module.named_children())
        projections = {"gate_proj", "up_proj", "down_proj"}
        if (
            children.keys() == projections | {"act_fn"}
            and "SiLU" in type(children["act_fn"]).__name__
        ):
            model.set_submodule(name, GatedMLP(module, "silu"))
