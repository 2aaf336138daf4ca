"""Files of models with regions: what load checks before it changes the model."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chain_models import Decides, Functional, Sequence, Shared, images, with_statistics
from torch import Tensor, nn

import torchquant
from torchquant.convert.regions import regions_in

CONFIG = torchquant.Int8StaticActivationInt8WeightConfig(observer="minmax")


def saved(cls: Callable[[], nn.Module], path: Path) -> tuple[nn.Module, Tensor]:
    model, x = with_statistics(cls()), images(2)
    torchquant.prepare_(model, CONFIG)
    torchquant.calibrate(model, [x.flatten(2)[:, :, :50] if cls is Sequence else x])
    torchquant.convert_(model)
    torchquant.save(model, path)
    return model, x


@pytest.mark.parametrize("cls", [Functional, Shared, Decides])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("training", [False, True])
def test_round_trip(
    cls: Callable[[], nn.Module], device: str, training: bool, tmp_path: Path
) -> None:
    model, x = saved(cls, tmp_path / "file")
    with torch.device(device):
        other = cls().train(training)
    torchquant.load(tmp_path / "file", other)
    assert [region.name for region in regions_in(other)] == [
        region.name for region in regions_in(model)
    ]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = model(x)
        assert torch.equal(other.eval()(x), wanted)
        torchquant.load(tmp_path / "file", other)  # into a converted model
        assert torch.equal(other(x), wanted)
    torchquant.save(other, tmp_path / "again")
    third = torchquant.load(tmp_path / "again", cls().eval())
    with torch.no_grad():
        assert torch.equal(third(x), wanted)


class OwnForward(nn.Linear):
    """A linear layer whose class has a forward of its own, as timm's has."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


class WithOwnForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 64, 3), OwnForward(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean([2, 3]))


def test_layers_of_derived_classes_are_in_the_chain(tmp_path: Path) -> None:
    model, x = saved(WithOwnForward, tmp_path / "file")
    (region,) = regions_in(model)
    assert {call.target for call in region.trace.calls} >= {"conv", "head"}
    assert len(region.plan.layers) == 2
    other = torchquant.load(tmp_path / "file", WithOwnForward().eval())
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


class Other(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Untraceable(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


MISFITS = {
    Other: "makes other calls than the one that was saved",
    Untraceable: "the forward of the model cannot be followed: what its forward does depends",
}


@pytest.mark.parametrize("cls", MISFITS)
def test_a_forward_that_does_not_fit(cls: Any, tmp_path: Path) -> None:
    saved(Functional, tmp_path / "file")
    model = cls().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=MISFITS[cls]):
        torchquant.load(tmp_path / "file", model)
    after = model.state_dict()
    assert before.keys() == after.keys() and "forward" not in vars(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert type(model.third) is nn.Conv2d


def test_a_float_file_does_not_fit_a_converted_model(tmp_path: Path) -> None:
    model, x = saved(Functional, tmp_path / "file")
    torchquant.save(with_statistics(Functional()), tmp_path / "float")
    with torch.no_grad():
        wanted = model(x)
        with pytest.raises(ValueError, match="does not fit the model"):
            torchquant.load(tmp_path / "float", model)
        assert torch.equal(model(x), wanted)


class Pooled(nn.Module):
    """Its record depends on numbers that no layer holds."""

    def __init__(self, stride: int = 1, factor: float = 2.0, swap: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.stride, self.factor, self.swap = stride, factor, swap

    def forward(self, x: Tensor) -> Any:
        y = nn.functional.avg_pool2d(self.first(x), 3, self.stride, 1)
        z = self.second(torch.relu(y * self.factor))
        return (y, z) if self.swap else (z, y)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"stride": 2},
            r"call 2 \(.*avg_pool2d\) with the arguments \(#1, 3, 2, 1\), the file with "
            r"\(#1, 3, 1, 1\)",
        ),
        ({"factor": 3.0}, r"call 3 .* with the arguments \(#2, 3.0\), the file with \(#2, 2.0\)"),
        ({"swap": True}, "returns other results than the one that was saved"),
    ],
    ids=["stride", "factor", "result"],
)
def test_the_arguments_of_calls_are_compared(
    other: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, x = saved(Pooled, tmp_path / "file")
    same = torchquant.load(tmp_path / "file", Pooled().eval())
    with torch.no_grad():
        assert all(map(torch.equal, same(x), model(x)))
    with pytest.raises(ValueError, match=message):
        torchquant.load(tmp_path / "file", Pooled(**other).eval())
