"""BatchNorm1d normalizes dimension 1 of two kinds of inputs, and a layer stands for one of them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chain_models import with_statistics
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant
from torchquant.graph.ranks import ranks
from torchquant.graph.trace import trace
from torchquant.nn.folded_norm import FoldedNorm

UNKNOWN = "its input may have 2 or 3 dimensions, of which only 2 allow it; pass example_inputs"
OTHER = "the batch norm normalizes dimension 1 of 3, which is not that of the outputs"


def every(module: nn.Module, name: str) -> bool:
    return True


def linear() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)
    return with_statistics(nn.Sequential(*layers))


@pytest.mark.parametrize(
    ("example", "reason"),
    [(None, UNKNOWN), (torch.randn(4, 16, 16), OTHER), (torch.randn(4, 16), "")],
    ids=["unknown", "three", "two"],
)
def test_a_norm_after_a_linear_layer(example: Any, reason: str) -> None:
    model = linear()
    reference = copy.deepcopy(model)
    (row,) = torchquant.prepare_(model, None, example, filter_fn=every).foldings
    assert row.reason == reason
    for shape in [(4, 16)] if not reason else [(4, 16), (4, 16, 16)]:
        x = torch.randn(shape)
        wanted = reference(x)
        assert (model(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_other_dimensions_are_refused_later(tmp_path: Path) -> None:
    model, x = linear(), torch.randn(8, 16)
    torchquant.prepare_(model, None, x, filter_fn=every)
    message = r"FoldedNorm: input must have 2 dimensions.*\[4, 16, 16\]; pass such inputs"
    wrong = torch.randn(4, 16, 16)
    with pytest.raises(ValueError, match=message):
        model(wrong)
    torchquant.calibrate(model, [x])
    torchquant.convert_(model)
    path = tmp_path / "model.safetensors"
    torchquant.save(model, path)
    loaded = torchquant.load(path, linear())
    with torch.inference_mode():
        for one in (model, copy.deepcopy(model), loaded):
            assert torch.equal(one(x), model(x))
            with pytest.raises(ValueError, match=message):
                one(wrong)


def test_a_convolution_without_a_batch_is_refused() -> None:
    model = with_statistics(nn.Sequential(nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.ReLU()))
    (row,) = torchquant.prepare_(model, filter_fn=every).foldings
    assert row.action == "fused"
    assert model(torch.randn(2, 8, 5)).shape == (2, 8, 5)
    with pytest.raises(ValueError, match=r"must have 3 dimensions.*\[8, 8\]"):
        model(torch.randn(8, 8))


@pytest.mark.parametrize(
    "layers",
    [(nn.Linear(4, 6), nn.BatchNorm2d(6)), (nn.Conv2d(6, 6, 1), nn.BatchNorm1d(6))],
    ids=["linear", "convolution"],
)
def test_a_norm_for_other_dimensions_stays(layers: tuple[nn.Module, ...]) -> None:
    model = with_statistics(nn.Sequential(*layers))
    (row,) = torchquant.prepare_(model, filter_fn=every).foldings
    names = [type(layer).__name__ for layer in layers]
    assert row.reason == f"a {names[1]} after a {names[0]}"


class Head(nn.Module):
    """The record shows the dimensions of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.norm = nn.Conv2d(3, 8, 3), nn.Linear(8, 6), nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 2)


class Flattened(Head):
    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(F.relu(self.conv(x)), 1).flatten(1)
        return self.last(F.relu(self.norm(self.fc(x))))


class Viewed(Head):
    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(F.relu(self.conv(x)), 1)
        return self.last(F.relu(self.norm(self.fc(x.view(x.size(0), -1)))))


class Averaged(Head):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.norm(self.fc(F.relu(self.conv(x)).mean([2, 3])))))


@pytest.mark.parametrize("head", [Flattened, Viewed, Averaged])
def test_the_record_shows_two_dimensions(head: type[Head]) -> None:
    model = with_statistics(head())
    reference = copy.deepcopy(model)
    (row,) = torchquant.prepare_(model, filter_fn=every).foldings
    assert row.action == "fused" and isinstance(model.norm, FoldedNorm)
    x = torch.randn(2, 3, 8, 8)
    assert (model(x) - reference(x)).abs().max() <= 1e-5 * reference(x).abs().max()


def test_dimensions_that_the_record_does_not_show() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.transpose(0, 1)) + self.fc(x.reshape(2, 2, 4)).mean(dim=1)

    net = Net()
    found = ranks(trace(net, lambda module: True), net)
    assert found == [None, None, None, 3, 3, None, None]
