"""prepare_, calibrate, convert_ on convolutions: the layers of the observed range, bit for bit."""

import warnings

import pytest
import torch
from support import assert_same_bits, floats
from support.calibrated_models import (
    CALIBRATIONS,
    assert_layers_are,
    expected_layer,
    inputs_of,
    static,
)
from support.layers import outcome, unchanged
from torch import Tensor, nn

from torchquant import Fusion, calibrate, convert_, prepare_
from torchquant.nn.kinds import kind_of


def cnn(seed: int = 0) -> nn.Sequential:
    """Dense, grouped, depthwise and pointwise convolutions, and a linear layer."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 1, bias=False),
        nn.Conv2d(64, 32, 3, padding="same", groups=4),
        nn.Flatten(),
        nn.Linear(32 * 36, 10),
    )


def images(count: int = 2, seed: int = 0) -> list[Tensor]:
    return [floats(2 + i, 3, 12, 12, seed=seed + i).clamp(-20, 20) for i in range(count)]


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_converted_convolutions_have_the_observed_range(name: str) -> None:
    model, batches, config = cnn().eval(), images(), static(observer=name)
    inputs = inputs_of(model, batches, lambda model, batch: model(batch))
    expected = {
        path: expected_layer(model.get_submodule(path), config, seen)
        for path, seen in inputs.items()
    }
    assert len(expected) == 5
    reference = cnn().eval()
    for path, layer in expected.items():
        reference[int(path)] = layer
    report = prepare_(model, config, batches[0], filter_fn="*")
    assert set(outcome(report).values()) == {"prepared"}
    labels = torch.zeros(3)
    calibration = calibrate(model, [(batch, labels) for batch in batches])
    assert (calibration.batches, calibration.samples) == (2, 5)
    convert_(model, fusion=Fusion(False, False))
    assert_layers_are(model, expected)
    with torch.no_grad():
        for batch in images(3, seed=9):
            assert_same_bits(model(batch), reference(batch))


def test_images_with_nan_are_reported_and_change_no_range() -> None:
    clean, spoilt = cnn(), cnn()
    for model in (clean, spoilt):
        prepare_(model, filter_fn="0")
    batch = images(1)[0]
    broken = batch.clone()
    broken[0, 0, 0, 0] = torch.nan
    calibrate(clean, [batch])
    calibrate(clean, [torch.cat([batch[1:], batch[1:]])])
    with pytest.warns(RuntimeWarning, match="HistogramObserver of 0: 1 values were NaN"):
        report = calibrate(spoilt, [broken, batch])
    assert report.nonfinite == {"0": 1}
    assert report["0"].observed == (float(batch.min()), float(batch.max()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        only = cnn()
        prepare_(only, filter_fn="0")
        with unchanged(only), pytest.raises(ValueError, match="0: it saw no finite values"):
            calibrate(only, [torch.full((1, 3, 12, 12), torch.nan)])


def test_every_kind_of_layer_is_prepared_by_the_same_code() -> None:
    model = nn.ModuleDict(
        {"one": nn.Conv1d(64, 64, 3), "two": nn.Conv2d(64, 64, 3), "none": nn.Conv3d(8, 8, 3)}
    )
    report = prepare_(model)
    assert outcome(report) == {"one": "prepared", "two": "prepared"}
    assert [row.name for row in report.others] == ["none"]
    assert kind_of(model["none"]) is None
    with pytest.raises(ValueError, match=r"none: Conv3d, no integer path yet; selected"):
        prepare_(nn.ModuleDict({"none": nn.Conv3d(8, 8, 3)}), filter_fn="none", strict=True)
