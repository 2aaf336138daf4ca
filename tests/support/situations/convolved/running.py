"""Ways to run and to copy a convolutional network."""

import copy
import io
import pickle
import tempfile
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torchquant
from support.situations.convolved import C, Convolved, X


class Modes(Convolved):
    def use(self) -> Any:
        results = []
        for mode in (torch.enable_grad, torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                results.append(self(X.clone()))
        return results


class Autocast(Convolved):
    modes = ("no_grad", "grad")
    cosine = 0.998

    def use(self) -> Any:
        first = self(X)
        with torch.autocast("cpu", torch.bfloat16):
            second = self(X)
        return first, second, self(X)


class Gradients(Convolved):
    modes = ("grad",)
    cosine = 0.99

    def use(self) -> Any:
        found = []
        for _ in range(3):
            x = X.clone().requires_grad_()
            self.zero_grad()
            y = self(x)
            y.square().sum().backward()
            found += [y, x.grad, self.second.bias.grad]
        return found


class FrozenInput(Convolved):
    modes = ("grad",)

    def use(self) -> Any:
        self.requires_grad_(False)
        y = self(X)
        assert not y.requires_grad
        x = X.clone().requires_grad_()
        z = self(x)
        assert z.requires_grad
        return y, z


class Checkpoints(Convolved):
    modes = ("grad",)
    cosine = 0.99

    def use(self) -> Any:
        found = []
        for reentrant in (False, True):
            x = X.clone().requires_grad_()
            y = checkpoint(self, x, use_reentrant=reentrant)
            y.square().sum().backward()
            found += [y, x.grad]
        return found


class FunctionalCall(Convolved):
    def use(self) -> Any:
        state = {"second.bias": torch.zeros(C)}
        changed = torch.func.functional_call(self, state, (X,))
        return self(X), changed, self(X)


class FunctionMode(Convolved):
    class Keeping(TorchFunctionMode):
        def __init__(self, seen: list[Any]) -> None:
            super().__init__()
            self.seen = seen

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            output = func(*args, **(kwargs or {}))
            if func is Tensor.add or getattr(func, "__name__", "") == "add":
                self.seen.append(output)
            return output

    def use(self) -> Any:
        first = self(X)
        with self.Keeping(self.seen):
            second = self(X)
        return first, second, self.seen, self(X)


class DispatchMode(Convolved):
    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    modes = ("no_grad", "inference_mode")

    def use(self) -> Any:
        first = self(X)
        with self.Counting():
            second = self(X)
        return first, second, self(X)


class Copies(Convolved):
    def use(self) -> Any:
        first = self(X)
        other, shallow = copy.deepcopy(self), copy.copy(self)
        loaded = pickle.loads(pickle.dumps(self))
        file = io.BytesIO()
        torch.save(self, file)
        file.seek(0)
        third = torch.load(file, weights_only=False)
        with torch.no_grad():
            other.second.bias.zero_()
        return first, other(X), loaded(X), third(X), shallow(X), copy.deepcopy(other)(X), self(X)


class States(Convolved):
    def use(self) -> Any:
        first = self(X)
        state = {name: value.clone() for name, value in self.state_dict().items()}
        with torch.no_grad():
            self.second.bias.zero_()
        second = self(X)
        self.load_state_dict(state)
        return first, second, self(X)


class SavedAndLoaded(Convolved):
    def use(self) -> Any:
        if not isinstance(self.second, torchquant.nn.QuantizedConv2d):
            return self(X), self.second(X)
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
            torchquant.save(self, Path(folder) / "model.safetensors")
            other = type(self)().eval()
            torchquant.load(Path(folder) / "model.safetensors", other)
        return other(X), other.second(X)


class Threads(Convolved):
    modes = ("no_grad",)

    def use(self) -> Any:
        results: list[Any] = [None] * 4
        start = threading.Barrier(4)

        def work(index: int) -> None:
            x = X * (1 - index / 5)
            start.wait()
            with torch.no_grad():
                for _ in range(20):
                    results[index] = [self(x), self.second(x)]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class JitTrace(Convolved):
    modes = ("no_grad",)

    def use(self) -> Any:
        traced = torch.jit.trace(self, X, check_trace=False)
        return traced(X), traced(X * 0.5), self(X)


class SymbolicTrace(Convolved):
    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return not module._modules

    def use(self) -> Any:
        original = type(self).forward
        with mock.patch.dict(self.__dict__):
            self.__dict__.pop("forward", None)
            graph = torch.fx.GraphModule(self, self.Leaves().trace(self))
        assert type(self).forward is original
        return graph(X), graph.second(X), self(X)


class Averaged(Convolved):
    def use(self) -> Any:
        average = torch.optim.swa_utils.AveragedModel(self)
        return average(X), average.module.second(X)


class InsideOthers(Convolved):
    def use(self) -> Any:
        outer = nn.Sequential(self, nn.ReLU(), self)
        return outer(X), nn.ModuleDict({"x": self})["x"](X), self(X)


class TrainingModeAndBack(Convolved):
    def use(self) -> Any:
        first = self(X)
        self.eval()
        self.train().eval()
        return first, self(X)
