"""Small convolutional networks, each with one habit of how people write a forward."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_norm(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Functional(nn.Module):
    """Functional relu, ``+=``, ``torch.cat``, pooling and ``view``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_norm(3, 16), conv_norm(16, 16)
        self.third = nn.Conv2d(32, 16, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        y = self.second(x)
        y += x
        y = torch.relu(y)
        z = torch.cat([x, y], dim=1)
        z = F.max_pool2d(z, 2)
        z = F.leaky_relu(self.third(z))
        z = F.adaptive_avg_pool2d(z, 1)
        return self.fc(z.view(z.size(0), -1))


class Shared(nn.Module):
    """One activation used three times, one convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.conv(x))
        x = self.relu(self.conv(x))
        return self.fc(x.mean([2, 3]))


class Nested(nn.Sequential):
    """Sequentials in Sequentials, with dropout and pooling modules."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(conv_norm(3, 16, stride=2), nn.ReLU6(inplace=True)),
            nn.Sequential(
                nn.Sequential(conv_norm(16, 16, groups=16), nn.Hardswish(inplace=True)),
                nn.Dropout(0.2),
                conv_norm(16, 32, 1),
            ),
            nn.AvgPool2d(2, ceil_mode=True),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )


class Gated(nn.Module):
    """A branch that multiplies: squeeze and excitation, on a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv_norm(3, 16), conv_norm(16, 16)
        self.down, self.up = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.silu(self.stem(x))
        y = F.silu(self.body(x))
        scale = F.adaptive_avg_pool2d(y, (1, 1))
        scale = torch.sigmoid(self.up(F.relu(self.down(scale))))
        return {"out": self.head(x + y * scale)}


class UNet(nn.Module):
    """Two levels, with a transposed convolution, nearest upsampling and two concatenations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.block(3, 16), self.block(16, 32)
        self.third = self.block(32, 32)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.wide = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.fourth, self.fifth = self.block(64, 16), self.block(24, 16)
        self.head = nn.Conv2d(16, 2, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            conv_norm(inputs, outputs), nn.ReLU(), conv_norm(outputs, outputs), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(self.pool(first))
        y = self.up(self.third(self.pool(second)))
        y = self.fourth(torch.cat((y, second), 1))
        y = self.fifth(torch.cat((self.wide(y), first), 1))
        return self.head(y)


class Decides(nn.Module):
    """Control flow on values at the root; its two parts can be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_norm(3, 16), nn.ReLU(), conv_norm(16, 16), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 1e6:
            x = x / 1e6
        return self.head(self.body(x))


class Mixes(nn.Module):
    """Convolutions, and linear layers on the channels of their pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.spatial = nn.Conv2d(3, 64, 4, stride=4), nn.Conv2d(64, 64, 3, padding=1)
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.head = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.spatial(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y)))
        x = x + y.permute(0, 3, 1, 2)
        return self.head(F.relu(self.spatial(x)).mean([2, 3]))


class Sequence(nn.Module):
    """One dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 16, 5, padding=2, bias=False)
        self.norm = nn.BatchNorm1d(16)
        self.second = nn.Conv1d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(F.relu(self.norm(self.first(x))), 2)
        x = F.relu(self.second(x) + x)
        return self.head(F.adaptive_avg_pool1d(x, 1).flatten(1))


class Plain(nn.Module):
    """Comprehensions, loops, methods, defaults, a class attribute, assertions."""

    factor: ClassVar[float] = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)])
        self.named = nn.ModuleDict({"act": nn.ReLU()})
        self.count, self.flag = 2, True

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert isinstance(self.factor, float), f"got {self.factor}"
        y = torch.cat([branch(x) for branch in self.branches], dim=1)
        z = sum(branch(x) for branch in self.branches)
        for act in self.named.values():
            z = act(z)
        for _ in range(self.count):
            z = self.helper(z, y)
        if self.flag:
            z = z * self.factor
        return z, y

    def helper(self, z: Tensor, y: Tensor) -> Tensor:
        return z + y.mean(dim=(1, 2, 3), keepdim=True)


IMAGE_MODELS: tuple[Callable[[], nn.Module], ...] = (
    Functional,
    Shared,
    Nested,
    Gated,
    UNet,
    Decides,
    Mixes,
)


def with_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation mode, with batch norms that change what they get."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 2, generator=generator)
                module.bias.data.normal_(generator=generator)
    return model.eval()


def images(batch: int, size: int = 32, seed: int = 0) -> Tensor:
    """Smooth images: random colours on a coarse grid, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (size, size), mode="bilinear")
    return smooth + 0.1 * torch.randn(batch, 3, size, size, generator=generator)
