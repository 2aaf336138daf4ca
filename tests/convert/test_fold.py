"""Batch norms become part of the layers before them, or stay with a reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.chain_models import Functional, Nested, UNet, images, with_statistics
from torch import Tensor, nn

import torchquant
from torchquant.convert.fold import fold_batch_norms
from torchquant.convert.regions import find
from torchquant.nn.folded_norm import FoldedNorm
from torchquant.report import FusionReport

PAIRS: dict[str, Callable[[], tuple[nn.Module, nn.Module, tuple[int, ...]]]] = {
    "conv1d": lambda: (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": lambda: (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "grouped": lambda: (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "conv3d": lambda: (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (1, 2, 4, 4, 4)),
    "transposed": lambda: (
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
        nn.BatchNorm2d(6),
        (2, 4, 5, 5),
    ),
    "transposed 1-d": lambda: (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 5)),
    "linear": lambda: (nn.Linear(4, 6), nn.BatchNorm1d(6), (3, 4)),
    "not affine": lambda: (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False), (2, 4, 5, 5)),
}


def fold(
    model: nn.Module, *, regions: bool, ranks: dict[int, set[int]] | None = None
) -> list[FusionReport]:
    found = find(model, lambda module: isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv1d)))
    return fold_batch_norms(model, found.regions if regions else [], lambda layer: True, ranks)


def close(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).abs().max() <= 1e-5 * wanted.abs().max())


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str, regions: bool) -> None:
    layer, norm, shape = PAIRS[name]()
    head = nn.Linear(shape[-1], 2) if regions else nn.Identity()  # makes it a region
    model = with_statistics(nn.Sequential(layer, norm, nn.ReLU()))
    x = torch.randn(shape)
    wanted = model(x)
    before = [p.requires_grad for p in layer.parameters()]
    ranks = {id(norm): {len(shape)}}
    regions = regions and isinstance(layer, nn.Linear)
    rows = fold(nn.Sequential(model, head), regions=regions, ranks=ranks)
    assert [row.action for row in rows] == ["fused"]
    assert model[0] is layer and isinstance(model[1], FoldedNorm)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert before and all(p.requires_grad for p in layer.parameters())
    assert close(model(x), wanted)


@pytest.mark.parametrize("regions", [True, False])
def test_a_model(regions: bool) -> None:
    model, x = with_statistics(Functional()), images(2)
    wanted = model(x)
    rows = fold(model, regions=regions)
    assert [(row.layers, row.what, row.action) for row in rows] == [
        (("first.0",), "first.1 (BatchNorm2d)", "fused"),
        (("second.0",), "second.1 (BatchNorm2d)", "fused"),
    ]
    assert close(model(x), wanted)


class Once(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Twice(nn.Module):
    """The convolution is called twice, or its output has another reader."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "layer":
            return self.norm(self.conv(self.conv(x)))
        if self.way == "norm":
            return self.norm(self.norm(self.conv(x)))
        y = self.conv(x)
        return self.norm(y) + y


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("way", ["layer", "norm", "output"])
def test_shared_modules_and_values_stay(way: str, regions: bool) -> None:
    model, x = with_statistics(Twice(way)), images(2)
    wanted = model(x)
    rows = fold(model, regions=regions)
    assert [row.action for row in rows] == ["not fused"]
    assert rows[0].reason
    assert type(model.norm) is nn.BatchNorm2d and torch.equal(model(x), wanted)


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_other_methods_may_call_the_pair(apart: bool, regions: bool) -> None:
    class Methods(Once):
        def features(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.conv(x)))

    class Apart(Once):
        def features(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x))

    model, x = with_statistics(Apart() if apart else Methods()), images(2)
    wanted = model.features(x)
    rows = fold(model, regions=regions)
    assert [row.action for row in rows] == ["not fused" if apart else "fused"]
    assert close(model.features(x), wanted)


def tied(model: Any) -> None:
    model.other = nn.Conv2d(3, 3, 1)
    model.other.weight = model.conv.weight


def hooked(model: Any) -> None:
    model.conv.register_forward_hook(lambda module, args, output: None)


def without_statistics(model: Any) -> None:
    model.norm = nn.BatchNorm2d(3, track_running_stats=False).eval()


def half(model: Any) -> None:
    model.to(torch.bfloat16)


def other_size(model: Any) -> None:
    model.norm = nn.BatchNorm2d(4).eval()


def infinite(model: Any) -> None:
    model.norm.running_var.fill_(float("nan"))


REASONS = {
    tied: "shares a parameter",
    hooked: "a hook sees the output",
    without_statistics: "no running statistics",
    half: "would round more",
    other_size: "a batch norm of 4 channels after 3",
    infinite: "differs by",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("regions", [True, False])
def test_reasons(change: Callable[[Any], None], regions: bool) -> None:
    model = with_statistics(Once())
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = fold(model, regions=regions)
    assert [row.action for row in rows] == ["not fused"]
    assert REASONS[change] in rows[0].reason
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before if "var" not in name)


@pytest.mark.parametrize("make", [Functional, UNet, Nested], ids=lambda make: make.__name__)
def test_to_float_keeps_the_values_and_says_that_norms_stay_folded(
    make: Callable[[], nn.Module],
) -> None:
    model, x = with_statistics(make()), images(2)
    wanted = model(x)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    report = torchquant.prepare_(model)
    assert [row.action for row in report.foldings] == ["fused"] * norms
    report = torchquant.to_float_(model)
    assert f"{norms} batch norms stay part of the layers before them." in report.notes
    assert sum(isinstance(module, FoldedNorm) for module in model.modules()) == norms
    assert close(model(x), wanted)
    assert not torchquant.prepare_(model).foldings
