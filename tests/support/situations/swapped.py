"""Modules, options and classes that somebody replaces after the conversion."""

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from support.situations import WIDTH, Activated, Projected, Situation, X


class SwappedActivation(Activated):
    def use(self) -> Any:
        first, old = self(X), self.act
        self.act = nn.Tanh()
        second = self(X)
        self.act = nn.Identity()
        third = self(X)
        self.act = nn.GELU()
        fourth = self(X)
        self.act = nn.Sequential(nn.Identity(), old)
        return first, second, third, fourth, self(X)


class SwappedLayer(Activated):
    def use(self) -> Any:
        first, old = self(X), self.fc
        self.fc = nn.Sequential(nn.Identity(), old)
        second = self(X)
        self.fc = nn.Identity()
        third = self(X)
        self.fc = old
        return first, second, third, self(X), old(X)


class ActivationOptions(Activated):
    def use(self) -> Any:
        first = self(X)
        self.act.approximate = "tanh"
        return first, self(X)


class ActivationBecomesInPlace(Activated):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()

    def use(self) -> Any:
        first = self(X)
        self.act.inplace = True
        h = self.fc(X)
        y = self.act(h)
        return first, y, h, self(X)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class OwnOption(Activated):
    def __init__(self) -> None:
        super().__init__()
        self.act = Scaled()

    def use(self) -> Any:
        first = self(X)
        self.act.beta = 3.0
        return first, self(X)


BETA = 1.0


class ScaledByOthers(nn.Module):
    beta = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * BETA * x)


class GlobalOption(Activated):
    fuses = False

    def __init__(self) -> None:
        super().__init__()
        self.act = ScaledByOthers()

    def use(self) -> Any:
        global BETA
        first = self(X)
        BETA = 3.0
        try:
            second = self(X)
        finally:
            BETA = 1.0
        ScaledByOthers.beta = 2.0
        try:
            return first, second, self(X)
        finally:
            ScaledByOthers.beta = 1.0


class Wrapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class HookInsideTheActivation(Activated):
    fuses = False

    def __init__(self) -> None:
        super().__init__()
        self.act = Wrapping()

    def use(self) -> Any:
        first = self(X)
        self.act.inner.register_forward_pre_hook(lambda m, args: self.seen.append(args))
        second = self(X)
        self.act.inner = nn.Tanh()
        return first, second, self.seen, self(X)


class PatchedForward(Activated):
    def use(self) -> Any:
        first, old = self(X), self.act.forward
        self.act.forward = lambda h: (h, old(h))
        second = self(X)
        del self.act.forward
        own = self.fc.forward
        self.fc.forward = lambda x: own(x) + 1
        return first, second, self(X)


class PatchedLayerThatSpies(Activated):
    """As libraries wrap the forward of a module."""

    def use(self) -> Any:
        own = self.fc.forward

        def spying(x: Tensor) -> Tensor:
            output = own(x)
            self.seen.append(output)
            return output

        self.fc.forward = spying
        return self(X), self.seen


class PatchedClass(Activated):
    def use(self) -> Any:
        first, old = self(X), nn.GELU.forward

        def spying(module: Any, x: Tensor) -> Tensor:
            self.seen.append(x)
            return old(module, x)

        nn.GELU.forward = spying  # type: ignore[method-assign]
        try:
            return first, self(X), self.seen
        finally:
            nn.GELU.forward = old  # type: ignore[method-assign]

    trains = False  # there the activation is a ReLU


class PatchedCall(Activated):
    """Wrappers around every module's call, with one frame, and with as many as torch has."""

    def use(self) -> Any:
        first, old, impl = self(X), nn.Module.__call__, nn.Module._call_impl

        def inner(module: Any, *args: Any) -> Any:
            output = module.forward(*args)
            self.seen.append(output)
            return output

        def outer(module: Any, *args: Any) -> Any:
            return inner(module, *args)

        def one(module: Any, *args: Any) -> Any:
            output = old(module, *args)
            self.seen.append(output)
            return output

        results = [first]
        try:
            for patched in (outer, one):
                nn.Module.__call__ = patched  # type: ignore[method-assign]
                results.append(self(X))
            nn.Module.__call__ = old  # type: ignore[method-assign]
            nn.Module._call_impl = inner  # type: ignore[method-assign]
            results.append(self(X))
        finally:
            nn.Module.__call__, nn.Module._call_impl = old, impl  # type: ignore[method-assign]
        return results, self.seen


class PatchedCallOfTheActivation(Activated):
    trains = False

    def use(self) -> Any:
        first, old = self(X), nn.GELU.__call__

        def spying(module: Any, x: Tensor) -> Any:
            self.seen.append(x)
            return old(module, x)

        nn.GELU.__call__ = spying  # type: ignore[method-assign]
        try:
            return first, self(X), self.seen
        finally:
            del nn.GELU.__call__


class Debugger(Activated):
    def use(self) -> Any:
        def trace(frame: Any, event: str, value: Any) -> Any:
            if event == "return" and frame.f_code.co_name == "_wrapped_call_impl":
                self.seen.append(value)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            first = self(X)
        finally:
            sys.settrace(before)
        return first, self.seen


class Profiler(Activated):
    def use(self) -> Any:
        def profile(frame: Any, event: str, value: Any) -> None:
            if event == "return" and frame.f_code.co_name == "_wrapped_call_impl":
                self.seen.append(value)

        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            first = self(X)
        finally:
            sys.setprofile(before)
        return first, self.seen


class CachedLayer(Activated):
    """The call of the layer goes through a function that keeps its results."""

    def use(self) -> Any:
        layer = self._modules.pop("fc")
        self.__dict__["fc"] = functools.lru_cache(layer)
        return self(X), self(X), self(X)


class PropertySwaps(Activated):
    """Between the layer and the activation, the function reads a property."""

    fuses = False

    @property
    def flag(self) -> bool:
        self.act = nn.Tanh()
        return True

    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        flag = self.flag
        return self.act(h), torch.tensor(float(flag))

    def use(self) -> Any:
        return self(X)


class MethodSwaps(Activated):
    fuses = False

    def log(self) -> None:
        self.act.register_forward_pre_hook(lambda m, args: self.seen.append(args))

    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        self.log()
        return self.act(h)

    def use(self) -> Any:
        return self(X), self.seen


class EarlierModuleSwaps(Activated):
    """The function reads the activation, then a module runs that replaces it."""

    class Swapping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            net = self.__dict__.get("net")
            if net is not None:
                net.act, net.other = net.other, net.act
            return x * 1.0

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = self.Swapping(), nn.Tanh()

    def forward(self, x: Tensor, other: bool = False) -> Any:
        if other:
            return self.other(self.fc(x))
        return self.act(self.fc(self.norm(x)))

    def use(self) -> Any:
        first = self(X), self(X, True)
        self.norm.__dict__["net"] = self
        return first, self(X), self(X)


class PatchedItems(Situation):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.GELU()])

    def forward(self, x: Tensor) -> Any:
        return self.layers[1](self.layers[0](x))

    def use(self) -> Any:
        first, old = self(X), nn.ModuleList.__getitem__

        def spying(layers: Any, index: int) -> Any:
            layer = old(layers, index)
            return (lambda h: (h, layer(h))) if index else layer

        nn.ModuleList.__getitem__ = spying  # type: ignore[method-assign]
        try:
            return first, self(X)
        finally:
            nn.ModuleList.__getitem__ = old  # type: ignore[method-assign]


class Settings:
    """A global object; to read its attribute runs code."""

    action: Any = None

    @property
    def scale(self) -> float:
        if self.action is not None:
            self.action()
        return 1.0


SETTINGS = Settings()


class GlobalObjectRead(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        scale = SETTINGS.scale
        return self.act(h) * scale

    def swap(self) -> None:
        self.act = nn.Tanh()

    def use(self) -> Any:
        first = self(X)
        SETTINGS.action = self.swap
        try:
            return first, self(X)
        finally:
            SETTINGS.action = None


class GlobalObjectReadBetween(Projected):
    def forward(self, x: Tensor) -> Any:
        q = self.q(x)
        scale = SETTINGS.scale
        return q, self.k(x), torch.tensor(scale)

    def use(self) -> Any:
        x = X.clone()
        first = self(x)
        SETTINGS.action = lambda: x.data.add_(1.0)
        try:
            return first, self(x)
        finally:
            SETTINGS.action = None
