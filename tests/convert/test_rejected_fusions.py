"""Layers and activations that are used in other ways: nobody notices, and the report says why."""

import copy

import pytest
import torch
from support import floats
from support.fusions import Block, assert_not_fused, assert_unnoticed, fusions, linear
from torch import Tensor, nn
from torch.nn import functional as F

from torchquant import Fusion, quantize_


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


REPORTED: dict[type[nn.Module], list[str]] = {
    OutputUsedTwice: ["not fused: fc with act (gelu): its output is also used elsewhere"],
    OutputReturned: ["not fused: fc with act (gelu): its output is also used elsewhere"],
    ActivationUsedElsewhere: ["fused: fc with act (gelu)"],
    ActivationOnTheInput: ["fused: fc with act (gelu)"],
    OnePathOnly: [],
    OnlyWithAMask: [],
    OnlyInTraining: [],
    SecondMethod: ["fused: fc with act (gelu)"],
    DependsOnTheData: ["fused: fc with act (gelu)"],
    CallsAFunction: [
        "not fused: fc: CallsAFunction.forward calls gelu itself; a module (such as nn.GELU) could "
        "be fused"
    ],
    CallsAMethod: [
        "not fused: fc: CallsAMethod.forward calls relu itself; a module (such as nn.GELU) could "
        "be fused"
    ],
    Taps: ["fused: features.0 with features.1 (relu)"],  # where features is called as a whole
    UsedFromAbove: ["fused: block.up with block.act (gelu)"],
    UsedFromAboveByAMethod: ["fused: block.up with block.act (gelu)"],
    UsedFromAboveUntraceable: ["fused: block.up with block.act (gelu)"],
}


@pytest.mark.parametrize("kind", REPORTED, ids=lambda kind: kind.__name__)
def test_nobody_notices_and_the_report_names_reasons(kind: type[nn.Module]) -> None:
    model = kind().eval()
    report = assert_unnoticed(model, floats(5, 64))
    assert fusions(report) == REPORTED[kind]


def test_other_methods_get_the_output_of_the_layer() -> None:
    model = SecondMethod().eval()
    expected = model.features(floats(5, 64))
    quantize_(model)
    with torch.no_grad():
        model(floats(5, 64))
        got = model.features(floats(5, 64))
    assert torch.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.999


def test_a_dropout_between_prevents_a_candidate() -> None:
    assert assert_not_fused(DropoutBetween().eval(), floats(5, 64)).fusions == ()


def test_another_activation_is_reported() -> None:
    report = assert_not_fused(nn.Sequential(linear(), nn.Softplus()), floats(5, 64))
    assert fusions(report) == ["not fused: 0 with 1 (Softplus): a layer cannot compute Softplus"]


def test_a_module_list_is_not_a_sequence_of_calls() -> None:
    model = nn.ModuleList([linear(), nn.ReLU()])
    assert quantize_(model).fusions == ()
    assert type(model[1]) is nn.ReLU


@pytest.mark.parametrize("other", [nn.LayerNorm(64), nn.Linear(64, 64), DependsOnTheData()])
def test_an_activation_that_also_follows_another_module(other: nn.Module) -> None:
    act = nn.GELU()
    model = nn.Sequential(linear(), act, copy.deepcopy(other), act)
    report = assert_unnoticed(model, floats(5, 64))
    assert "fused: 0 with 1 (gelu)" in fusions(report)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_receive_what_they_would_receive(index: int, register: str) -> None:
    plain = nn.Sequential(linear(), nn.GELU())
    model = copy.deepcopy(plain)
    quantize_(plain, fusion=Fusion(activations=False))
    quantize_(model)
    seen: list[list[Tensor]] = []
    for net in (plain, model):
        values: list[Tensor] = []
        getattr(net[index], register)(
            lambda module, *args, values=values: values.extend(
                t for arg in args for t in (arg if isinstance(arg, tuple) else (arg,))
            )
        )
        x = floats(5, 64).requires_grad_()
        net(x).sum().backward()
        seen.append(values)
    assert seen[0]
    for expected, got in zip(*seen, strict=True):
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_forward_replaced_on_the_instance() -> None:
    model = Block()
    model.forward = lambda x: model.act(model.up(x))[..., :64]  # type: ignore[method-assign]
    assert fusions(assert_unnoticed(model, floats(5, 64))) == []


def test_transformer_layers_of_torch() -> None:
    model = nn.TransformerEncoderLayer(64, 4, activation=nn.GELU(), batch_first=True)
    assert [fusion.kind for fusion in quantize_(model).fusions] == ["projections"]
    assert isinstance(model.activation, nn.GELU)
