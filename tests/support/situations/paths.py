"""Other paths than the usual forward: methods, arguments, kinds of functions."""

import operator
import types
from typing import Any

import torch
from torch import Tensor, nn

from support.situations import Activated, Situation, X


class DecoratedMethod(Activated):
    @torch.no_grad()
    def embed(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def use(self) -> Any:
        return self(X), self.embed(X)


class MethodNamedLikeSetup(Activated):
    def get_representation(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def init_state(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def tie_weights(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))

    def use(self) -> Any:
        return self(X), self.get_representation(X), self.init_state(X), self.tie_weights(X)


class Property(Activated):
    @property
    def hidden(self) -> Tensor:
        return self.fc(X)

    def use(self) -> Any:
        return self(X), self.hidden


class GetattrMethod(Activated):
    def pre(self, x: Tensor) -> Tensor:
        return getattr(self, "fc")(x)  # noqa: B009

    def use(self) -> Any:
        return self(X), self.pre(X), operator.attrgetter("fc")(self)(X)


class PatchedOntoTheInstance(Activated):
    def before(self) -> None:
        self.features = types.MethodType(lambda self, x: self.fc(x), self)

    def use(self) -> Any:
        self.later = types.MethodType(lambda self, x: self.act(self.fc(x)) + self.fc(x), self)
        return self(X), self.features(X), self.later(X)


class CalledFromAbove(Situation):
    def __init__(self) -> None:
        super().__init__()
        self.net = Activated()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def features(self, x: Tensor) -> Tensor:
        return self.net.fc(x)

    def use(self) -> Any:
        return self(X), self.features(X), self.net.act(self.net.fc(X) * 2)


class CalledFromOutside(Activated):
    def use(self) -> Any:
        hidden = self.fc(X)
        return hidden, self.act(hidden), self.act(self.fc(X)), hidden


class ForwardCalledDirectly(Activated):
    def raw(self, x: Tensor) -> Any:
        h = self.fc.forward(x)
        return h, self.act.forward(h)

    def use(self) -> Any:
        return self.forward(X), self.raw(X), self.fc.forward(X), nn.Module.__call__(self.fc, X)


class Keywords(Activated):
    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        h = self.fc(x)
        return h if kwargs.get("pre") else self.act(h)

    fuses = False

    def use(self) -> Any:
        return self(X), self(X, pre=True), self(X, pre=False)


class KeywordsGivenToTheLayer(Activated):
    def forward(self, x: Tensor) -> Any:
        return self.act(input=self.fc(input=x)), self.act(self.fc(input=x))

    fuses = False

    def use(self) -> Any:
        return self(X)


class StarArguments(Activated):
    def forward(self, *args: Any) -> Any:
        return self.act(self.fc(*args)), self.act(*(self.fc(args[0]),)), self.fc(*args)

    fuses = False

    def use(self) -> Any:
        return self(X)


class OneOptional(Activated):
    def forward(self, x: Tensor, a: Any = None, b: Any = None) -> Any:
        h = self.fc(x)
        y = self.act(h)
        return y + h if a is not None and b is None else y

    fuses = False

    def use(self) -> Any:
        return self(X), self(X, a=1), self(X, b=1), self(X, 1, 1)


class IsInstance(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        return self.act(h) + h if isinstance(h, torch.Tensor) else self.act(h)

    fuses = False

    def use(self) -> Any:
        return self(X)


class IsTensor(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        if torch.is_tensor(h):
            self.seen.append(h)
        return self.act(h)

    fuses = False

    def use(self) -> Any:
        return self(X), self.seen


class ReturnsEarly(Activated):
    def forward(self, x: Tensor, stop: bool = False) -> Any:
        h = self.fc(x)
        if stop:
            return h
        h = self.act(h)
        return h

    def use(self) -> Any:
        return self(X), self(X, stop=True)

    fuses = False


class Ternary(Activated):
    def forward(self, x: Tensor, plain: bool = False) -> Any:
        return self.fc(x) if plain else self.act(self.fc(x))

    def use(self) -> Any:
        return self(X), self(X, plain=True)


class TernaryOfModules(Activated):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Tanh()

    def forward(self, x: Tensor, other: bool = False) -> Any:
        return (self.other if other else self.act)(self.fc(x))

    fuses = False

    def use(self) -> Any:
        return self(X), self(X, other=True)


class Walrus(Activated):
    def forward(self, x: Tensor) -> Any:
        return self.act(h := self.fc(x)), h

    fuses = False

    def use(self) -> Any:
        return self(X)


class WalrusUnused(Activated):
    def forward(self, x: Tensor) -> Any:
        y = self.act(h := self.fc(x))
        self.seen.append(y)
        h = y
        return h

    def use(self) -> Any:
        return self(X), self.seen


class Loop(Activated):
    def forward(self, x: Tensor) -> Any:
        values = []
        h = x
        for _ in range(3):
            values.append(h)
            h = self.fc(x)
            y = self.act(h)
            values.append(y)
        return values

    fuses = False

    def use(self) -> Any:
        return self(X)


class LoopThatBreaks(Activated):
    def forward(self, x: Tensor, steps: int = 2) -> Any:
        h = x
        while True:
            h = self.fc(x)
            steps -= 1
            if not steps:
                break
            h = self.act(h)
        return h

    def use(self) -> Any:
        return self(X), self(X, 1)

    fuses = False


class Comprehension(Activated):
    def forward(self, x: Tensor) -> Any:
        hidden = [self.fc(part) for part in x.chunk(2)]
        return hidden, [self.act(self.fc(p)) for p in x.chunk(2)], {i: self.fc(x) for i in range(2)}

    fuses = False

    def use(self) -> Any:
        return self(X)


class Lambda(Activated):
    def forward(self, x: Tensor) -> Any:
        layer = lambda t: self.fc(t)  # noqa: E731
        return self.act(layer(x)), layer(x)

    fuses = False

    def use(self) -> Any:
        return self(X)


class LambdaOfTheModule(Activated):
    def before(self) -> None:
        self.both = lambda net, x: net.act(net.fc(x))
        self.one = lambda net, x: net.fc(x)

    def use(self) -> Any:
        return self(X), self.both(self, X), self.one(self, X)
