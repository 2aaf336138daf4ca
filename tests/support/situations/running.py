"""Ways to run and to copy a model: threads, modes of torch, compilers, files."""

import copy
import io
import pickle
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torchquant
from support.situations import WIDTH, Activated, Projected, Situation, X


class Recording(TorchFunctionMode):
    """Keeps what functions of torch return: the products and the activations."""

    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("linear", "linear_dynamic", "gelu", "relu"):
            self.seen.append(output)
        return output


class FunctionMode(Activated):
    """A mode sees the inputs of the next module; it runs while the model runs."""

    def use(self) -> Any:
        self.act.register_forward_pre_hook(lambda m, args: self.seen.append(args))
        with Recording([]):
            y = self(X)
        return y, self.seen


class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Watching(TorchDispatchMode):
    """Keeps what products return."""

    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if any(word in str(func) for word in ("linear", "addmm")):
            self.seen.append(output)
        return output


class DispatchMode(Activated):
    trains = False
    modes = ("no_grad", "inference_mode")

    def use(self) -> Any:
        first = self(X)
        with Watching(self.seen):
            second = self(X)
        return first, second, self.seen


class ProjectedDispatchMode(Projected):
    """A mode that changes the tensor when it sees the second layer's work."""

    def use(self) -> Any:
        with Counting():
            return self(X), self.k(X)


class Autocast(Activated):
    modes = ("no_grad", "grad")

    def use(self) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self(X), self.fc(X)


class ProjectedAutocast(Projected):
    modes = ("no_grad",)

    def use(self) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            first = self(X)
        return first, self(X)


class GradModes(Projected):
    def forward(self, x: Tensor, grad: bool = False) -> Any:
        q = self.q(x)
        with torch.set_grad_enabled(grad):
            k = self.k(x)
        return q, k

    fuses = False
    modes = ("no_grad", "grad")

    def use(self) -> Any:
        return self(X), self(X, True)


class MixedModes(Projected):
    modes = ("no_grad",)

    def use(self) -> Any:
        results = []
        for mode in (torch.enable_grad, torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                results.append(self(X))
        return results


class Checkpoint(Activated):
    modes = ("grad",)

    def use(self) -> Any:
        results = []
        for reentrant in (False, True):
            x = X.clone().requires_grad_()
            y = checkpoint(self, x, use_reentrant=reentrant)
            y.square().sum().backward()
            h = checkpoint(self.fc, x, use_reentrant=reentrant)
            results += [y, x.grad, h]
        return results


class DeepCopy(Activated):
    def use(self) -> Any:
        other = copy.deepcopy(self)
        third = copy.copy(self)
        other.act = nn.Tanh()
        return self(X), other(X), other.fc(X), third(X)


class Pickled(Activated):
    def use(self) -> Any:
        other = pickle.loads(pickle.dumps(self))
        file = io.BytesIO()
        torch.save(self, file)
        file.seek(0)
        third = torch.load(file, weights_only=False)
        return other(X), other.fc(X), third(X), third.act(X), copy.deepcopy(other)(X)


class ProjectedCopies(Projected):
    def use(self) -> Any:
        other = copy.deepcopy(self)
        loaded = pickle.loads(pickle.dumps(self))
        other.k.bias.data.zero_()
        return self(X), other(X), loaded(X), copy.copy(self)(X)


class SavedAndLoaded(Activated):
    trains = False

    def use(self) -> Any:
        if not isinstance(self.fc, torchquant.nn.QuantizedLinear):
            return self(X), self.fc(X)
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
            torchquant.save(self, Path(folder) / "model.safetensors")
            other = type(self)().eval()
            torchquant.load(Path(folder) / "model.safetensors", other)
        return other(X), other.fc(X)


class Threads(Situation):
    """Four threads with inputs of their own; one of them reads the layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Activated(), Projected()

    def forward(self, x: Tensor) -> Any:
        return self.a(x), self.b(x)

    trains = False
    modes = ("no_grad",)

    def use(self) -> Any:
        results: list[Any] = [None] * 4
        start = threading.Barrier(4)

        def work(index: int) -> None:
            x = X * (index + 1)
            start.wait()
            with torch.no_grad():
                for _ in range(20):
                    results[index] = [self(x), self.a.fc(x), self.b.k(x)]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class Leaves(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not module._modules


class SymbolicTrace(Activated):
    """A graph of the modules, whole, and cut after the layer as one takes features."""

    def use(self) -> Any:
        whole, cut = (torch.fx.GraphModule(self, Leaves().trace(self)) for _ in range(2))
        nodes = {node.target: node for node in cut.graph.nodes}
        nodes["output"].args = (nodes["fc"],)
        cut.graph.eliminate_dead_code()
        cut.recompile()
        return whole(X), cut(X), whole.fc(X)


class DefaultSymbolicTrace(Activated):
    """The default tracer looks into the layers of the library; it runs them on stand-ins."""

    trains = False

    def use(self) -> Any:
        return torch.fx.symbolic_trace(self)(X)


class JitTrace(Activated):
    modes = ("no_grad",)
    trains = False

    def use(self) -> Any:
        traced = torch.jit.trace(self, X)
        layer = torch.jit.trace(self.fc, X)
        return traced(X), traced(X * 0.5), layer(X), self(X)


class FunctionalCall(Activated):
    def use(self) -> Any:
        state = {name: p.detach() for name, p in self.named_parameters()}
        return torch.func.functional_call(self, state, (X,)), self.fc(X)


class Vmap(Activated):
    trains = False

    def use(self) -> Any:
        return torch.vmap(self)(X.unsqueeze(1)), torch.vmap(self.fc)(X)


class ProjectedVmap(Projected):
    modes = ("no_grad",)

    def use(self) -> Any:
        return torch.vmap(self)(X.unsqueeze(1)), self(X)


class Averaged(Activated):
    def use(self) -> Any:
        average = torch.optim.swa_utils.AveragedModel(self)
        return average(X), average.module.fc(X)


class Parametrized(Situation):
    """A module between the two that somebody else's module wraps."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module
            self.seen: list[Any] = []

        def forward(self, x: Tensor) -> Any:
            y = self.module(x)
            self.seen.append(y)
            return y

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(WIDTH, WIDTH), nn.GELU()

    def forward(self, x: Tensor) -> Any:
        return self.act(self.fc(x))

    def use(self) -> Any:
        first = self(X)
        self.fc = self.Wrapper(self.fc)
        second = self(X)
        self.act = self.Wrapper(self.act)
        return first, second, self(X), self.fc.seen, self.act.seen


class FeatureExtractor(Situation):
    """torchvision's way to take the values inside of a model; needs torchvision."""

    trains = False

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def use(self) -> Any:
        extraction = pytest.importorskip("torchvision.models.feature_extraction")
        names = ["0", "1", "2"]
        return extraction.create_feature_extractor(self.net, names)(X), self.net(X)
