"""Fusion of activations into quantized layers: fusions, rejected fusions, and the reasons."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant
from torchquant import Fusion, functional, quantize_
from torchquant import QuantizationReport as Report
from torchquant.graph.recognize import activation_of
from torchquant.graph.trace import forward_traces
from torchquant.nn import FusedActivation, QuantizedLinear

KNOWN = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
KNOWN = {name: make for name, make in KNOWN.items() if name in functional.ACTIVATIONS}


def fusions(report: Report) -> list[str]:
    return [str(fusion) for fusion in report.fusions]


def linear(out_features: int = 64, in_features: int = 64) -> nn.Linear:
    return nn.Linear(in_features, out_features)


class Of(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Block(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down = linear(128), linear(64, 128)
        self.act = nn.GELU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(self.act(self.up(x)))
        return result


def assert_fused(model: nn.Module, x: Tensor, *, tolerance: float = 1e-5) -> Report:
    """Convert with and without fusion: something is fused, and the outputs agree."""
    plain = copy.deepcopy(model)
    quantize_(plain, fusion=Fusion(activations=False))
    report = quantize_(model)
    assert any(fusion.action == "fused" for fusion in report.fusions)
    with torch.no_grad():
        expected, got = plain(x), model(x)
    assert got.dtype == expected.dtype
    scale = float(expected.abs().max())
    assert (got - expected).abs().max() <= tolerance * scale
    return report


def assert_not_fused(model: nn.Module, *inputs: Any) -> Report:
    """Convert with and without fusion: nothing is fused, and the outputs are the same bits."""
    plain = copy.deepcopy(model)
    quantize_(plain, fusion=Fusion(activations=False))
    report = quantize_(model)
    assert not any(fusion.action == "fused" for fusion in report.fusions)
    assert not any(isinstance(module, FusedActivation) for module in model.modules())
    with torch.no_grad():
        for x in inputs:
            expected, got = plain(x), model(x)
            assert_same_bits(got, expected)
    return report


# ---------------------------------------------------------------- recognised activations


@pytest.mark.parametrize("name", KNOWN)
def test_activations_of_torch_are_recognized(name: str) -> None:
    assert activation_of(KNOWN[name]()) == name


SQRT_HALF = 0.5**0.5
SAME = {
    "gelu by erf": ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x * SQRT_HALF))),
    "gelu_new": (
        "gelu_tanh",
        lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x * x * x))),
    ),
    "swish": ("silu", lambda x: x * torch.sigmoid(x)),
    "clamp": ("relu", lambda x: x.clamp(min=0)),
    "inplace": ("relu", lambda x: x.relu_()),
}
OTHER = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "leaky, hardly": lambda x: F.leaky_relu(x, 1e-8),
    "capped": lambda x: x.clamp(0, 1e5),
    "shifted": lambda x: F.gelu(x) + 1e-5,
    "steeper": lambda x: F.silu(1.0001 * x),
    "normed": lambda x: F.relu(x) / x.abs().amax(-1, keepdim=True).clamp(min=1e30) * 1e30,
    "centered": lambda x: F.gelu(x) - 1e-30 * x.mean(-1, keepdim=True),
    "straight through": lambda x: x + (F.relu(x) - x).detach(),
    "without gradient": lambda x: F.relu(x).detach(),
    "always float": lambda x: F.relu(x).float(),
    "always double": lambda x: F.relu(x.double()),
    "flat": lambda x: F.relu(x).reshape(-1),
    "a tuple": lambda x: (F.relu(x),),
    "nan to zero": lambda x: F.relu(x).nan_to_num(0.0),
    "identity": lambda x: x,
    "dropout": lambda x: F.dropout(F.relu(x), 0.5),
    "raises": lambda x: x[10**6],
    "a thing": lambda x: object(),
}


@pytest.mark.parametrize("case", SAME)
def test_activations_of_other_libraries_are_recognized_by_their_values(case: str) -> None:
    name, function = SAME[case]
    assert activation_of(Of(function)) == name


@pytest.mark.parametrize("case", OTHER)
def test_modules_similar_to_an_activation_are_not_recognized(case: str) -> None:
    assert activation_of(Of(OTHER[case])) is None


@pytest.mark.parametrize(
    "module",
    [nn.Identity(), nn.Dropout(), nn.PReLU(), nn.RReLU(), nn.LayerNorm(16), nn.Softmax(-1)],
    ids=lambda module: type(module).__name__,
)
def test_modules_that_are_not_activations(module: nn.Module) -> None:
    assert activation_of(module) is None


class DifferentInTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(x), 0.5, self.training)


def test_a_module_that_differs_in_training_is_not_recognized() -> None:
    assert activation_of(DifferentInTraining().eval()) is None


def test_recognition_does_not_change_the_module() -> None:
    seen: list[Tensor] = []
    module = Of(lambda x: (seen.append(x), F.relu(x))[1]).eval()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert activation_of(module) == "relu"
        assert activation_of(Of(lambda x: F.relu(x) + torch.rand(()))) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert not module.training


# ---------------------------------------------------------------- fusions


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_a_sequential(name: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(linear(), KNOWN[name](), linear()).to(dtype).eval()
    keys = set(model.state_dict())
    report = assert_fused(model, floats(9, 64).to(dtype), tolerance=8 * torch.finfo(dtype).eps)
    assert fusions(report) == [f"fused: 0 with 1 ({name})"]
    assert [layer.reason for layer in report.layers] == ["", ""]
    assert (model[0].activation, model[2].activation) == (name, "none")
    assert isinstance(model[1], FusedActivation)
    assert type(model[1].original) is type(KNOWN[name]())
    assert not model[1].training
    renamed = {key.replace("qweight", "weight") for key in model.state_dict() if "_" not in key}
    assert renamed == keys


def test_the_bits_are_those_of_a_layer_with_that_activation() -> None:
    float_layer = linear()
    model = nn.Sequential(copy.deepcopy(float_layer), nn.GELU())
    quantize_(model)
    x = floats(5, 64)
    expected = QuantizedLinear.from_float(float_layer, activation="gelu")
    assert_same_bits(model(x), expected(x))


def test_in_a_forward() -> None:
    report = assert_fused(Block(), floats(4, 64))
    assert fusions(report) == ["fused: up with act (gelu)"]


def test_in_blocks_that_are_held_in_lists() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block(nn.SiLU())])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                if x.shape[0] > 100:  # the model as a whole cannot be traced
                    x = x[:100]
                x = block(x)
            return x

    report = assert_fused(Net(), floats(4, 64))
    assert fusions(report) == [
        "fused: blocks.0.up with blocks.0.act (gelu)",
        "fused: blocks.1.up with blocks.1.act (silu)",
    ]


def test_modules_in_dictionaries_and_lists() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"fc": linear(), "act": nn.ReLU()})
            self.more = nn.ModuleList([nn.ModuleList([linear(), nn.SiLU()])])

        def forward(self, x: Tensor) -> Tensor:
            x = self.parts["act"](self.parts["fc"](x))
            for layer in self.more[0]:
                x = layer(x)
            return x

    report = assert_fused(Net(), floats(4, 64))
    assert fusions(report) == [
        "fused: parts.fc with parts.act (relu)",
        "fused: more.0.0 with more.0.1 (silu)",
    ]


def test_an_activation_that_every_layer_shares() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = linear(), linear(), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.act(self.b(self.act(self.a(x))))
            return result

    model = Net()
    report = assert_fused(model, floats(4, 64))
    assert fusions(report) == ["fused: a with act (relu)", "fused: b with act (relu)"]


def test_an_activation_that_blocks_share() -> None:
    act = nn.GELU()
    model = nn.Sequential(Block(act), Block(act))
    report = assert_fused(model, floats(4, 64))
    assert len(report.fusions) == 2
    assert model[0].act is model[1].act
    assert isinstance(model[0].act, FusedActivation)


def test_a_layer_that_is_called_twice() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = linear(), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = self.act(self.fc(x))
            return x

    assert_fused(Net(), floats(4, 64))


def test_optional_arguments_and_flags_that_do_not_matter() -> None:
    class Net(Block):
        def forward(  # type: ignore[override]
            self, x: Tensor, mask: Tensor | None = None, scaled: bool = False, *args: Any, **kw: Any
        ) -> Tensor:
            if mask is not None:
                x = x * mask
            if scaled or self.training:
                x = x * 2
            return self.down(self.act(self.up(x)))  # type: ignore[no-any-return]

    assert_fused(Net(), floats(4, 64))


def test_gradients_flow() -> None:
    model = Block().train()
    plain = copy.deepcopy(model)
    quantize_(plain, fusion=Fusion(activations=False))
    quantize_(model)
    gradients = []
    for net in (plain, model):
        x = floats(6, 64).requires_grad_()
        net(x).square().sum().backward()
        assert x.grad is not None
        assert net.up.bias.grad is not None
        gradients.append((x.grad, net.up.bias.grad))
    for expected, got in zip(*gradients, strict=True):
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_copies_and_pickles() -> None:
    model = Block().eval()
    quantize_(model)
    x = floats(3, 64)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert isinstance(other.act, FusedActivation)
        assert type(other.act.original) is nn.GELU
        assert_same_bits(other(x), model(x))


def test_compile() -> None:
    model = Block().eval()
    quantize_(model)
    x = floats(3, 64)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_same_bits(compiled(x), model(x))


# ---------------------------------------------------------------- rejected fusions


def test_switched_off() -> None:
    model = nn.Sequential(linear(), nn.ReLU())
    report = quantize_(model, fusion=Fusion(activations=False))
    assert report.fusions == ()
    assert type(model[1]) is nn.ReLU
    assert model[0].activation == "none"


class Net(nn.Module):
    """Two layers and an activation; subclasses use them in ways that prevent fusion."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other, self.act = linear(), linear(), nn.GELU()


class OutputUsedTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x)
        return self.act(hidden) + hidden  # type: ignore[no-any-return]


class OutputReturned(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x)
        return torch.cat((self.act(hidden), hidden))


class ActivationUsedElsewhere(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.act(self.fc(x)))  # type: ignore[no-any-return]


class ActivationOnTheInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(self.act(x)))  # type: ignore[no-any-return]


class OnePathOnly(Net):
    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        hidden: Tensor = self.fc(x)
        return hidden if plain else self.act(hidden)  # type: ignore[no-any-return]


class OnlyWithAMask(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.fc(x)
        return hidden if mask is None else self.act(hidden) * mask  # type: ignore[no-any-return]


class OnlyInTraining(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.fc(x)
        return self.act(hidden) if self.training else hidden


class SecondMethod(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))  # type: ignore[no-any-return]

    def features(self, x: Tensor) -> Tensor:
        return self.fc(x)  # type: ignore[no-any-return]


class DependsOnTheData(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x)) if x.sum() > 0 else self.fc(x)  # type: ignore[no-any-return]


class CallsAFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc(x))


class CallsAMethod(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).relu()  # type: ignore[no-any-return]


class DropoutBetween(Net):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self.fc(x)))  # type: ignore[no-any-return]


class Taps(nn.Module):
    """Returns intermediate features, as is common for VGG."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(linear(), nn.ReLU(), linear())

    def forward(self, x: Tensor) -> Tensor:
        taps = []
        for layer in self.features:
            x = layer(x)
            taps.append(x)
        return torch.cat(taps)


class UsedFromAbove(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.block.up(x)[..., :64]  # type: ignore[no-any-return]


class UsedFromAboveByAMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = SecondMethodBlock()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.block.init(x)[..., :64]  # type: ignore[no-any-return]


class SecondMethodBlock(Block):
    def init(self, x: Tensor) -> Tensor:  # a name that is not looked into, but for its calls
        return self.up(x)  # type: ignore[no-any-return]


class UsedFromAboveUntraceable(UsedFromAbove):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.block.up(x)[..., :64]
        return self.block(x) + hidden if x.sum() > -1e9 else x  # type: ignore[no-any-return]


NOT_FUSED: dict[type[nn.Module], str] = {
    OutputUsedTwice: "not fused: fc with act (gelu): the layer's output is also used elsewhere",
    OutputReturned: "not fused: fc with act (gelu): the layer's output is also used elsewhere",
    ActivationUsedElsewhere: "not fused: fc with act (gelu): the activation is also used elsewhere",
    ActivationOnTheInput: "not fused: fc with act (gelu): the activation is also used elsewhere",
    OnePathOnly: "not fused: fc with act (gelu): the layer's output does not always go into the "
    "activation",
    OnlyWithAMask: "not fused: fc with act (gelu): the layer's output does not always go into the "
    "activation",
    OnlyInTraining: "not fused: fc with act (gelu): the layer's output does not always go into the "
    "activation",
    SecondMethod: "not fused: fc with act (gelu): SecondMethod.features uses it too, and is not "
    "called by forward",
    DependsOnTheData: "not fused: fc: DependsOnTheData.forward could not be traced (TraceError: "
    "symbolically traced variables cannot be used as inputs to control flow)",
    CallsAFunction: "not fused: fc: CallsAFunction.forward calls gelu itself; a module (such as "
    "nn.GELU) could be fused",
    CallsAMethod: "not fused: fc: CallsAMethod.forward calls relu itself; a module (such as "
    "nn.GELU) could be fused",
    Taps: "not fused: features.0 with features.1 (relu): the layer's output is also used elsewhere",
    UsedFromAbove: "not fused: block.up with block.act (gelu): the layer's output does not always "
    "go into the activation",
    UsedFromAboveByAMethod: "not fused: block.up with block.act (gelu): the layer's output does "
    "not always go into the activation",
    UsedFromAboveUntraceable: "not fused: block.up with block.act (gelu): UsedFromAboveUntraceable"
    ".forward calls it too, and could not be traced (TraceError: symbolically traced variables "
    "cannot be used as inputs to control flow)",
}


@pytest.mark.parametrize("kind", NOT_FUSED, ids=lambda kind: kind.__name__)
def test_rejected_fusions_and_their_reasons(kind: type[nn.Module]) -> None:
    report = assert_not_fused(kind().eval(), floats(5, 64))
    assert NOT_FUSED[kind] in fusions(report)


def test_a_dropout_between_prevents_a_candidate() -> None:
    assert assert_not_fused(DropoutBetween().eval(), floats(5, 64)).fusions == ()


def test_another_activation_is_reported() -> None:
    report = assert_not_fused(nn.Sequential(linear(), nn.Hardswish()), floats(5, 64))
    assert fusions(report) == ["not fused: 0 with 1 (Hardswish): a layer cannot compute Hardswish"]


def test_a_module_list_is_not_a_sequence_of_calls() -> None:
    model = nn.ModuleList([linear(), nn.ReLU()])
    assert quantize_(model).fusions == ()
    assert type(model[1]) is nn.ReLU


def test_an_activation_that_also_follows_another_module() -> None:
    act = nn.ReLU()
    model = nn.Sequential(linear(), act, nn.LayerNorm(64), act)
    report = assert_not_fused(model, floats(5, 64))
    assert fusions(report) == [
        "not fused: 0 with 1 (relu): the activation is also used elsewhere",
    ]


def test_an_activation_that_also_follows_a_float_layer() -> None:
    act = nn.ReLU()
    model = nn.Sequential(linear(), act, linear(8), act)
    report = assert_not_fused(model, floats(5, 64))
    assert "not fused: 0 with 1 (relu): the activation is also used elsewhere" in fusions(report)


def test_an_activation_that_is_also_in_an_untraceable_block() -> None:
    act = nn.ReLU()
    other = DependsOnTheData()
    other.act = act
    model = nn.Sequential(linear(), act, other)
    report = assert_not_fused(model, floats(5, 64))
    assert any(
        line.startswith("not fused: 0 with 1 (relu): DependsOnTheData.forward could not be traced")
        for line in fusions(report)
    )


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_full_backward_hook", "register_full_backward_pre_hook"],
)
def test_hooks(index: int, register: str) -> None:
    model = nn.Sequential(linear(), nn.ReLU())
    getattr(model[index], register)(lambda *args: None)
    where = ("layer", "activation")[index]
    report = assert_not_fused(model, floats(5, 64))
    assert fusions(report) == [
        f"not fused: 0 with 1 (relu): hooks on the {where} would receive different values"
    ]


def test_a_hook_before_the_layer_is_permitted() -> None:
    model = nn.Sequential(linear(), nn.ReLU())
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args))
    assert_fused(model, floats(5, 64))
    assert len(seen) == 2  # also the hook of the copy


def test_a_forward_replaced_on_the_instance() -> None:
    model = Block()
    model.forward = lambda x: model.act(model.up(x))[..., :64]  # type: ignore[method-assign]
    report = quantize_(model)
    assert fusions(report) == [
        f"not fused: {name}: Block.forward could not be traced (forward replaced on the instance)"
        for name in ("up", "down")
    ]


def test_a_layer_with_different_values_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchquant.convert.activations as fuse

    monkeypatch.setattr(fuse, "activation_of", lambda module: "silu")
    model = nn.Sequential(linear(), nn.GELU())
    report = quantize_(model)
    assert fusions(report) == [
        "not fused: 0 with 1 (silu): the fused layer gave different values on random rows"
    ]
    assert type(model[1]) is nn.GELU
    assert model[0].activation == "none"


def test_transformer_layers_of_torch() -> None:
    model = nn.TransformerEncoderLayer(64, 4, activation=nn.GELU(), batch_first=True)
    assert quantize_(model).fusions == ()
    assert isinstance(model.activation, nn.GELU)


# ---------------------------------------------------------------- traces


def test_a_trace_changes_nothing() -> None:
    class Stateful(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.seen: list[Tensor] = []
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.last = x
            self.seen.append(x)
            x = x + torch.rand(())
            self.extra = self.up
            return super().forward(x)

    model = Stateful()
    before = {**model.__dict__}
    modules = {**model._modules}
    state = torch.get_rng_state()
    traces = forward_traces(model)
    assert all(trace.failure is None for trace in traces)
    assert model.__dict__ == before
    assert model._modules == modules
    assert (model.seen, model.last) == ([], None)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_buffer_is_not_changed_in_place() -> None:
    class Counter(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return super().forward(x)

    model = Counter()
    assert_fused(model, floats(3, 64))
    assert model.count == 1


def test_other_threads_may_run_models_meanwhile() -> None:
    other, x, errors = Block().eval(), floats(3, 64), []
    expected, stop = other(x), threading.Event()

    def serve() -> None:
        try:
            while not stop.is_set():
                assert torch.equal(other(x), expected)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(20):
        forward_traces(Block())
    stop.set()
    thread.join()
    assert not errors


def test_the_argument() -> None:
    with pytest.raises(TypeError, match=r"quantize_: fusion must be a torchquant.Fusion\(\), got"):
        quantize_(Block(), fusion=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Fusion: activations must be True or False, got 1"):
        Fusion(activations=1)  # type: ignore[arg-type]
    assert torchquant.Fusion is Fusion
