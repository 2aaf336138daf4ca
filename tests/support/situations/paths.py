"""Other paths than the usual forward: methods, arguments, kinds of functions."""

import asyncio
import functools
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from support.situations import WIDTH, Activated, Situation, X


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
