"""Changes after the conversion: flags, hooks, modules, patched classes."""

import types
from typing import Any

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
        self.e = nn.Sequential(fc, nn.GELU(), fc, nn.Tanh())

    def use(self) -> Any:
        return self.a(X), self.b(X), self.c(X), self.d(X), self.e(X)


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
