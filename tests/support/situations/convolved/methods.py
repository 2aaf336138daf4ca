"""Methods, arguments and control flow of a convolutional network; features taken from it."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from support.situations.convolved import C, Convolved, X


class Used(Convolved):
    def use(self) -> Any:
        return self(X), self(X[:1]), self(X[:, :, ::2, 1:])


# ---------------------------------------------------------------- other methods


class OtherMethods(Convolved):
    def stem(self, x: Tensor) -> Any:
        return self.act(self.norm(self.conv(x)))

    def features(self, x: Tensor) -> Any:
        return [y := self.stem(x), self.second(y)]

    def forward(self, x: Tensor) -> Any:
        return self.features(x)[-1]

    def use(self) -> Any:
        y = self.stem(X)
        return y, self.features(X), self(X), self.second(y)


class EncoderAndDecoder(Convolved):
    def encode(self, x: Tensor) -> Any:
        return F.max_pool2d(self.act(self.conv(x)), 2)

    def decode(self, x: Tensor) -> Any:
        return self.second(F.interpolate(x, scale_factor=2))

    def forward(self, x: Tensor) -> Any:
        return self.decode(self.encode(x))

    def use(self) -> Any:
        code = self.encode(X)
        return self(X), code, self.decode(code)


class ForwardCalledDirectly(Convolved):
    def use(self) -> Any:
        return self.forward(X), type(self).forward(self, X), self.second.forward(X.relu())


class Keywords(Convolved):
    def forward(self, x: Tensor, *, scale: float = 1.0, shift: Tensor | None = None) -> Any:
        y = self.act(self.conv(x)) * scale
        return self.second(y if shift is None else y + shift)

    def use(self) -> Any:
        return (
            self(x=X),
            self(X, scale=1.0),
            self(X, scale=0.5),
            self(X, shift=0.05 * X.abs()),
            self(X),
        )


class ReturnsFeatures(Convolved):
    def forward(self, x: Tensor, features: bool = False) -> Any:
        y = self.act(self.conv(x))
        if features:
            return y, self.conv(x)
        return self.second(y)

    def use(self) -> Any:
        return self(X), self(X, True), self(X, features=False), self(X, features=True)


class StarArguments(Convolved):
    def forward(self, *images: Tensor) -> Any:
        return [self.second(self.act(self.conv(x))) for x in images]

    def use(self) -> Any:
        return self(X), self(X, X * 0.5)


class DecidesByValues(Convolved):
    def forward(self, x: Tensor) -> Any:
        y = self.act(self.conv(x))
        if float(x.abs().max()) < 3:
            return y
        return self.second(y)

    def use(self) -> Any:
        return self(X), self(X * 0.6)


class DecidesBySizes(Convolved):
    def forward(self, x: Tensor) -> Any:
        y = self.act(self.conv(x))
        if x.shape[0] == 1:
            return y.squeeze(0)
        return self.second(y)

    def use(self) -> Any:
        return self(X), self(X[:1])


class InALoop(Convolved):
    def forward(self, x: Tensor) -> Any:
        outputs = []
        for _ in range(3):
            x = self.act(self.second(x)) + x
            outputs.append(x)
        return outputs

    def use(self) -> Any:
        return self(X)


class Recursion(Convolved):
    def forward(self, x: Tensor, depth: int = 2) -> Any:
        y = self.act(self.conv(x))
        return self(y, depth - 1) if depth else self.second(y)

    def use(self) -> Any:
        return self(X), self(X, 2)


# ---------------------------------------------------------------- features


class Taps(Convolved):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 1)
        )

    def forward(self, x: Tensor) -> Any:
        found = {}
        for name, module in self.body.named_children():
            x = module(x)
            found[name] = x
        return found

    def use(self) -> Any:
        return self(X), self.body(X), self.body[:3](X), self.body[0](X)


class Slices(Convolved):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 1)
        )

    def forward(self, x: Tensor) -> Any:
        return self.body(x)

    def use(self) -> Any:
        extractor = nn.Sequential(*list(self.body.children())[:-1])
        return self(X), extractor(X), self.body[3](extractor(X)), self(X)


class HooksForFeatures(Convolved):
    def use(self) -> Any:
        kept: dict[str, Tensor] = {}
        handles = [
            module.register_forward_hook(lambda m, a, y, name=name: kept.update({name: y}))
            for name, module in self.named_children()
            if name != "conv"  # which computes the batch norm as well
        ]
        y = self(X)
        for handle in handles:
            handle.remove()
        return y, kept, self(X)


class Containers(Convolved):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a": nn.Conv2d(C, C, 1), "b": nn.ReLU()})
        self.more = nn.ModuleList([nn.Conv2d(C, C, 3, padding=1, groups=C), nn.Conv2d(C, C, 1)])
        self.held = [self.second]

    def forward(self, x: Tensor) -> Any:
        y = self.layers["b"](self.layers["a"](x))
        for layer in self.more:
            y = layer(y) + x
        return self.held[0](y), getattr(self, "conv")(y)  # noqa: B009

    def use(self) -> Any:
        return self(X)
