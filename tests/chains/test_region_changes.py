"""Regions of prepared models, and converted models that somebody changes."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.chain_models import (
    Functional,
    images,
    with_statistics,
)
from support.chains import CONFIG, converted
from torch import Tensor, nn

import torchquant
from torchquant.chains.region import RegionForward
from torchquant.convert.regions import regions_in
from torchquant.nn import QuantizedConv2d, QuantizedLinear


def replace_conv(model: Any) -> None:
    model.third = nn.Conv2d(32, 16, 1).eval()


def add_attribute(model: Any) -> None:
    model.third = nn.Sequential(model.third)


def train(model: Any) -> None:
    model.train()


class Dropping(Functional):
    """Its results depend on the mode, at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first.append(nn.Dropout(0.0))
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.drop(x) if self.training else x)


def train_root(model: Any) -> None:
    model.training = True


def train_dropout(model: Any) -> None:
    model.first[2].train()


@pytest.mark.parametrize("change", [replace_conv, add_attribute, train_root, train_dropout, train])
@pytest.mark.parametrize("copied", [False, True])
def test_changes_are_respected(change: Callable[[Any], None], copied: bool) -> None:
    model, x, _ = converted(Dropping)
    if copied:
        model = copy.deepcopy(model)
    change(model)
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match=r"the values between its layers are float"):
            got = model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(model(x), got)  # one warning
            wanted = Dropping.forward(model, x)  # type: ignore[arg-type]
    assert torch.equal(got, wanted)


def test_a_mode_that_nothing_reads_changes_nothing() -> None:
    model, x, _ = converted(Functional)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = model(x)
        assert torch.equal(model.train()(x), wanted)
    (region,) = regions_in(model)
    assert region._programs is not None and region._programs.holds()


def test_a_change_that_is_taken_back_is_no_change() -> None:
    model, x, _ = converted(Dropping)
    with torch.no_grad():
        wanted = model(x)
        model.train()
        with pytest.warns(RuntimeWarning, match="training mode"):
            model(x)
        model.eval()
        assert torch.equal(model(x), wanted)


def test_attributes_that_the_forward_reads() -> None:
    class Scaled(Functional):
        factor: float

        def __init__(self) -> None:
            super().__init__()
            self.steps = 1

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.steps):
                x = torch.relu(self.first(x))
            return self.third(torch.cat([x, self.second(x)], 1))

    model, x, _ = converted(Scaled)
    model.steps = 0
    with (
        torch.no_grad(),
        pytest.warns(RuntimeWarning, match=r"Scaled.steps was changed"),
        pytest.raises(ValueError, match="channels"),  # as in the forward of the class
    ):
        model(x)


def test_other_arguments_run_the_forward_of_the_class() -> None:
    class Optional(Functional):
        def forward(self, x: Tensor, scale: float = 1.0, *, flag: bool = False) -> Tensor:
            x = torch.relu(self.first(x)) * scale
            return self.third(torch.cat([x, self.second(x)], 1))

    model, x, _ = converted(Optional)
    with torch.no_grad():
        usual = model(x)
        assert torch.equal(model(x, 1.0), usual) and torch.equal(model(x=x, flag=False), usual)
        other = model(x, 2.0)
        assert torch.equal(other, Optional.forward(model, x, 2.0))  # type: ignore[arg-type]


def test_to_float_removes_regions() -> None:
    model, x, wanted = converted(Functional)
    torchquant.to_float_(model)
    assert not regions_in(model) and "chain_scale" not in model.state_dict()
    with torch.no_grad():
        assert (model(x) - wanted).norm() < 0.05 * wanted.norm()


def test_prepared_models_compute_the_same() -> None:
    model, x = with_statistics(Functional()), images(2)
    with torch.no_grad():
        wanted = model(x)
        torchquant.prepare_(model, CONFIG, example_inputs=x[:1])
        (region,) = regions_in(model)
        assert isinstance(region, RegionForward) and region.plan is not None
        torch.testing.assert_close(model(x), wanted)
        other = copy.deepcopy(model)
        for one in (model, other):
            torchquant.calibrate(one, [x])
            torchquant.convert_(one)
        assert torch.equal(model(x), other(x))
    assert isinstance(model.third, QuantizedConv2d)


def test_layers_without_range_leave_the_region() -> None:
    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
            self.third = nn.Conv2d(16, 16, 3)
            self.second.weight.data.zero_()
            self.second.bias.data.zero_()

        def forward(self, x: Tensor) -> Tensor:
            return self.third(torch.relu(self.second(torch.relu(self.first(x)))))

    model, x = Zero().eval(), images(2)
    torchquant.prepare_(model, CONFIG)
    with pytest.warns(RuntimeWarning, match="third"):
        torchquant.calibrate(model, [x])
    report = torchquant.convert_(model)
    assert [row.action for row in report.layers] == ["converted", "converted", "skipped"]
    (region,) = regions_in(model)
    assert region.plan is not None and set(region.plan.layers) == {"first", "second"}
    with torch.no_grad():
        assert torch.equal(model(x), model.third.bias.reshape(1, -1, 1, 1).expand(2, 16, 26, 26))


def test_random_calls_stay_random() -> None:
    class Noisy(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.nn.functional.dropout(x, 0.5))

    model, x, _ = converted(Noisy)
    (region,) = regions_in(model)
    assert region.plan is not None and len(region.plan.layers) == 4
    with torch.no_grad():
        torch.manual_seed(0)
        first = model(x)
        assert not torch.equal(model(x), first)
        torch.manual_seed(0)
        assert torch.equal(model(x), first)


def test_a_record_with_other_results_is_dropped() -> None:
    class Asks(Functional):
        """A placeholder of the record is no tensor."""

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            if isinstance(x, Tensor):
                y = y + 1
            return self.third(torch.cat([y, y], 1))

    model, x = with_statistics(Asks()), images(2)
    torchquant.prepare_(model, CONFIG)
    torchquant.calibrate(model, [x])
    report = torchquant.convert_(model)
    assert "give other results" in report.regions[0].reason
    assert str(report.regions[0]).startswith("float between the layers of the model (Asks)")
    assert not regions_in(model) and isinstance(model.third, QuantizedConv2d)
    with torch.no_grad():
        assert torch.equal(model(x), Asks.forward(model, x))  # type: ignore[arg-type]


def test_float_layers_of_a_region_can_be_quantized_later() -> None:
    model, x = with_statistics(Functional()), images(3)
    torchquant.prepare_(model, CONFIG, filter_fn=lambda module, name: name != "fc")
    torchquant.calibrate(model, [x])
    torchquant.convert_(model)
    assert type(model.fc) is nn.Linear
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = model(x)
        torchquant.quantize_(model, filter_fn="fc")
        assert isinstance(model.fc, QuantizedLinear)
        got = model(x)
        assert 0 < (got - wanted).abs().max() < 0.05
        torchquant.to_float_(model)


def test_a_calibration_that_fails_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model, x = with_statistics(Functional()), images(2)
    other = copy.deepcopy(model)
    torchquant.prepare_(model, CONFIG)
    (region,) = regions_in(model)
    with pytest.raises(RuntimeError):
        torchquant.calibrate(model, [x, torch.zeros(1, 5, 4, 4)])
    assert region.plan is None and not region.observers and not region.observing
    torchquant.calibrate(model, [x])
    torchquant.prepare_(other, CONFIG)
    torchquant.calibrate(other, [x])
    for one in (model, other):
        torchquant.convert_(one)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


def test_a_second_preparation_covers_all_layers() -> None:
    torch.manual_seed(0)
    model, x = with_statistics(Functional()), images(2)
    torchquant.prepare_(model, CONFIG, filter_fn="first.*")
    (first,) = regions_in(model)
    torchquant.prepare_(model, CONFIG, filter_fn=["second.*", "third", "fc"])
    (region,) = regions_in(model)
    assert region is not first
    assert set(region.activations) == {"first.0", "second.0", "third", "fc"}
    torchquant.calibrate(model, [x])
    report = torchquant.convert_(model)
    assert report.regions[0].share == 1.0 and not report.regions[0].breaks
