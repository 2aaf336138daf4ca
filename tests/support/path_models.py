"""Networks in which the output of a convolution has more than one way to go."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.chain_models import conv_norm

Way = Callable[[Any, Tensor], Any]


def conv(inputs: int = 8, outputs: int = 8) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Pair(nn.Module):
    """A convolution, its norm and a second convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = conv(3), nn.BatchNorm2d(8), conv()

    def forward(self, x: Tensor) -> Any:
        return self.last(F.relu(self.norm(self.conv(x))))


def whole(model: nn.Module, x: Tensor) -> Any:
    return model(x)


class Domains(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return self.last(F.relu(self.norms[domain](self.conv(x))))


class Optional(Pair):
    def forward(self, x: Tensor, normed: bool = True) -> Tensor:
        y = self.conv(x)
        if normed:
            y = self.norm(y)
        return self.last(F.relu(y))


class TwoNorms(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(8)

    def forward(self, x: Tensor, clean: bool = True) -> Tensor:
        y = self.conv(x)
        y = self.norm(y) if clean else self.other(y)
        return self.last(F.relu(y))


class TwoLayers(Pair):
    """The norm gets one of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.other = conv(3)

    def forward(self, x: Tensor, other: bool = False) -> Tensor:
        return self.last(F.relu(self.norm(self.other(x) if other else self.conv(x))))


class Flag(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.normed = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.normed:
            y = self.norm(y)
        return self.last(F.relu(y))


def without_flag(model: Any, x: Tensor) -> Tensor:
    model.normed = False
    try:
        return model(x)
    finally:
        model.normed = True


class Stem(Pair):
    def stem(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.norm(self.stem(x))))


class Features(Pair):
    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class Normed(Pair):
    """A method gives the norm something else."""

    def normed(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Through(Pair):
    """A method of another module reaches into this one."""


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Through()

    def embed(self, x: Tensor) -> Tensor:
        return torch.tanh(self.net.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Taps(nn.Module):
    def __init__(self, taps: Sequence[int] = (2, 5)) -> None:
        super().__init__()
        self.features = nn.Sequential(*conv_norm(3, 8), nn.ReLU(), *conv_norm(8, 8), nn.ReLU())
        self.taps = taps

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place in self.taps:
                found.append(x)
        return found


def other_taps(model: Any, x: Tensor) -> list[Tensor]:
    old, model.taps = model.taps, (0, 3)
    try:
        return model(x)
    finally:
        model.taps = old


class Named(nn.Module):
    """A dictionary of layers, of which some are returned."""

    def __init__(self) -> None:
        super().__init__()
        first, norm = conv_norm(3, 8)
        self.layers = nn.ModuleDict({"conv": first, "norm": norm, "relu": nn.ReLU()})
        self.returned = {"relu"}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, layer in self.layers.items():
            x = layer(x)
            if name in self.returned:
                found[name] = x
        return found


def all_named(model: Any, x: Tensor) -> dict[str, Tensor]:
    model.returned = {"conv", "norm", "relu"}
    try:
        return model(x)
    finally:
        model.returned = {"relu"}


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*conv_norm(3, 8), nn.ReLU())

    def low(self, x: Tensor) -> Tensor:
        return self.features[:1](x)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class ByName(Sliced):
    def low(self, x: Tensor) -> Tensor:
        return getattr(self.features, str(0))(x)


class ByChildren(Sliced):
    def low(self, x: Tensor) -> Tensor:
        return next(self.features.children())(x)


class Skips(Sliced):
    def forward(self, x: Tensor, skip: int = -1) -> Tensor:
        for place, layer in enumerate(self.features):
            if place == skip:
                continue
            x = layer(x)
        return x


class Stops(Sliced):
    def forward(self, x: Tensor, stop: int = 9) -> Tensor:
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place == stop:
                break
        return x


class Shifted(nn.Module):
    """Norms that belong to the next convolution, for some argument."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 1) for _ in range(3)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(3) for _ in range(3)])

    def forward(self, x: Tensor, shift: int = 0) -> Tensor:
        for place, layer in enumerate(self.convs):
            x = F.relu(self.norms[place - shift](layer(x)))
        return x


class Kept(Pair):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.conv(x)
        return self.last(F.relu(self.norm(self.seen)))

    def kept(self, x: Tensor) -> Tensor:
        self(x)
        return self.seen


class Listed(Pair):
    """A method calls modules from a list that it makes."""

    def steps(self, x: Tensor, count: int) -> Tensor:
        for module in [self.conv, self.norm, self.last][:count]:
            x = module(x)
        return x


class Functional(Pair):
    """The weight is read by a function."""

    def again(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv.weight, self.conv.bias)


class Biased(Pair):
    def again(self, x: Tensor) -> Tensor:
        assert self.conv.bias is not None
        return x.mean() + self.conv.bias


class Statistics(Pair):
    def again(self, x: Tensor) -> Tensor:
        assert self.norm.running_mean is not None
        return x.mean() + self.norm.running_mean


class Direct(Pair):
    def again(self, x: Tensor) -> Tensor:
        return self.conv.forward(x)


class Passed(Pair):
    def again(self, x: Tensor) -> Tensor:
        return applied(self, x)


def applied(net: Any, x: Tensor) -> Tensor:
    return net.conv(x)


class Derived(Pair):
    """The class before it had one path only."""


class MoreDerived(Derived):
    def low(self, x: Tensor) -> Tensor:
        return self.conv(x) * 2


class Lambda(Pair):
    def low(self, x: Tensor) -> Tensor:
        run = lambda value: self.conv(value)  # noqa: E731
        return run(x)


class Comprehends(Pair):
    def low(self, x: Tensor) -> list[Tensor]:
        return [module(x) for module in (self.conv,)]


class Caught(Pair):
    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        y = self.conv(x)
        try:
            if fail:
                raise ValueError
            y = self.norm(y)
        except ValueError:
            pass
        return self.last(y)


class Part(nn.Module):
    """A named part ends with the convolution, and its owner has the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.norm = nn.Sequential(nn.ReLU(), conv(3)), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.part(x))


OPEN: dict[str, tuple[Callable[[], nn.Module], Sequence[Way]]] = {
    "norms by argument": (Domains, [lambda m, x: m(x, 1), lambda m, x: m(x, domain=0)]),
    "norm by argument": (Optional, [lambda m, x: m(x, False)]),
    "one of two norms": (TwoNorms, [lambda m, x: m(x, False), lambda m, x: m(x, True)]),
    "one of two layers": (TwoLayers, [lambda m, x: m(x, True)]),
    "norm by attribute": (Flag, [without_flag]),
    "method that forward calls": (Stem, [lambda m, x: m.stem(x)]),
    "method of its own": (Features, [lambda m, x: m.features(x)]),
    "norm in a method": (Normed, [lambda m, x: m.normed(m.conv(x).detach() * 0 + 1)]),
    "method of the owner": (Outer, [lambda m, x: m.embed(x)]),
    "taps": (Taps, [other_taps]),
    "taps after layers": (lambda: Taps((0, 3)), [other_taps]),
    "named taps": (Named, [all_named]),
    "slice": (Sliced, [lambda m, x: m.low(x)]),
    "attribute by name": (ByName, [lambda m, x: m.low(x)]),
    "children": (ByChildren, [lambda m, x: m.low(x)]),
    "continue": (Skips, [lambda m, x: m(x, 1)]),
    "break": (Stops, [lambda m, x: m(x, 0)]),
    "shifted index": (Shifted, [lambda m, x: m(x, 1)]),
    "kept in an attribute": (Kept, [lambda m, x: m.kept(x)]),
    "list of modules": (Listed, [lambda m, x: m.steps(x, 1)]),
    "functional": (Functional, [lambda m, x: m.again(x)]),
    "bias": (Biased, [lambda m, x: m.again(x)]),
    "statistics": (Statistics, [lambda m, x: m.again(x)]),
    "forward called": (Direct, [lambda m, x: m.again(x)]),
    "passed to a function": (Passed, [lambda m, x: m.again(x)]),
    "derived": (MoreDerived, [lambda m, x: m.low(x)]),
    "lambda": (Lambda, [lambda m, x: m.low(x)]),
    "comprehension": (Comprehends, [lambda m, x: m.low(x)]),
    "exception": (Caught, [lambda m, x: m(x, True)]),
    "named part": (Part, [lambda m, x: m.part(x)]),
}
