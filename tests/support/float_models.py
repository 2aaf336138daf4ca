"""Float models to quantize, and layers that stay in float."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.mlp = nn.ModuleDict(
            {"up": nn.Linear(features, 4 * features), "down": nn.Linear(4 * features, features)}
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.mlp["up"](self.norm(x)))
        down: Tensor = self.mlp["down"](hidden)
        return x + down


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(1))
        return logits


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.embedding(tokens)))
        return logits


class Subclass(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Conv1D(nn.Module):
    """The linear layer of GPT-2, whose weight is transposed."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))


def with_nan() -> nn.Module:
    linear = nn.Linear(64, 64)
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    return linear
