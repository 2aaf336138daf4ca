"""The verbs on models with convolutions: which are quantized, which stay in float, and why."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same_bits, generator
from support.layers import outcome, unchanged
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import torchquant
from torchquant import Int8DynamicActivationInt8WeightConfig as Config
from torchquant import QATConfig, prepare_qat_, quantize_
from torchquant.nn import QATConv2d, QuantizedConv1d, QuantizedConv2d, QuantizedLinear


class Scaled(nn.Conv2d):
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def everything() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(16, 32, 3),
            "sequence": nn.Conv1d(32, 64, 5),
            "pointwise": nn.Conv2d(64, 64, 1),
            "groups": nn.Conv2d(64, 64, 3, groups=2),
            "depthwise": nn.Conv2d(64, 64, 3, groups=64),
            "many_groups": nn.Conv2d(64, 64, 3, groups=16),
            "stem": nn.Conv2d(3, 32, 3),
            "few_outputs": nn.Conv2d(64, 8, 3),
            "subclass": Scaled(64, 64, 3),
            "parametrized": parametrizations.weight_norm(nn.Conv2d(64, 64, 3)),
            "lazy": nn.LazyConv2d(64, 3),
            "complex": nn.Conv2d(64, 64, 3, dtype=torch.complex64),
            "transposed": nn.ConvTranspose2d(64, 64, 3),
            "volume": nn.Conv3d(64, 64, 3),
        }
    )


DEPTHWISE = "depthwise: it does not benefit from dynamic activations"
SMALL = "too small to benefit"
REFUSED = {
    "subclass": "Scaled (a subclass of nn.Conv2d)",
    "parametrized": "ParametrizedConv2d (parametrized)",
    "lazy": "LazyConv2d (its parameters have no values yet; run the model once)",
    "complex": "weight of dtype complex64",
}
OTHERS = {
    "transposed": "ConvTranspose2d, no integer path yet",
    "volume": "Conv3d, no integer path yet",
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_which_convolutions_are_quantized() -> None:
    model = everything()
    report = quantize_(model)
    assert outcome(report) == {
        "conv": "quantized",
        "sequence": "quantized",
        "pointwise": "quantized",
        "groups": "quantized",
        "depthwise": f"skipped: {DEPTHWISE}",
        "many_groups": f"skipped: {SMALL}",
        "stem": f"skipped: {SMALL}",
        "few_outputs": f"skipped: {SMALL}",
        **{name: f"skipped: {reason}" for name, reason in REFUSED.items()},
    }
    assert {row.name: row.reason for row in report.others if row.family == "convolutions"} == OTHERS
    assert type(model["conv"]) is QuantizedConv2d and type(model["sequence"]) is QuantizedConv1d
    assert report["conv"].shape == (32, 16, 3, 3) and report["conv"].family == "conv2d"
    assert "32 x 16 x 3 x 3" in str(report)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_with_static_activations_small_and_depthwise_layers_are_prepared() -> None:
    report = prepare_qat_(everything(), QATConfig(activations="static"))
    skipped = {row.name: row.reason for row in report.skipped}
    assert skipped == REFUSED
    report = prepare_qat_(everything())
    assert report["depthwise"].reason == DEPTHWISE and report["stem"].reason == SMALL


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_filter_selects_small_and_depthwise_layers() -> None:
    for chosen in (["stem", "depthwise"], lambda module, name: name in ("stem", "depthwise")):
        report = quantize_(everything(), filter_fn=chosen, strict=True)
        assert [row.name for row in report.quantized] == ["depthwise", "stem"]
    report = quantize_(everything(), {"stem": Config(), "*": Config()})
    assert report["stem"].action == "quantized" and report["depthwise"].reason.startswith(DEPTHWISE)
    with pytest.raises(ValueError, match=r"subclass: Scaled \(a subclass of nn.Conv2d\)"):
        quantize_(everything(), filter_fn="subclass", strict=True)


def test_a_filter_for_linear_layers_does_not_stop_at_a_convolution() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(64, 64, 3), "fc": nn.Linear(64, 64)})
    report = quantize_(copy.deepcopy(model), filter_fn=lambda m, name: m.out_features > 10)
    assert outcome(report) == {
        "conv": "skipped: filter_fn: 'Conv2d' object has no attribute 'out_features'",
        "fc": "quantized",
    }
    with unchanged(model), pytest.raises(AttributeError, match="'outfeatures'"):
        quantize_(model, filter_fn=lambda m, name: m.outfeatures > 10)


def test_weights_with_zero_points_are_refused_with_the_reason() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(64, 64, 3), "fc": nn.Linear(64, 64)})
    report = quantize_(model, Config(weight_symmetric=False))
    assert outcome(report) == {
        "conv": "skipped: convolutions need symmetric weights",
        "fc": "quantized",
    }
    with pytest.raises(ValueError, match="conv: convolutions need symmetric weights"):
        quantize_(model, Config(weight_symmetric=False), filter_fn="conv", strict=True)


def test_bare_layers_name_the_class_to_use() -> None:
    with pytest.raises(ValueError, match=r"a bare Conv2d, .*QuantizedConv2d.from_float\(conv2d, "):
        quantize_(nn.Conv2d(64, 64, 3))
    with pytest.raises(ValueError, match=r"a bare Conv1d, .*QATConv1d.from_float\(conv1d, config"):
        prepare_qat_(nn.Conv1d(64, 64, 3))


# ---------------------------------------------------------------- activations


class Net(nn.Module):
    """Convolutions with activations as modules and as functions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(16, 32, 3, padding=1)
        self.act = nn.SiLU()
        self.second = nn.Conv2d(32, 64, 3, stride=2)
        self.tail = nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        x = F.relu(self.second(x))
        return self.head(self.tail(x).flatten(1))  # type: ignore[no-any-return]


def image(seed: int = 0) -> Tensor:
    return torch.randn(2, 16, 8, 8, generator=generator(seed))


def test_activations_are_fused_without_changing_a_bit() -> None:
    model = Net().eval()
    report = quantize_(model)
    fused = {f.layers: f.action for f in report.fusions}
    assert fused == {("first",): "fused", ("tail.0",): "fused", ("second",): "not fused"}
    calls: list[str] = []
    original = torchquant.ops.conv_dynamic

    def recorded(*args: Any, activation: str = "none", **options: Any) -> Tensor:
        calls.append(activation)
        return original(*args, activation=activation, **options)

    with torch.no_grad():
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torchquant.ops, "conv_dynamic", recorded)
            got = model(image())
        assert calls == ["silu", "none", "relu"]
        hook = model.first.register_forward_hook(lambda *_: None)  # a hook sees the sums
        assert_same_bits(model(image()), got)
        hook.remove()
    seen: list[Tensor] = []
    model.first.register_forward_hook(lambda module, args, output: seen.append(output))
    model(image())
    assert bool((seen[0] < -0.3).any())


def test_the_quantized_model_is_close_to_the_float_model() -> None:
    model = Net().eval()
    with torch.no_grad():
        want = model(image())
        quantize_(model)
        got = model(image())
        assert_same_bits(model(image()[1:])[0], got[1])  # a sample alone and in a batch
    assert float(F.cosine_similarity(want.flatten(), got.flatten(), 0)) > 0.999


def test_training_with_a_fused_relu() -> None:
    model = Net()
    report = prepare_qat_(model)
    assert [f.layers for f in report.fusions if f.action == "fused"] == [("tail.0",)]
    model(image()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


# ---------------------------------------------------------------- the other verbs


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_train_convert_verify_and_back(activations: Any, tmp_path: Path) -> None:
    model = Net()
    names = list(model.state_dict())
    first = model.first.weight
    prepare_qat_(model, QATConfig(activations=activations))
    assert type(model.first) is QATConv2d and model.first.weight is first
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    losses = []
    for step in range(6):
        loss = model(image(step % 2)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    torchquant.qat.freeze_(model)
    trained = copy.deepcopy(model)
    report = torchquant.convert_(model.eval())
    assert [row.action for row in report.layers] == ["converted"] * 4
    for training in (False, True):
        result = torchquant.verify(trained, model, [image(3), image(4)], training=training)
        assert result.exact and [row.name for row in result.layers] == [
            "first",
            "second",
            "tail.0",
            "head",
        ]
    torchquant.save(model, tmp_path / "file")
    other = torchquant.load(tmp_path / "file", Net().eval())
    assert_same_bits(other(image()).detach(), model(image()).detach())
    torchquant.to_float_(trained)
    assert list(trained.state_dict()) == names and type(trained.first) is nn.Conv2d
    assert trained.first.weight is not first and trained.head.bias is not None


def test_a_layer_without_a_range_stays_in_float() -> None:
    model = Net()
    prepare_qat_(model, QATConfig(activations="static"))
    model.head(torch.randn(4, 64))
    report = torchquant.convert_(model)
    assert type(model.first) is nn.Conv2d and type(model.head) is QuantizedLinear
    assert "first" in report.notes[-1] or any("first" in note for note in report.notes)


def test_edge_bits() -> None:
    model = Net()
    prepare_qat_(model, QATConfig(weight_bits=4, edge_bits=8))
    bits = [layer.config.weights.bits for layer in (model.first, model.second, model.head)]
    assert bits == [8, 4, 8]


# ---------------------------------------------------------------- weights that are read elsewhere


class Reader(nn.Module):
    """A model whose forward computes with a convolution's weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(16, 32, 3), nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


class Raw(nn.Module):
    """A model with a kernel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(32, 16, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel)


def test_functional_convolutions_are_reported() -> None:
    model = Reader().eval()
    want = model(image())
    report = quantize_(model)
    assert outcome(report)["conv"] == "quantized: Reader.forward reads its weight"
    assert float(F.cosine_similarity(want.flatten(), model(image()).flatten(), 0)) > 0.999
    report = prepare_qat_(Reader())
    assert "so training would not see the quantized one" in outcome(report)["conv"]
    row = quantize_(nn.Sequential(Raw()))["0"]
    assert row.reason == "parameters of Raw, no integer path yet: kernel"
