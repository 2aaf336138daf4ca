"""Layers for tests of modules between devices."""

import torch
from torch import Tensor, nn

from support.pretend import Pretended

HOST = torch.device("cpu")


def on_cuda(x: Tensor) -> Tensor:
    return Pretended(x.clone())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.relu, self.down = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y: Tensor = self.down(self.relu(self.up(x)))
        return y if scale is None else y * scale
