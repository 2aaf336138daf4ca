"""Changes to a model that `quantize_` does not make, because they concern the code between layers.

Each is one function of the model and changes it in place. They recognize transformers' models by
the names of a block's children, not by class.
"""

# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

import torchquant

if TYPE_CHECKING:
    from torch import Tensor


class DenseAddNorm(nn.Module):
    """`LayerNorm(dense(x) + residual)`, the end of a BERT block, with the addition in the norm."""

    def __init__(self, dense: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.dense, self.LayerNorm = dense, norm

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """`[..., C]` and `[..., D]` to `[..., D]`."""
        result: Tensor = self.LayerNorm(self.dense(hidden_states), residual=input_tensor)
        return result


def add_in_norms(model: nn.Module) -> None:
    """Replace every `LayerNorm(dropout(dense(x)) + residual)` by a `DenseAddNorm`, for inference.

    Call it after `torchquant.replace_norms_`, because torch's norm has no addition.
    """
    for name, module in list(model.named_modules()):
        children = dict(module.named_children())
        norm = children.get("LayerNorm")
        if children.keys() == {"dense", "LayerNorm", "dropout"} and isinstance(
            norm, torchquant.nn.ReplacedNorm
        ):
            model.set_submodule(name, DenseAddNorm(children["dense"], norm))


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`, with one pass over the two inputs of the gating."""

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
    """Replace every gated MLP of a Llama-like model with SiLU by a `GatedMLP`."""
    for name, module in list(model.named_modules()):
        children = dict(module.named_children())
        projections = {"gate_proj", "up_proj", "down_proj"}
        if (
            children.keys() == projections | {"act_fn"}
            and "SiLU" in type(children["act_fn"]).__name__
        ):
            model.set_submodule(name, GatedMLP(module, "silu"))
