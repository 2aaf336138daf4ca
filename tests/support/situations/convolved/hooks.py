"""Hooks of a convolutional network, and code that reads its layers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.situations.convolved import Convolved, X

# ---------------------------------------------------------------- hooks


class HookOnTheConvolution(Convolved):
    def use(self) -> Any:
        first = self(X)
        handle = self.second.register_forward_hook(lambda m, a, y: self.seen.append((a, y)))
        second = self(X)
        handle.remove()
        return first, second, self(X), self.seen


class HookOnTheActivation(Convolved):
    def use(self) -> Any:
        self.act.register_forward_hook(lambda m, a, y: self.seen.append((a, y)))
        return self(X), self(X), self.seen


class HookOnTheNorm(Convolved):
    def use(self) -> Any:
        self.norm.register_forward_hook(lambda m, a, y: self.seen.append(y))
        return self(X), self.seen


class HookBefore(Convolved):
    def use(self) -> Any:
        self.act.register_forward_pre_hook(lambda m, a: self.seen.append(a))
        self.second.register_forward_pre_hook(lambda m, a, k: self.seen.append(a), with_kwargs=True)
        return self(X), self.seen


class HookThatChangesTheOutput(Convolved):
    def use(self) -> Any:
        first = self(X)
        handle = self.act.register_forward_hook(lambda m, a, y: y * 0.5)
        second = self(X)
        handle.remove()
        self.conv.register_forward_pre_hook(lambda m, a: (a[0] * 0.5,))
        return first, second, self(X)


class HookOnTheRoot(Convolved):
    def use(self) -> Any:
        self.register_forward_pre_hook(lambda m, a: (a[0] * 0.5,))
        self.register_forward_hook(lambda m, a, y: self.seen.append((a, y)))
        return self(X), self.seen


class GlobalHook(Convolved):
    def use(self) -> Any:
        module_hooks = torch.nn.modules.module
        first = self(X)
        handle = module_hooks.register_module_forward_hook(
            lambda m, a, y: self.seen.append(y) if type(m) is nn.ReLU else None
        )
        try:
            second = self(X)
        finally:
            handle.remove()
        return first, second, self.seen


class BackwardHooks(Convolved):
    modes = ("grad",)
    cosine = 0.99

    def use(self) -> Any:
        self.act.register_full_backward_hook(lambda m, i, o: self.seen.append((i, o)))
        self.second.register_full_backward_pre_hook(lambda m, o: self.seen.append(o))
        x = X.clone().requires_grad_()
        y = self(x)
        y.square().sum().backward()
        return y, x.grad, self.seen


class TensorHook(Convolved):
    modes = ("grad",)
    cosine = 0.99

    def use(self) -> Any:
        x = X.clone().requires_grad_()
        y = self(x)
        y.register_hook(lambda g: self.seen.append(g))
        y.sum().backward()
        return y, x.grad, self.seen


# ---------------------------------------------------------------- other code reads the layers


class WeightIsReturned(Convolved):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.second.weight.mean(), self.second.bias

    def use(self) -> Any:
        return self(X)


class WeightIsReadByAFunction(Convolved):
    def forward(self, x: Tensor) -> Any:
        y = self.act(self.norm(self.conv(x)))
        return self.second(y), F.conv2d(y, self.second.weight, self.second.bias, padding=1)

    def use(self) -> Any:
        return self(X)


class FoldedWeightIsRead(Convolved):
    """The batch norm cannot be folded into a weight that other code reads."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), F.conv2d(x, self.conv.weight, padding=1)

    def use(self) -> Any:
        return self(X)


class NormIsRead(Convolved):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.conv(x))
        z = (x - self.norm.running_mean.view(1, -1, 1, 1)) * self.norm.weight.view(1, -1, 1, 1)
        return self.second(self.act(y)), z

    def use(self) -> Any:
        return self(X)


class AttributesAreRead(Convolved):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y * self.second.out_channels / sum(self.conv.kernel_size), y

    def use(self) -> Any:
        return self(X)


class StateIsRead(Convolved):
    def use(self) -> Any:
        names = {name.rpartition(".")[0] for name, _ in self.named_modules()}
        return self(X), torch.tensor(len(names)), self.second.bias
