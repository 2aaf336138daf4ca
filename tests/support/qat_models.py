"""Models to prepare, a few steps of their training, and configurations of every kind."""

import torch
from torch import Tensor, nn

from torchquant import QATConfig, QATSchedule

CONFIGS = {
    "w8a8": QATConfig(),
    "w8a8_symmetric": QATConfig(activation_symmetric=True),
    "w8a8_weights_asymmetric": QATConfig(weight_symmetric=False),
    "w8a8_static": QATConfig(activations="static"),
    "w4a8": QATConfig(weight_bits=4),
    "w2a4_static": QATConfig(weight_bits=2, activation_bits=4, activations="static"),
    "w4a8_learned_weights": QATConfig(weight_bits=4, learned_weights=True),
    "w4a4_learned": QATConfig(
        weight_bits=4,
        activation_bits=4,
        activations="static",
        learned_weights=True,
        learned_activations=True,
    ),
    "w8a8_learned": QATConfig(activations="static", learned_weights=True, learned_activations=True),
    "w8a4_learned_offset": QATConfig(
        activation_bits=4, activations="static", learned_activations=True, learned_offset=True
    ),
    "w4a8_groups": QATConfig(weight_bits=4, group_size=32),
    "w3a8_groups_zero_points": QATConfig(weight_bits=3, weight_symmetric=False, group_size=48),
    "w4a8_groups_learned": QATConfig(weight_bits=4, learned_weights=True, group_size=32),
    "w4_float": QATConfig(weight_bits=4, activations=None, group_size=32),
}
LEARNED = {name: config for name, config in CONFIGS.items() if "learned" in name}
STATIC = QATConfig(activations="static")


class Block(nn.Module):
    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.up, self.relu = nn.Linear(features, 2 * features), nn.ReLU()
        self.down = nn.Linear(2 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(self.relu(self.up(self.norm(x))))
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


def tokens(seed: int = 0, batch: int = 8) -> Tensor:
    return torch.randint(0, 50, (batch, 12), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, steps: int = 2, schedule: QATSchedule | None = None) -> None:
    """A few steps of plain SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(tokens(step)).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    model.eval()


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
