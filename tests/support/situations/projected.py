"""Code that changes a tensor between two layers on it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from support.situations import WIDTH, Projected, X


def changes(name: str, change: Callable[[Any, Tensor], Any], fuses: bool = False) -> None:
    """A situation in which ``change(model, x)`` runs between the two layers."""

    class Changed(Projected):
        def forward(self, x: Tensor) -> Any:
            q = self.q(x)
            change(self, x)
            return q, self.k(x)

        def use(self) -> Any:
            return self(X.clone())

    Changed.fuses = fuses
    Changed.__name__ = Changed.__qualname__ = name


changes("AddInPlace", lambda model, x: x.add_(1.0))
changes("ThroughData", lambda model, x: x.data.add_(1.0))
changes("ThroughDetach", lambda model, x: x.detach().mul_(2.0))
changes("ThroughAView", lambda model, x: x[0].fill_(3.0))
changes("ThroughAFlatView", lambda model, x: x.view(-1)[3:99].zero_())
changes("WithOut", lambda model, x: torch.mul(x, 2.0, out=x))
changes("Numpy", lambda model, x: x.detach().numpy().__setitem__((0, slice(None)), 5.0))
changes("Items", lambda model, x: x.__setitem__(0, 2.0))
changes("Copied", lambda model, x: x.copy_(x.flip(0)))
changes("Storage", lambda model, x: x.untyped_storage().fill_(0))
changes("SetData", lambda model, x: setattr(x, "data", x.data * 2))
changes("ChangedIfATensor", lambda model, x: x.add_(1.0) if isinstance(x, Tensor) else None)
changes("ReluInPlace", lambda model, x: nn.functional.relu(x, inplace=True))


class Augmented(Projected):
    fuses = False
    pos: Any = None

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        q = self.q(x)
        if self.pos is not None:
            x += self.pos
        if "pos" in kwargs:
            x.add_(kwargs["pos"])
        return q, self.k(x)

    def use(self) -> Any:
        first = self(X.clone()), self(X.clone(), pos=1.0)
        self.pos = 2.0
        return first, self(X.clone())


class OptionalArguments(Projected):
    fuses = False

    def forward(self, x: Tensor, a: Any = None, b: Any = None) -> Any:
        q = self.q(x)
        if a is not None and b is None:
            x.mul_(2.0)
        return q, self.k(x)

    def use(self) -> Any:
        return self(X.clone()), self(X.clone(), a=1), self(X.clone(), 1, 1), self(X.clone(), b=1)


class HeldAlias(Projected):
    def forward(self, x: Tensor) -> Any:
        held = [x, x[1:]]
        q = self.q(x)
        held[1].zero_()
        return q, self.k(x)

    fuses = False

    def use(self) -> Any:
        return self(X.clone())


class InsideAModule(Projected):
    class Shift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1.0)

    fuses = False

    def __init__(self) -> None:
        super().__init__()
        self.shift = self.Shift()

    def forward(self, x: Tensor) -> Any:
        q = self.q(x)
        self.shift(x)
        return q, self.k(x)

    def use(self) -> Any:
        return self(X.clone())


class InsideAModuleOnTheResult(Projected):
    """A module between the layers gets the first result, and changes the tensor that it holds."""

    class Shift(nn.Module):
        held: Any = None

        def forward(self, q: Tensor) -> Tensor:
            if self.held is not None:
                self.held.data.add_(1.0)
            return q * 1.0

    def __init__(self) -> None:
        super().__init__()
        self.shift = self.Shift()

    def forward(self, x: Tensor) -> Any:
        q = self.shift(self.q(x))
        return q, self.k(x)

    def use(self) -> Any:
        first = self(X.clone())
        self.shift.held = X.clone()
        return first, self(self.shift.held)


class HookBetween(Projected):
    """Hooks on either layer, registered later, change the tensor."""

    def use(self) -> Any:
        first = self(X.clone())
        results = [first]

        def shift(module: Any, args: Any, output: Any = None) -> None:
            args[0].data.add_(1.0)

        for register in (
            self.q.register_forward_hook,
            self.k.register_forward_pre_hook,
            self.q.register_forward_pre_hook,
        ):
            handle = register(shift)
            results.append(self(x := X.clone()))
            results.append(x)
            handle.remove()
        return results, self(X.clone())


class HookOnAModuleBetween(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.x: Any = None

    def forward(self, x: Tensor) -> Any:
        q = self.norm(self.q(x))
        return q, self.k(x)

    def use(self) -> Any:
        first = self(X.clone())
        self.x = X.clone()
        self.norm.register_forward_hook(lambda *args: (self.x.data.add_(1.0), None)[1])
        return first, self(self.x)


class PropertyBetween(Projected):
    """The function reads a property, which changes the tensor."""

    @property
    def scale(self) -> float:
        self.last.data.add_(1.0)
        return 1.0

    def forward(self, x: Tensor) -> Any:
        self.last = x
        q = self.q(x) * self.scale
        return q, self.k(x)

    def use(self) -> Any:
        return self(X.clone())


class PropertyInAView(Projected):
    @property
    def heads(self) -> int:
        self.last.data.add_(1.0)
        return 4

    def forward(self, x: Tensor) -> Any:
        self.last = x
        q = self.q(x).view(len(x), self.heads, -1)
        return q, self.k(x)

    fuses = False

    def use(self) -> Any:
        return self(X.clone())


class GetattrBetween(Projected):
    def __getattr__(self, name: str) -> Any:
        if name == "k" and "last" in self.__dict__:
            self.__dict__["last"].data.add_(1.0)
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Any:
        self.last = x
        q = self.q(x)
        return q, self.k(x)

    def use(self) -> Any:
        return self(X.clone())


class Shifting:
    """An operand whose reflected operator changes a tensor."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __rmul__(self, other: Tensor) -> Tensor:
        self.x.data.add_(1.0)
        return other * 1.0


class OperatorBetween(Projected):
    def forward(self, x: Tensor) -> Any:
        self.shifting = Shifting(x)
        q = self.q(x) * self.shifting
        return q, self.k(x)

    def use(self) -> Any:
        return self(X.clone())


class Watching(Tensor):
    watched: Any = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if cls.watched is not None:
            cls.watched.data.add_(1.0)
        return super().__torch_function__(func, types, args, kwargs or {})


class SubclassOfTensorBetween(Projected):
    fuses = False

    def forward(self, x: Tensor, weight: Tensor) -> Any:
        q = self.q(x).mul(weight)
        return q, self.k(x)

    def use(self) -> Any:
        x, weight = X.clone(), torch.ones(1).as_subclass(Watching)
        Watching.watched = x
        try:
            q, k = self(x, weight)
        finally:
            Watching.watched = None
        return q.as_subclass(Tensor), k
