"""Norms as libraries write them, for tests that must not need the libraries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LlamaRMSNorm(nn.Module):
    """The norm of Llama in transformers: the cast is before the weight."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


class T5LayerNorm(LlamaRMSNorm):
    """The norm of T5: the output has the weight's dtype if that is a half precision."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            hidden_states = hidden_states.to(self.weight.dtype)
        return self.weight * hidden_states


class GemmaRMSNorm(nn.Module):
    """The norm of Gemma 1 to 3: the weight is ``1 + w``, in float32."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.randn(size) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class NemotronLayerNorm(nn.LayerNorm):
    """The norm of Nemotron: the weight is ``1 + w``, in the dtype of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class CohereLayerNorm(LlamaRMSNorm):
    """The norm of Cohere: a LayerNorm without bias."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.to(torch.float32)
        wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.to(torch.float32) * wide).to(hidden_states.dtype)


class OlmoLayerNorm(nn.Module):
    """The norm of OLMo: neither weight nor bias, and an eps that is no attribute."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.normalized_shape = (size,)

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.to(torch.float32)
        return F.layer_norm(wide, self.normalized_shape, None, None, eps=1e-5).to(
            hidden_states.dtype
        )


class DebertaLayerNorm(nn.Module):
    """The norm of DeBERTa: written out, with the cast before the weight."""

    def __init__(self, size: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.bias = nn.Parameter(torch.randn(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        wide = wide - wide.mean(-1, keepdim=True)
        wide = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype) + self.bias


class TimmLayerNorm(nn.LayerNorm):
    """The LayerNorm of timm: a subclass with another name of the argument."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """timm's LayerNorm2d, over dimension 1 of [N, K, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return y


class GatedRMSNorm(LlamaRMSNorm):
    """The norm of Mamba2 and its relatives: a gate is optional."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is not None:
            hidden_states = hidden_states * F.silu(gate)
        return super().forward(hidden_states)
