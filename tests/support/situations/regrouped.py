"""Layers on one tensor that are swapped, retried, shared, or called in another way."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from support.situations import WIDTH, Projected, Situation, X


class OtherTensor(Projected):
    def forward(self, x: Tensor, y: Any = None) -> Any:
        q = self.q(x)
        y = x if y is None else y
        return q, self.k(y)

    fuses = False

    def use(self) -> Any:
        return self(X), self(X, X + 1)


class VariableAssignedAgain(Projected):
    def forward(self, x: Tensor) -> Any:
        q = self.q(x)
        x = x + 1.0
        return q, self.k(x)

    fuses = False

    def use(self) -> Any:
        return self(X)


class SwappedLayers(Projected):
    def use(self) -> Any:
        first, old = self(X), self.k
        self.k = nn.Sequential(nn.Identity(), old)
        second = self(X)
        self.q, self.k = old, self.q
        third = self(X)
        self.k = self.q
        return first, second, third, self(X)


class ThreeSwapped(Projected):
    class Shift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.data.add_(1.0)

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        q = self.q(x)
        k = self.k(x)
        v = self.v(x)
        return q, k, v

    def use(self) -> Any:
        first = self(X.clone())
        self.k = self.Shift()
        return first, self(X.clone()), self(X.clone())


class AnotherMethod(Projected):
    def other(self, x: Tensor) -> Any:
        k = self.k(x)
        x.data.add_(1.0)
        q = self.q(x)
        return q, k

    def only(self, x: Tensor) -> Any:
        return self.q(x)

    def use(self) -> Any:
        x = X.clone()
        first = self.only(x)
        x.data.add_(1.0)
        return first, self.k(x), self(x), self.other(x), self.k(x), self(x)


class Retried(Projected):
    """An error between the layers, and a second call with the same tensor and other values."""

    def before(self) -> None:
        self.shape = (3, 5)

    def forward(self, x: Tensor) -> Any:
        q = self.q(x).view(self.shape)
        k = self.k(x)
        return q, k

    def attempt(self, x: Tensor) -> Any:
        try:
            return self(x)
        except RuntimeError:
            return self.k(x)

    def use(self) -> Any:
        results = []
        for prepare in (lambda: None, self.hook):
            x = X.clone()
            self.shape = (3, 5)
            results.append(self.attempt(x))
            x.data.add_(1.0)
            results.append(self.k(x))
            self.shape = tuple(X.shape)
            prepare()
            results.append(self.attempt(x))
        return results

    def hook(self) -> None:
        self.q.register_forward_hook(lambda *args: None)


class RetriedInside(Projected):
    fuses = True

    def before(self) -> None:
        self.shape = (3, 5)

    def forward(self, x: Tensor) -> Any:
        for _ in range(2):
            try:
                q = self.q(x).view(self.shape)
                k = self.k(x)
                return q, k
            except RuntimeError:
                x.data.add_(1.0)
                self.shape = tuple(X.shape)
        return None

    def use(self) -> Any:
        return self(X.clone())


class RetriedWithHook(Projected):
    """An error between the layers; then the first one has a hook, and the tensor other values."""

    def before(self) -> None:
        self.shape = (3, 5)

    def forward(self, x: Tensor) -> Any:
        for _ in range(2):
            try:
                q = self.q(x).view(self.shape)
                k = self.k(x)
                return q, k
            except RuntimeError:
                x.data.add_(1.0)
                self.shape = tuple(X.shape)
                self.q.register_forward_hook(lambda *args: None)
        return None

    def use(self) -> Any:
        return self(X.clone())


class RecursionBetween(Projected):
    def forward(self, x: Tensor, depth: int = 1) -> Any:
        q = self.q(x)
        inner = self(x.add_(1.0), 0) if depth else ()
        return q, inner, self.k(x)

    fuses = False

    def use(self) -> Any:
        return self(X.clone())


class GeneratorBetween(Projected):
    def forward(self, x: Tensor) -> Any:
        yield self.q(x)
        yield self.k(x)

    fuses = False

    def use(self) -> Any:
        x = X.clone()
        values = self(x)
        first = next(values)
        x.data.add_(1.0)
        return first, next(values)


class WeightsChanged(Projected):
    def use(self) -> Any:
        first = self(X)
        if hasattr(self.k, "packed"):
            self.k.weight_scale.mul_(2.0)
        else:
            self.k._parameters["weight"].data.mul_(2.0)
        self.k.bias.data.zero_()
        second = self(X)
        self.q.bias = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        return first, second, self(X)


class Outputs(Projected):
    """In-place work on the outputs; they are separate tensors."""

    def forward(self, x: Tensor) -> Any:
        q = self.q(x)
        k = self.k(x)
        q.zero_()
        k += 1
        return q + 1, k, self.k(x)

    modes = ("no_grad", "inference_mode")

    def use(self) -> Any:
        return self(X)


class GatedActivation(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor, plain: bool = False) -> Any:
        if plain:
            return self.q(x) * self.k(x), self.q(x)
        return self.act(self.q(x)) * self.k(x), self.act(self.k(x))

    def use(self) -> Any:
        first = self(X), self(X, plain=True)
        self.act.register_forward_pre_hook(lambda m, args: self.seen.append(args))
        return first, self(X), self.seen


class Shifted(nn.Module):
    """Changes its input, and calls another module with it if it has one."""

    def __init__(self, then: nn.Module | None = None) -> None:
        super().__init__()
        self.then = then

    def forward(self, x: Tensor) -> Any:
        x.data.add_(1.0)
        return x.clone() if self.then is None else self.then(x)


class AnotherOwner(Situation):
    """Inside the second call another object runs the same function, with the same tensor."""

    trains = False

    def __init__(self) -> None:
        super().__init__()
        self.net = Projected()

    def use(self) -> Any:
        first, other = self.net(X.clone()), Projected()
        torch.manual_seed(3)
        other.q, other.k = nn.Linear(WIDTH, WIDTH), self.net.k
        self.net.k = Shifted(other)
        return first, self.net(X.clone()), self.net(X.clone())


class SwappedBack(Projected):
    """In a loop: first the second layer is another module, then the first one is."""

    def forward(self, x: Tensor, steps: Any = ()) -> Any:
        results = []
        for step in (lambda: None, *steps):
            step()
            q = self.q(x)
            k = self.k(x)
            results += [q, k]
            x.data.add_(1.0)
        return results

    def use(self) -> Any:
        q, k = self.q, self.k

        def second() -> None:
            self.k = nn.Identity()

        def first() -> None:
            self.q, self.k = nn.Identity(), k

        def both() -> None:
            self.q, self.k = q, k

        outputs = self(X.clone(), (second, first, both, second, both, first))
        return [output for output in outputs if output.data_ptr() != X.data_ptr()]


class AnotherInstruction(Projected):
    """The second layer is called by another instruction, after a change of the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Any:
        q = self.q(x)
        k = self.k(x) * 1.0
        x.data.add_(1.0)
        a = self.one(x)
        b = self.two(x)
        return q, k, a * 1.0, b * 1.0

    def use(self) -> Any:
        first = self(X.clone())
        self.one, self.k = self.k, nn.Identity()
        return first, self(X.clone()), self(X.clone())


class Janitor:
    """Changes a tensor when it is deleted."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __del__(self) -> None:
        with torch.no_grad():
            self.x.add_(1.0)


class DeletedBetween(Projected):
    """The assignment of the first result deletes an object, which changes the tensor."""

    modes = ("no_grad",)

    def forward(self, x: Tensor) -> Any:
        q: Any = Janitor(x)
        q = self.q(x)
        return q, self.k(x)

    def use(self) -> Any:
        return self(X.clone())


class CachedProjection(Projected):
    def use(self) -> Any:
        layer = self._modules.pop("q")
        self.__dict__["q"] = functools.lru_cache(layer)
        x = X.clone()
        first = self(x)
        x.data.add_(1.0)
        return first, self(x), self(x)
