"""hqq_: the verb gives layers the integers of the pure function, and leaves nothing behind."""

import pytest
import torch
from torch import nn

import torchquant
from torchquant import IntxWeightOnlyConfig, hqq_
from torchquant.algorithms import hqq as verb
from torchquant.algorithms.half_quadratic import hqq
from torchquant.convert.adjustment import is_adjusted

CONFIG = IntxWeightOnlyConfig(3, group_size=32, symmetric=False)


class Tied(nn.Module):
    """An embedding and an output layer with one weight, and a norm."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(96, 64)
        self.norm = nn.LayerNorm(64)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.norm(self.body(self.table(ids))))


def test_layers_get_the_integers_of_the_pure_function():
    torch.manual_seed(0)
    model = Tied()
    weights = {"body": model.body.weight.clone(), "table": model.table.weight.clone()}
    report = hqq_(model, CONFIG)
    for name, weight in weights.items():
        found = hqq(weight, CONFIG.weights)
        layer = model.get_submodule(name)
        assert torch.equal(layer.integers, found.qweight)
        assert torch.equal(layer.qweight_scale, found.scale)
        assert torch.equal(layer.qweight_zero_point, found.zero_point)
        assert 0 < report[name].error < report[name].nearest_error
    assert torch.equal(model.head.integers, model.table.integers)
    assert any("One quantized weight for tied layers" in note for note in report.notes)
    assert [row.name for row in report.rows] == ["table", "body", "head"]
    assert report.summary().startswith("3 compressed, 0 left; 9")
    assert model(torch.arange(4)[None]).isfinite().all()


def test_integers_beside_dynamic_activations():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    config = torchquant.Int8DynamicActivationIntxWeightConfig(4, group_size=32)
    found = hqq(model[0].weight, config.weights)
    report = hqq_(model, config)
    assert torch.equal(model[0].integers, found.qweight)
    assert (report["2"].action, report["2"].reason) == ("left", "too small to benefit")


def test_a_convolution():
    config = torchquant.IntxActivationIntxWeightConfig(4)
    model = nn.Sequential(nn.Conv2d(64, 64, 3))
    found = hqq(model[0].weight.flatten(1), config.weights)
    hqq_(model, config, filter_fn="0", strict=True)
    assert torch.equal(model.state_dict()["0.qweight"].flatten(1), found.qweight)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_model_as_it_was(monkeypatch, error):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    calls = []

    def stop(weight, weights, **options):
        calls.append(weight)
        if len(calls) == 3:  # the first call checks the arguments
            raise error
        return hqq(weight, weights, **options)

    monkeypatch.setattr(verb, "hqq", stop)
    with pytest.raises(error):
        hqq_(model, CONFIG)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert not any(is_adjusted(layer) for layer in model)


def test_bad_arguments_leave_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(64, 64))
    for options, message in (
        ({"norm": 2}, "norm must be more than 0 and at most 1, got 2"),
        ({"iterations": -1}, "iterations must be an integer of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            hqq_(model, CONFIG, **options)
    with pytest.raises(TypeError, match="hqq_: config must be a torchquant configuration"):
        hqq_(model, 4)
    with pytest.raises(ValueError, match="hqq_: config must have dynamic activations"):
        hqq_(model, torchquant.Int8StaticActivationInt8WeightConfig())
    assert type(model[0]) is nn.Linear
