"""Batch norms of derived classes that apply modules of their own afterwards, as timm's do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.chain_models import images, with_statistics
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant
from torchquant.convert.fold import is_outdated
from torchquant.convert.regions import find
from torchquant.nn.folded_norm import FoldedNorm


class NormAct(nn.BatchNorm2d):
    """A batch norm with an activation of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU6()

    def forward(self, input: Tensor) -> Tensor:
        x = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps
        )
        return self.act(self.drop(x))


class Doubled(NormAct):
    """Computes more than its parts say."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Net(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 64, 3, bias=False), norm(64)
        self.second, self.head = nn.Conv2d(64, 64, 3), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return self.head(torch.relu(self.second(y)).mean([2, 3]))


class ReadsTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.norm(x) + x
        return self.head(torch.relu(self.second(y)).mean([2, 3]))


def test_its_modules_stay_and_are_applied(tmp_path: Path) -> None:
    model, x = with_statistics(Net(NormAct)), images(2)
    act, wanted = model.norm.act, model(x)
    report = torchquant.prepare_(model)
    assert [str(row) for row in report.fusions] == ["fused: conv with norm (NormAct)"]
    assert isinstance(model.norm, FoldedNorm) and model.norm.act is act
    assert bool((model(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max())
    torchquant.calibrate(model, [x])
    (region,) = torchquant.convert_(model).regions
    assert not region.breaks
    got = model(x)
    calls: list[Tensor] = []
    with act.register_forward_hook(lambda module, args, output: calls.append(output)):
        assert torch.equal(model(x), got)
    assert len(calls) == 1 and calls[0].max() <= 6
    path = tmp_path / "net.safetensors"
    torchquant.save(model, path)
    loaded = Net(NormAct).eval()
    torchquant.load(path, loaded)
    assert isinstance(loaded.norm, FoldedNorm) and torch.equal(loaded(x), got)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Net(Doubled), "Doubled computes more than a batch norm and its own modules"),
        (ReadsTwice(NormAct), "the output of the layer has other readers"),
    ],
    ids=["computes more", "read twice"],
)
def test_others_stay(model: Net, reason: str) -> None:
    model = with_statistics(model)
    x, norm = images(2), model.norm
    wanted = model(x)
    (row,) = torchquant.prepare_(model).fusions
    assert row.action == "not fused" and row.reason == reason
    assert model.norm is norm and torch.equal(model(x), wanted)
    (region,) = find(model, lambda module: isinstance(module, nn.Conv2d)).regions
    assert not is_outdated(region)
