"""Ways to write and to use a convolutional network, each as a module with a method ``use``.

``use`` runs the module and returns every value that its code sees. The float module and the
converted one have to agree, and the converted one with and without programs has the same bits.
"""

import copy
import io
import pickle
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torchquant
from support import assert_same_bits
from support.situations import APART, MODES, assert_agree, tensors

C = 16
_GENERATOR = torch.Generator().manual_seed(7)
X = torch.randn(3, C, 8, 8, generator=_GENERATOR)
CONVOLVED: list[type["Convolved"]] = []


class Convolved(nn.Module):
    """A block: convolution, batch norm, relu, and a second convolution on the sum."""

    modes: ClassVar[tuple[str, ...]] = tuple(MODES)
    cosine: ClassVar[float] = 0.999
    dynamic: ClassVar[bool] = True  # False: not a situation of dynamic activations

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "use" in vars(cls):
            CONVOLVED.append(cls)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(C), nn.ReLU()
        self.second = nn.Conv2d(C, C, 3, padding=1)
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Any:
        y = self.act(self.norm(self.conv(x)))
        return self.second(y + x)

    def use(self) -> Any:
        raise NotImplementedError


class Used(Convolved):
    def use(self) -> Any:
        return self(X), self(X[:1]), self(X[:, :, ::2, 1:])


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


# ---------------------------------------------------------------- other methods


class OtherMethods(Convolved):
    def stem(self, x: Tensor) -> Any:
        return self.act(self.norm(self.conv(x)))

    def features(self, x: Tensor) -> Any:
        return [y := self.stem(x), self.second(y)]

    def forward(self, x: Tensor) -> Any:
        return self.features(x)[-1]

    def use(self) -> Any:
        y = self.stem(X)
        return y, self.features(X), self(X), self.second(y)


class EncoderAndDecoder(Convolved):
    def encode(self, x: Tensor) -> Any:
        return F.max_pool2d(self.act(self.conv(x)), 2)

    def decode(self, x: Tensor) -> Any:
        return self.second(F.interpolate(x, scale_factor=2))

    def forward(self, x: Tensor) -> Any:
        return self.decode(self.encode(x))

    def use(self) -> Any:
        code = self.encode(X)
        return self(X), code, self.decode(code)


class ForwardCalledDirectly(Convolved):
    def use(self) -> Any:
        return self.forward(X), type(self).forward(self, X), self.second.forward(X.relu())


class Keywords(Convolved):
    def forward(self, x: Tensor, *, scale: float = 1.0, shift: Tensor | None = None) -> Any:
        y = self.act(self.conv(x)) * scale
        return self.second(y if shift is None else y + shift)

    def use(self) -> Any:
        return (
            self(x=X),
            self(X, scale=1.0),
            self(X, scale=0.5),
            self(X, shift=0.05 * X.abs()),
            self(X),
        )


class ReturnsFeatures(Convolved):
    def forward(self, x: Tensor, features: bool = False) -> Any:
        y = self.act(self.conv(x))
        if features:
            return y, self.conv(x)
        return self.second(y)

    def use(self) -> Any:
        return self(X), self(X, True), self(X, features=False), self(X, features=True)


class StarArguments(Convolved):
    def forward(self, *images: Tensor) -> Any:
        return [self.second(self.act(self.conv(x))) for x in images]

    def use(self) -> Any:
        return self(X), self(X, X * 0.5)


class DecidesByValues(Convolved):
    def forward(self, x: Tensor) -> Any:
        y = self.act(self.conv(x))
        if float(x.abs().max()) < 3:
            return y
        return self.second(y)

    def use(self) -> Any:
        return self(X), self(X * 0.6)


class DecidesBySizes(Convolved):
    def forward(self, x: Tensor) -> Any:
        y = self.act(self.conv(x))
        if x.shape[0] == 1:
            return y.squeeze(0)
        return self.second(y)

    def use(self) -> Any:
        return self(X), self(X[:1])


class InALoop(Convolved):
    def forward(self, x: Tensor) -> Any:
        outputs = []
        for _ in range(3):
            x = self.act(self.second(x)) + x
            outputs.append(x)
        return outputs

    def use(self) -> Any:
        return self(X)


class Recursion(Convolved):
    def forward(self, x: Tensor, depth: int = 2) -> Any:
        y = self.act(self.conv(x))
        return self(y, depth - 1) if depth else self.second(y)

    def use(self) -> Any:
        return self(X), self(X, 2)


# ---------------------------------------------------------------- features


class Taps(Convolved):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 1)
        )

    def forward(self, x: Tensor) -> Any:
        found = {}
        for name, module in self.body.named_children():
            x = module(x)
            found[name] = x
        return found

    def use(self) -> Any:
        return self(X), self.body(X), self.body[:3](X), self.body[0](X)


class Slices(Convolved):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 1)
        )

    def forward(self, x: Tensor) -> Any:
        return self.body(x)

    def use(self) -> Any:
        extractor = nn.Sequential(*list(self.body.children())[:-1])
        return self(X), extractor(X), self.body[3](extractor(X)), self(X)


class HooksForFeatures(Convolved):
    def use(self) -> Any:
        kept: dict[str, Tensor] = {}
        handles = [
            module.register_forward_hook(lambda m, a, y, name=name: kept.update({name: y}))
            for name, module in self.named_children()
            if name != "conv"  # which computes the batch norm as well
        ]
        y = self(X)
        for handle in handles:
            handle.remove()
        return y, kept, self(X)


class Containers(Convolved):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a": nn.Conv2d(C, C, 1), "b": nn.ReLU()})
        self.more = nn.ModuleList([nn.Conv2d(C, C, 3, padding=1, groups=C), nn.Conv2d(C, C, 1)])
        self.held = [self.second]

    def forward(self, x: Tensor) -> Any:
        y = self.layers["b"](self.layers["a"](x))
        for layer in self.more:
            y = layer(y) + x
        return self.held[0](y), getattr(self, "conv")(y)  # noqa: B009

    def use(self) -> Any:
        return self(X)


# ---------------------------------------------------------------- work in place, and aliases


class InPlace(Convolved):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.conv(x))
        z = self.act(y)
        z += x
        y *= 0.5
        return self.second(z), y

    def use(self) -> Any:
        x = X.clone()
        y = self(x)
        return y, x, self(x)


class ResultsChangedLater(Convolved):
    """A result is the caller's own: what he does to it changes no later result."""

    modes = ("no_grad",)

    def use(self) -> Any:
        first = self(X)
        kept = first.clone()
        second = self(X).fill_(2)
        memory = self(X).numpy()
        memory[:] = 1
        return kept, first, second, self(X)


class InputsChangedLater(Convolved):
    modes = ("no_grad", "inference_mode")

    def use(self) -> Any:
        x = X.clone()
        first = self(x)
        x.mul_(0.5)
        return first, self(x), self(X)


class ReturnsItsInput(Convolved):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x, self.act(x)

    def use(self) -> Any:
        return self(X)


class DeletedBetween(Convolved):
    def forward(self, x: Tensor) -> Any:
        y = self.act(self.conv(x))
        z = self.second(y)
        del y
        return z

    def use(self) -> Any:
        return [self(X * scale) for scale in (1, 0.5, 0.25)]


# ---------------------------------------------------------------- kinds of layers and inputs


class Weird(Convolved):
    """Convolutions with all options, a transposed one, and one of a derived class."""

    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias, padding=self.padding)

    def __init__(self) -> None:
        super().__init__()
        self.reflect = nn.Conv2d(C, C, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(C, C, 2, padding="same", dilation=2)
        self.up = nn.ConvTranspose2d(C, C, 2, stride=2)
        self.standard = self.Standardized(C, C, 3, padding=1)
        self.depth = nn.Conv2d(C, 2 * C, 3, stride=2, padding=1, groups=C)
        self.last = nn.Conv2d(2 * C, C, (1, 3), bias=False)

    def forward(self, x: Tensor) -> Any:
        x = F.leaky_relu(self.reflect(x))
        x = F.hardswish(self.same(x)) + x
        x = self.standard(F.silu(self.up(x)))
        return self.last(F.relu6(self.depth(x)))

    def use(self) -> Any:
        return self(X), self.standard(X)


class Parametrized(Convolved):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.conv)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.act(self.conv(x)))

    def use(self) -> Any:
        return self(X), self.conv.weight


class Sequences(Convolved):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(C, C, 3, padding=1), nn.Conv1d(C, C, 5, stride=2)

    def forward(self, x: Tensor) -> Any:
        return self.b(F.gelu(self.a(x.flatten(2)))).mean(-1)

    def use(self) -> Any:
        return self(X), self(X[:1])


class MemoryFormats(Convolved):
    def use(self) -> Any:
        last = X.contiguous(memory_format=torch.channels_last)
        wide = torch.cat([X, X], 1)[:, C // 2 : C // 2 + C]
        return self(last), self(X[:1].expand(3, -1, -1, -1)), self(X.transpose(2, 3)), self(wide)


class Sizes(Convolved):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.act(self.conv(x)) + x)

    def use(self) -> Any:
        return self(X[0]), self(X[:1]), self(X[:, :, :4]), self(X[:0]), self(X)


class NotANumber(Convolved):
    def use(self) -> Any:
        x = X.clone()
        x[1] = float("nan")
        return self(X), self(x)[::2]


class OtherTypes(Convolved):
    cosine = 0.998
    modes = ("no_grad",)

    def use(self) -> Any:
        whole = self(X)
        return whole, self.bfloat16()(X.bfloat16()), self.float()(X)


# ---------------------------------------------------------------- ways to run


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


# ---------------------------------------------------------------- the checks


def make(kind: type[Convolved]) -> Convolved:
    """A module with the same values each time."""
    torch.manual_seed(0)
    model = kind().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model


def used(model: Convolved, mode: str) -> list[Tensor]:
    """The tensors that the module's code sees."""
    model.seen.clear()
    with MODES[mode]():
        return list(tensors(model.use()))


def converted(kind: type[Convolved]) -> Convolved:
    """The module with static int8 layers, and regions where its forward is understood."""
    model = make(kind)
    config = torchquant.Int8StaticActivationInt8WeightConfig(observer="minmax")
    torchquant.prepare_(model, config, filter_fn=lambda module, name: True)
    # Other methods are no reason for other ranges, smaller values fit.
    torchquant.calibrate(model, [X, X[:1]], progress=False)
    torchquant.convert_(model)
    return model


def agree(got: list[Tensor], wanted: list[Tensor], cosine: float) -> None:
    """Values of a quantized and of the float module."""
    assert len(got) == len(wanted) > 0
    for index, (mine, real) in enumerate(zip(got, wanted, strict=True)):
        assert mine.shape == real.shape and mine.dtype == real.dtype, f"value {index}"
        if not real.numel() or not real.is_floating_point():
            continue
        assert torch.equal(mine.isnan(), real.isnan())
        pair = mine.double().flatten(), real.double().flatten()
        found = 1.0 if torch.equal(*pair) else float(torch.cosine_similarity(*pair, 0))
        assert found > cosine, f"value {index}: cosine {found} to float"


def check_static(kind: type[Convolved], mode: str) -> None:
    """The converted module, and the same without programs, and the float module."""
    model = converted(kind)
    apart = copy.deepcopy(model)
    got = used(model, mode)
    agree(got, used(make(kind), mode), kind.cosine)
    without = mock.patch("torchquant.chains.region.may_use_kernels", lambda inputs: False)
    with without:
        for index, pair in enumerate(zip(got, used(apart, mode), strict=True)):
            assert_same_bits(*pair, f"value {index}")


def check_dynamic(kind: type[Convolved], mode: str) -> None:
    """quantize_ with and without fused activations, and the float module."""
    plain, fused, apart = make(kind), make(kind), make(kind)
    config = torchquant.Int8DynamicActivationInt8WeightConfig()
    every: Callable[..., bool] = lambda module, name: True  # noqa: E731
    torchquant.quantize_(fused, config, filter_fn=every)
    torchquant.quantize_(apart, config, filter_fn=every, fusion=APART)
    got, other = used(fused, mode), used(apart, mode)
    filled = [index for index, one in enumerate(other) if one.numel()]
    mine, alone = ([values[index] for index in filled] for values in (got, other))
    assert_agree(mine, alone, alone, exact=False)
    agree(got, used(plain, mode), kind.cosine)


__all__ = ["CONVOLVED", "Convolved", "check_dynamic", "check_static", "converted", "make", "used"]
