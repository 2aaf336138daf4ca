"""Calls in Python before, between and after programs read and change what they do in float."""

from collections.abc import Callable, Iterator

import pytest
import torch
from support.chain_models import images
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant
from torchquant.chains.region import region_of

Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Three convolutions of 8 channels, whose forward is given."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(8, 16)
        self.mish = nn.Mish(inplace=True)
        type(self).forward = forward  # type: ignore[method-assign, assignment]


def in_place_method(self: Net, x: Tensor) -> Tensor:
    a = F.mish(self.a(x))
    b = self.b(a)
    c = a.neg_()
    return self.c(b) + c


def in_place_module(self: Net, x: Tensor) -> Tensor:
    a = F.relu(self.a(x))
    b = self.b(a)
    return self.c(b) + self.mish(a)


def reads_the_input(self: Net, x: Tensor) -> Tensor:
    return self.a(x) + x


def chooses_by_the_input(self: Net, x: Tensor) -> Tensor:
    return torch.where(x > 0, self.b(F.relu(self.a(x))), 0 * x)


def ends_with_a_view(self: Net, x: Tensor) -> Tensor:
    x = F.adaptive_avg_pool2d(F.relu(self.a(x)), 1).flatten(1)
    x = self.head(x)
    return x.view(x.size(0), -1)


FORWARDS = [
    in_place_method,
    in_place_module,
    reads_the_input,
    chooses_by_the_input,
    ends_with_a_view,
]


@pytest.mark.filterwarnings("ignore:calibrate. layers without a range")
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_values(forward: Forward) -> None:
    class Own(Net):  # each has a forward of its own
        pass

    model, x = Own(forward).eval(), torch.cat([images(4, 8, seed) for seed in range(3)], 1)[:, :8]
    with torch.no_grad():
        wanted = model(x.clone())
        torchquant.prepare_(model, filter_fn=lambda module, name: True)
        torchquant.calibrate(model, [x], progress=False)
        torchquant.convert_(model)
        got = model(x.clone())
        region = region_of(model)
        assert region is not None and region._programs is not None and region._programs.ready
        with model.a.register_forward_hook(lambda module, args, output: None):
            assert torch.equal(model(x.clone()), got)  # the interpreter
    if forward is not chooses_by_the_input:  # an input close to 0 is 0 in int8: the choice changes
        assert float((got - wanted).abs().max() / wanted.abs().max()) < 0.05


def test_an_interrupted_calibration_leaves_the_observers_as_they_were() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval(), images(2)
    config = torchquant.Int8StaticActivationInt8WeightConfig(observer="minmax")

    def interrupted() -> Iterator[Tensor]:
        yield x
        yield x * 100
        raise KeyboardInterrupt

    torchquant.prepare_(model, config, filter_fn=["0", "2"])
    with pytest.raises(KeyboardInterrupt):
        torchquant.calibrate(model, interrupted(), progress=False)
    report = torchquant.calibrate(model, [x], progress=False)
    assert report["0"].observed == (float(x.min()), float(x.max()))


def test_preparation_in_inference_mode() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval(), images(2)
    with torch.inference_mode():
        torchquant.prepare_(model, filter_fn=["0", "2"])
    torchquant.calibrate(model, [x], progress=False)
    report = torchquant.convert_(model)
    assert [row.action for row in report.layers] == ["converted", "converted"]


@pytest.mark.parametrize("training", [True, False])
def test_no_images(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    torchquant.prepare_qat_(model, filter_fn="0")
    model(images(2))
    assert model.train(training)(torch.zeros(0, 3, 8, 8)).shape == (0, 8, 6, 6)


def test_arguments_equal_to_their_defaults_keep_the_program() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor, alpha: float = 0.5) -> Tensor:
            return self.b(F.relu(self.a(x)) * alpha)

    model, x = Scaled().eval(), images(2)
    torchquant.prepare_(model, filter_fn=["a", "b"])
    torchquant.calibrate(model, [x], progress=False)
    torchquant.convert_(model)
    with torch.no_grad():
        wanted, other = model(x), model(x, 2.0)
        assert torch.equal(model(x, alpha=float("0.5")), wanted)
        assert not torch.allclose(other, wanted)
