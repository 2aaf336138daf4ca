"""prepare_qat_ on convolutions with batch norms: which pairs become one layer, and what follows."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same_bits, generator
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant
from torchquant import QATConfig, prepare_qat_
from torchquant.nn import QATConv2d, QATConvBn2d, QuantizedConv2d
from torchquant.nn.folded_norm import FoldedNorm


class Block(nn.Module):
    """A residual block, with a batch norm that starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(x + self.bn2(self.conv2(y)))  # type: ignore[no-any-return]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


STATIC = QATConfig(activations="static")
PAIRS = [("0", "1"), ("3.conv1", "3.bn1"), ("3.conv2", "3.bn2")]


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 10, 10, generator=generator(seed))


def trained(config: Any = STATIC) -> nn.Sequential:
    model = network()
    prepare_qat_(model, config, filter_fn="*")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(images(step)), torch.arange(4)).backward()
        optimizer.step()
    return model


def test_pairs_become_one_layer() -> None:
    model = network()
    norms = [model[1], model[3].bn1, model[3].bn2]
    report = prepare_qat_(model, STATIC)
    assert {(f.layers[0], f.what.split()[0]) for f in report.fusions if f.kind == "batch norm"} == {
        *PAIRS
    }
    for (conv, norm), original in zip(PAIRS, norms, strict=True):
        layer, place = model.get_submodule(conv), model.get_submodule(norm)
        assert type(layer) is QATConvBn2d and layer.bn is original
        assert type(place) is FoldedNorm and place.original is original
        assert report[conv].reason == f"with {norm}"
        assert (report[norm].action, report[norm].reason) == ("prepared", f"part of {conv}")
    assert report.parameters == sum(p.numel() for p in network().parameters())
    assert "fused: 0 with 1 (BatchNorm2d)" in str(report)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == report.parameters  # nothing is registered twice


@pytest.mark.parametrize("config", [STATIC, QATConfig(), QATConfig(4, learned_weights=True)])
def test_train_freeze_convert_verify(config: Any, tmp_path: Path) -> None:
    model = trained(config)
    torchquant.qat.freeze_(model)
    assert model[0].keeps_statistics
    copy_of_trained = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    report = torchquant.convert_(model)
    assert [row.action for row in report.layers] == ["converted"] * 4
    for training in (False, True):
        result = torchquant.verify(copy_of_trained, model, [images(7)], training=training)
        assert result.exact, result
    model.eval()
    assert_same_bits(model(images()).detach(), copy_of_trained.eval()(images()).detach())
    conv = model[3].conv1
    assert type(conv) is QuantizedConv2d and conv.bias is not None
    place = model[3].bn1
    assert type(place) is FoldedNorm and place.original is None
    assert not [name for name in model.state_dict() if "bn" in name or "running" in name]
    # Files: into a float model, into a model on the meta device, into a converted one.
    torchquant.save(model, tmp_path / "file")
    targets: list[nn.Module] = [network(), network().to("meta"), copy.deepcopy(model)]
    for other in targets:
        loaded = torchquant.load(tmp_path / "file", other.eval())
        assert repr(loaded) == repr(model)
        assert_same_bits(loaded(images()).detach(), model(images()).detach())


def test_evaluation_during_training_is_the_deployed_model() -> None:
    model = trained().eval()
    converted = copy.deepcopy(model)
    torchquant.convert_(converted)
    assert_same_bits(model(images()).detach(), converted(images()).detach())
    before = copy.deepcopy(model.state_dict())
    assert torchquant.verify(model.train(), converted, [images()], training=True).exact
    assert model.training and not model[0].keeps_statistics
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_stages() -> None:
    model = trained()
    layer = model[3].conv1
    torchquant.qat.freeze_statistics_(model)
    assert layer.keeps_statistics and not layer.bn.training and layer.input_quantizer.observing
    torchquant.qat.freeze_statistics_(model, False)
    assert not layer.keeps_statistics and layer.bn.training
    torchquant.qat.freeze_(model)
    assert layer.keeps_statistics and not layer.input_quantizer.observing
    torchquant.qat.observe_(model)
    assert not layer.keeps_statistics
    other = network()
    prepare_qat_(other, STATIC, filter_fn="*")
    torchquant.qat.freeze_(model)
    other.load_state_dict(model.state_dict())
    assert other[3].conv1.keeps_statistics


def test_to_float_restores_the_batch_norms() -> None:
    model = network()
    originals = dict(model.named_modules())
    names = list(model.state_dict())
    prepare_qat_(model, STATIC)
    model(images())
    torchquant.to_float_(copy.deepcopy(model))  # a copy restores its own
    assert type(model[1]) is FoldedNorm
    torchquant.to_float_(model)
    assert list(model.state_dict()) == names
    assert model[1] is originals["1"] and model[3].bn2 is originals["3.bn2"]
    assert model[0].weight is originals["0"].weight
    converted = trained()
    torchquant.convert_(converted)
    torchquant.to_float_(converted)
    assert type(converted[1]) is FoldedNorm and converted[0].bias is not None


def test_layers_without_a_range_get_their_batch_norm_back() -> None:
    model = network()
    prepare_qat_(model, STATIC, filter_fn="*")
    model[6](torch.randn(2, 16))  # the head alone has a range
    converted = copy.deepcopy(model)
    report = torchquant.convert_(converted)
    assert type(converted[0]) is nn.Conv2d and type(converted[1]) is nn.BatchNorm2d
    assert report["0"].action == "skipped" and type(converted[3].bn2) is nn.BatchNorm2d
    assert torchquant.verify(model, converted, [images()]).exact


def test_the_option_leaves_batch_norms_alone() -> None:
    model = network()
    report = prepare_qat_(model, STATIC, fold_batch_norms=False)
    assert type(model[0]) is QATConv2d and type(model[1]) is nn.BatchNorm2d
    assert not [f for f in report.fusions if f.kind == "batch norm"]


# ---------------------------------------------------------------- what is not a pair


class Twice(nn.Module):
    """The output of the convolution has a second reader."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y  # type: ignore[no-any-return]


class SharedNorm(nn.Module):
    """One batch norm after two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(16, 32, 3), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x)) + self.bn(self.b(x))  # type: ignore[no-any-return]


class Reads(nn.Module):
    """A method reads the gain of the batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.bn.weight.mean()  # type: ignore[no-any-return]


def pair(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32, **options))


def with_hook() -> nn.Module:
    model = pair()
    model[0].register_forward_hook(lambda *_: None)
    return model


def with_norm_hook() -> nn.Module:
    model = pair()
    model[1].register_forward_pre_hook(lambda *_: None)
    return model


def held() -> nn.Module:
    model = pair()
    model.kept = [model[1]]
    return model


NO_PAIRS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "statistics": (lambda: pair(track_running_stats=False), "without running statistics"),
    "hook": (with_hook, "a hook sees the output of the layer"),
    "norm hook": (with_norm_hook, "the batch norm has hooks"),
    "held": (held, "kept[0] holds the batch norm"),
    "twice": (Twice, ""),
    "shared": (SharedNorm, "the batch norm is called in more than one place"),
    "reads": (Reads, "Reads.forward reads its weight"),
    "sync": (
        lambda: nn.Sequential(nn.Conv2d(16, 32, 3), nn.SyncBatchNorm(32)),
        "SyncBatchNorm, which is not exactly an nn.BatchNorm2d",
    ),
}


@pytest.mark.parametrize("name", NO_PAIRS)
def test_what_is_not_a_pair_is_reported_and_left_alone(name: str) -> None:
    make, reason = NO_PAIRS[name]
    model = make()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    report = prepare_qat_(model, STATIC)
    rows = [f for f in report.fusions if f.kind == "batch norm"]
    assert rows and all(row.action == "not fused" and reason in row.reason for row in rows)
    assert rows[0].reason
    left = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert left == norms
    layers = [m for m in model.modules() if isinstance(m, QATConv2d)]
    assert layers and not any(isinstance(layer, QATConvBn2d) for layer in layers)


def transposed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, bias=False),
        nn.BatchNorm2d(32),
        nn.ConvTranspose2d(32, 32, 2, bias=False),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 32, 3),
    ).eval()


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_file_with_a_batch_norm_folded_into_a_float_layer(place: str, tmp_path: Path) -> None:
    model, x = transposed(), torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        torchquant.prepare_(model, torchquant.Int8StaticActivationInt8WeightConfig(), x)
        torchquant.calibrate(model, [x], progress=False)
        torchquant.convert_(model)
        assert type(model[2]) is nn.ConvTranspose2d and type(model[3]) is FoldedNorm
        torchquant.save(model, tmp_path / "file")
        other = torchquant.load(tmp_path / "file", transposed().to(place))
        assert_same_bits(other(x), model(x))
    bad = transposed()
    bad[4] = nn.Conv2d(32, 16, 3)
    with pytest.raises(ValueError, match="does not fit the model"):
        torchquant.load(tmp_path / "file", bad)
    assert bad[2].bias is None  # the change is undone


def test_a_file_of_another_structure_is_refused(tmp_path: Path) -> None:
    model = trained()
    torchquant.convert_(model)
    torchquant.save(model, tmp_path / "file")
    other = network()
    other[1] = nn.Identity()
    with pytest.raises(ValueError, match="a batch norm at '1' in the file, Identity in the model"):
        torchquant.load(tmp_path / "file", other)
    assert type(other[0]) is nn.Conv2d
    with pytest.raises(ValueError, match="does not fit the model"):
        torchquant.save(network(), tmp_path / "float")
        torchquant.load(tmp_path / "float", model)
