"""Networks in which the output of a convolution has only one way to go, to its norm."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.chain_models import conv_norm
from support.path_models import Pair, Shifted, Way, whole


class Present(Pair):
    """The norm is optional, but it is there."""

    def __init__(self) -> None:
        super().__init__()
        self.more = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return self.last(F.relu(x)) if self.last else x


class Zipped(Shifted):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for layer, norm in zip(self.convs, self.norms, strict=False):
            x = F.relu(norm(layer(x)))
        return x


class Indexed(Shifted):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for place in range(len(self.convs)):
            x = F.relu(self.norms[place](self.convs[place](x)))
        return x


class Enumerated(Shifted):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for place, layer in enumerate(self.convs):
            norm = self.norms[place]
            x = F.relu(norm(layer(x)))
        return x


class InTurn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([*conv_norm(3, 8), nn.ReLU(), *conv_norm(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Blocks(nn.Module):
    """Stages are tapped between blocks; a context and a decorator are around."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(*conv_norm(3, 8), nn.ReLU()), Block(), Block()])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    @torch.no_grad()
    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        with torch.autograd.profiler.record_function("stages"):
            for stage in self.stages:
                x = stage(x)
                found.append(x)
        return found

    def freeze(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                module.weight.requires_grad = False


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.skip = nn.Sequential(*conv_norm(8, 8), nn.ReLU()), conv_norm(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body[0](x)
        out = self.body[1](out)
        return F.relu(self.body[2](out) + self.skip(x))


class Methods(Pair):
    """All methods make the same way."""

    def features(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        size = y.shape[-1]
        return torch.tanh(self.norm(y)) * size

    def check(self) -> int:
        return self.conv.out_channels + self.conv.weight.shape[0]


CLOSED: dict[str, tuple[Callable[[], nn.Module], int, Sequence[Way]]] = {
    "pair": (Pair, 1, [whole]),
    "present": (Present, 1, [whole]),
    "zip": (Zipped, 3, [whole]),
    "range": (Indexed, 3, [whole]),
    "enumerate": (Enumerated, 3, [whole]),
    "in turn": (InTurn, 2, [whole]),
    "blocks": (Blocks, 5, [whole, lambda m, x: m.stages[0](x)]),
    "methods": (Methods, 1, [whole, lambda m, x: m.features(x), lambda m, x: m.check()]),
}
