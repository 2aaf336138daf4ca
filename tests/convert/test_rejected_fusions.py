"""Activations that are not fused into a layer, and the reasons in the report."""

import pytest
import torch
from support import floats
from support.fusions import Block, assert_fused, assert_not_fused, fusions, linear
from torch import Tensor, nn
from torch.nn import functional as F

from torchquant import quantize_


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
