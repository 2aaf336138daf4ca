"""Changes after the conversion: flags, hooks, modules, patched classes."""

import sys
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from support.situations import WIDTH, Activated, Situation, X

FLAG = False


class Attribute(Activated):
    features = False

    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        if self.features:
            return h
        return self.act(h)

    fuses = False

    def use(self) -> Any:
        first = self(X)
        self.features = True
        return first, self(X)


class Configuration(Activated):
    def before(self) -> None:
        self.config = types.SimpleNamespace(pre=False)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x) if self.config.pre else self.act(self.fc(x))

    def use(self) -> Any:
        first = self(X)
        self.config.pre = True
        return first, self(X)


class GlobalFlag(Activated):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x) if FLAG else self.act(self.fc(x))

    def use(self) -> Any:
        global FLAG
        first = self(X)
        FLAG = True
        try:
            return first, self(X)
        finally:
            FLAG = False


class HookOnTheLayer(Activated):
    def use(self) -> Any:
        first = self(X)
        handle = self.fc.register_forward_hook(lambda m, a, output: self.seen.append(output))
        second = self(X)
        handle.remove()
        return first, second, self(X), self.seen


class HookOnTheLayerBefore(Activated):
    def before(self) -> None:
        self.fc.register_forward_hook(lambda m, a, output: self.seen.append(output))

    def use(self) -> Any:
        return self(X), self.seen


class HookThatChangesTheOutput(Activated):
    def use(self) -> Any:
        self.fc.register_forward_hook(lambda m, a, output: output + 1)
        return self(X)


class HookOnTheActivation(Activated):
    def use(self) -> Any:
        first = self(X)
        self.act.register_forward_pre_hook(lambda m, args: self.seen.append(args[0]))
        return first, self(X), self.seen


class HookOnTheActivationBefore(Activated):
    def before(self) -> None:
        self.act.register_forward_pre_hook(lambda m, args: self.seen.append(args[0]))

    def use(self) -> Any:
        return self(X), self.seen


class ForwardHookOnTheActivation(Activated):
    def use(self) -> Any:
        self.act.register_forward_hook(lambda m, args, output: self.seen.append((args, output)))
        return self(X), self.seen


class GlobalHooks(Activated):
    def use(self) -> Any:
        def before(module: nn.Module, args: Any) -> None:
            self.seen.append(args)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self.seen.append(output)

        handles = [
            torch_modules.register_module_forward_pre_hook(before),
            torch_modules.register_module_forward_hook(after),
        ]
        try:
            return self(X), self.seen
        finally:
            for handle in handles:
                handle.remove()


class BackwardHook(Activated):
    modes = ("grad",)

    def use(self) -> Any:
        x = X.clone().requires_grad_()
        first = self(x)
        self.act.register_full_backward_hook(lambda m, grads, out: self.seen.append((grads, out)))
        self.act.register_full_backward_pre_hook(lambda m, grads: self.seen.append(grads))
        second = self(x)
        second.square().sum().backward()
        return first, second, self.seen, x.grad


class BackwardHookOnTheLayer(Activated):
    modes = ("grad",)

    def use(self) -> Any:
        self.fc.register_full_backward_hook(lambda m, grads, out: self.seen.append(out))
        x = X.clone().requires_grad_()
        second = self(x)
        second.square().sum().backward()
        return second, self.seen, x.grad


class TensorHook(Activated):
    modes = ("grad",)
    fuses = False

    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        h.register_hook(self.seen.append)
        return self.act(h)

    def use(self) -> Any:
        x = X.clone().requires_grad_()
        self(x).square().sum().backward()
        return self.seen, x.grad


class Gradients(Activated):
    modes = ("grad",)

    def use(self) -> Any:
        x = X.clone().requires_grad_()
        y = self(x)
        y.square().sum().backward()
        return y, x.grad


class Slice(Situation):
    """The usual way to take the features of AlexNet and VGG."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU()]
        self.classifier = nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH))

    def use(self) -> Any:
        part = nn.Sequential(*list(self.classifier)[:3])
        first = self.classifier(X), self.classifier[:3](X), part(X), self.classifier[:-2](X)
        steps = [X]
        for layer in self.classifier:
            steps.append(layer(steps[-1]))
        return first, steps, self.classifier[0](X)


class SharedLayers(Situation):
    def __init__(self) -> None:
        super().__init__()
        fc, out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.a = nn.Sequential(fc, nn.GELU(), out)
        self.b = nn.Sequential(fc, nn.Tanh(), out)
        self.c = nn.Sequential(fc, out)
        self.d = nn.Sequential(fc, nn.GELU(), fc, nn.Tanh(), fc)

    def use(self) -> Any:
        return self.a(X), self.b(X), self.c(X), self.d(X)


class ChangedSequential(Situation):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())

    def use(self) -> Any:
        first = self.net(X)
        self.net.insert(1, nn.Identity())
        second = self.net(X)
        del self.net[1:]
        third = self.net(X)
        self.net.append(nn.Tanh())
        return first, second, third, self.net(X)


class SubclassOfSequential(Situation):
    class Stopping(nn.Sequential):
        stop = 9

        def forward(self, x: Tensor) -> Any:
            for index, module in enumerate(self):
                if index == self.stop:
                    return x
                x = module(x)
            return x

    class Reversed(nn.Sequential):
        def __iter__(self) -> Any:
            return reversed(self._modules.values())

    fuses = False

    def __init__(self) -> None:
        super().__init__()
        self.a = self.Stopping(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.b = self.Reversed(nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def use(self) -> Any:
        first = self.a(X), self.b(X)
        self.a.stop = 1
        return first, self.a(X)


class ReversedSequential(Situation):
    class Backwards(nn.Sequential):
        def __iter__(self) -> Any:
            return reversed(self._modules.values())

    def __init__(self) -> None:
        super().__init__()
        self.net = self.Backwards(
            nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        )

    def use(self) -> Any:
        return self.net(X)


class ForwardOfAnother(Situation):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Identity(), nn.Linear(WIDTH, WIDTH), nn.GELU())

    def use(self) -> Any:
        first = self.net(X)
        self.net[0].forward = self.net[1].forward
        return first, self.net(X)


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
