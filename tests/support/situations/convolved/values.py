"""What a network does to memory, and kinds of layers and inputs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.situations.convolved import C, Convolved, X

# ---------------------------------------------------------------- work in place, and aliases


class InPlace(Convolved):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.conv(x))
        z = self.act(y)
        z += x
        y *= 0.5
        return self.second(z), y

    def use(self) -> Any:
        x = X.clone()
        y = self(x)
        return y, x, self(x)


class ResultsChangedLater(Convolved):
    """A result is the caller's own: what he does to it changes no later result."""

    modes = ("no_grad",)

    def use(self) -> Any:
        first = self(X)
        kept = first.clone()
        second = self(X).fill_(2)
        memory = self(X).numpy()
        memory[:] = 1
        return kept, first, second, self(X)


class InputsChangedLater(Convolved):
    modes = ("no_grad", "inference_mode")

    def use(self) -> Any:
        x = X.clone()
        first = self(x)
        x.mul_(0.5)
        return first, self(x), self(X)


class ReturnsItsInput(Convolved):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x, self.act(x)

    def use(self) -> Any:
        return self(X)


class DeletedBetween(Convolved):
    def forward(self, x: Tensor) -> Any:
        y = self.act(self.conv(x))
        z = self.second(y)
        del y
        return z

    def use(self) -> Any:
        return [self(X * scale) for scale in (1, 0.5, 0.25)]


# ---------------------------------------------------------------- kinds of layers and inputs


class Weird(Convolved):
    """Convolutions with all options, a transposed one, and one of a derived class."""

    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias, padding=self.padding)

    def __init__(self) -> None:
        super().__init__()
        self.reflect = nn.Conv2d(C, C, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(C, C, 2, padding="same", dilation=2)
        self.up = nn.ConvTranspose2d(C, C, 2, stride=2)
        self.standard = self.Standardized(C, C, 3, padding=1)
        self.depth = nn.Conv2d(C, 2 * C, 3, stride=2, padding=1, groups=C)
        self.last = nn.Conv2d(2 * C, C, (1, 3), bias=False)

    def forward(self, x: Tensor) -> Any:
        x = F.leaky_relu(self.reflect(x))
        x = F.hardswish(self.same(x)) + x
        x = self.standard(F.silu(self.up(x)))
        return self.last(F.relu6(self.depth(x)))

    def use(self) -> Any:
        return self(X), self.standard(X)


class Parametrized(Convolved):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.conv)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.act(self.conv(x)))

    def use(self) -> Any:
        return self(X), self.conv.weight


class Sequences(Convolved):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(C, C, 3, padding=1), nn.Conv1d(C, C, 5, stride=2)

    def forward(self, x: Tensor) -> Any:
        return self.b(F.gelu(self.a(x.flatten(2)))).mean(-1)

    def use(self) -> Any:
        return self(X), self(X[:1])


class MemoryFormats(Convolved):
    def use(self) -> Any:
        last = X.contiguous(memory_format=torch.channels_last)
        wide = torch.cat([X, X], 1)[:, C // 2 : C // 2 + C]
        return self(last), self(X[:1].expand(3, -1, -1, -1)), self(X.transpose(2, 3)), self(wide)


class Sizes(Convolved):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.act(self.conv(x)) + x)

    def use(self) -> Any:
        return self(X[0]), self(X[:1]), self(X[:, :, :4]), self(X[:0]), self(X)


class NotANumber(Convolved):
    def use(self) -> Any:
        x = X.clone()
        x[1] = float("nan")
        return self(X), self(x)[::2]


class OtherTypes(Convolved):
    cosine = 0.998
    modes = ("no_grad",)

    def use(self) -> Any:
        whole = self(X)
        return whole, self.bfloat16()(X.bfloat16()), self.float()(X)
