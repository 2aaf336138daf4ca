"""Kinds of functions and containers that call a layer."""

import asyncio
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from support.situations import WIDTH, Activated, Situation, X


class Generator(Activated):
    def forward(self, x: Tensor) -> Iterator[Tensor]:
        h = self.fc(x)
        yield h
        yield self.act(h)
        yield self.act(self.fc(x))

    def use(self) -> Any:
        return list(self(X))


class AsyncFunction(Activated):
    async def layer(self, x: Tensor) -> Tensor:
        return self.fc(x)

    async def both(self, x: Tensor) -> Any:
        h = await self.layer(x)
        first = self.act(h)
        return h, first, self.act(self.fc(x))

    def use(self) -> Any:
        return asyncio.run(self.both(X))


class Partial(Activated):
    def __init__(self) -> None:
        super().__init__()
        self.partial = functools.partial(self.fc)

    def forward(self, x: Tensor) -> Any:
        layer = functools.partial(self.fc)
        return self.act(layer(x)), layer(x), functools.partial(self.fc, x)()

    fuses = False

    def use(self) -> Any:
        return self(X)


class Mapped(Activated):
    def forward(self, x: Tensor) -> Any:
        return list(map(self.act, map(self.fc, [x, x]))), list(map(self.fc, [x]))

    fuses = False

    def use(self) -> Any:
        return self(X)


class SuperForward(Activated):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, self.fc(x)

    def use(self) -> Any:
        return self(X)


class AliasOfTheLayer(Activated):
    def forward(self, x: Tensor) -> Any:
        fc, act = self.fc, self.act
        h = fc(x)
        y = act(h)
        return h, y, act(fc(x))

    def use(self) -> Any:
        return self(X)


class OwnerAssignedAgain(Activated):
    def __init__(self) -> None:
        super().__init__()
        self.child = Activated()

    def forward(self, x: Tensor) -> Any:
        first = self.act(self.fc(x))
        self = self.child
        return first, self.act(self.fc(x))

    def use(self) -> Any:
        return self(X)


class Recursion(Activated):
    def forward(self, x: Tensor, depth: int = 2) -> Any:
        h = self.fc(x)
        if depth:
            return h, self(x * 0.5, depth - 1)
        return self.act(h)

    def use(self) -> Any:
        return self(X)

    fuses = False


class GetattrOverridden(Activated):
    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name == "act" and self.__dict__.get("spy") is not None:
            return lambda h: (self.spy.append(h), value(h))[1]
        return value

    def use(self) -> Any:
        first = self(X)
        self.__dict__["spy"] = []
        return first, self(X), self.__dict__["spy"]


class GetattributeOverridden(Activated):
    def __getattribute__(self, name: str) -> Any:
        if name == "act":
            return lambda h: (h, nn.Module.__getattr__(self, "act")(h))
        return super().__getattribute__(name)

    def use(self) -> Any:
        return self(X)


class PropertyInPlaceOfTheActivation(Activated):
    def __init__(self) -> None:
        super().__init__()
        self.inner = self._modules.pop("act")

    @property
    def act(self) -> Callable[[Tensor], Any]:
        return lambda h: (h, self.inner(h))

    fuses = False

    def use(self) -> Any:
        return self(X)


class Containers(Situation):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.ModuleDict({"fc": nn.Linear(WIDTH, WIDTH), "act": nn.GELU()})
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.GELU()])
        self.scales = nn.ParameterDict({"one": torch.ones(1)})

    def forward(self, x: Tensor, name: str = "act") -> Any:
        h = self.items["fc"](x)
        y = self.items[name](h) if name else h
        return y, self.layers[1](self.layers[0](x)) * self.scales["one"], self.layers[-2](x)

    def use(self) -> Any:
        first = self(X), self(X, ""), self.layers[0](X)
        self.items["act"] = nn.Tanh()
        self.layers[1] = nn.Sigmoid()
        return first, self(X)


class LoopOverContainer(Situation):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.GELU()])

    def forward(self, x: Tensor, stop: int = 9) -> Any:
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == stop:
                break
        return x

    fuses = False

    def use(self) -> Any:
        return self(X), self(X, 0)


class TwoParents(Situation):
    """One layer with two activations, and one function for several objects."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Activated(), Activated(), Activated()
        self.b.fc = self.a.fc
        self.b.act = nn.Tanh()

    def use(self) -> Any:
        return self.a(X), self.b(X), self.c(X), self.a.fc(X)


class ActivationTwice(Situation):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.out = nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        h = self.act(self.fc(x))
        twice = self.act(self.act(self.fc(x)))
        return h, twice, self.act(self.out(h)), self.act(x)

    def use(self) -> Any:
        return self(X)


class HandlerReadsTheOutput(Activated):
    def forward(self, x: Tensor, fail: bool = False) -> Any:
        try:
            h = self.fc(x)
            y = self.act(h)
            self.check(fail)
            return y
        except ValueError:
            return h

    def check(self, fail: bool) -> None:
        if fail:
            raise ValueError

    fuses = False

    def use(self) -> Any:
        return self(X), self(X, True)


class FinallyReadsTheOutput(Activated):
    def forward(self, x: Tensor) -> Any:
        h = None
        try:
            h = self.fc(x)
            return self.act(h)
        finally:
            self.seen.append(h)

    fuses = False

    def use(self) -> Any:
        return self(X), self.seen


class WithStatement(Activated):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            h = self.fc(x)
            y = self.act(h)
        return y, h

    fuses = False

    def use(self) -> Any:
        return self(X)


class InPlaceArithmetic(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        h += 1
        y = self.act(h)
        g = self.fc(x)
        g = g * 2
        return y, self.act(g), self.act(-self.fc(x)), self.act(self.fc(x).neg())

    fuses = False

    def use(self) -> Any:
        return self(X)


class TupleAssignment(Activated):
    def forward(self, x: Tensor) -> Any:
        a = b = self.fc(x)
        c, d = self.fc(x), x
        return self.act(a), b, self.act(c), d

    def use(self) -> Any:
        return self(X)

    fuses = False


class MatchStatement(Activated):
    def forward(self, x: Tensor, how: str = "") -> Any:
        h = self.fc(x)
        match how:
            case "pre":
                return h
            case _:
                return self.act(h)

    fuses = False

    def use(self) -> Any:
        return self(X), self(X, "pre")


class NestedFunction(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)

        def later() -> Tensor:
            return h

        return self.act(h), later()

    fuses = False

    def use(self) -> Any:
        return self(X)


class FunctionOfTheModule(Activated):
    @staticmethod
    def apply_to(model: Any, x: Tensor) -> Any:
        return model.act(model.fc(x)), model.fc(x)

    def use(self) -> Any:
        return self.apply_to(self, X), ClassMethodHolder.run(self)


class ClassMethodHolder:
    @classmethod
    def run(cls, model: Any) -> Any:
        h = model.fc(X)
        return h, model.act(h)
