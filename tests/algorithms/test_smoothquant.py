"""smoothquant_: factors, the search, what is left, and restoring."""

import copy
import math

import pytest
import torch
from support.fold_models import Block, Decoder, GainNorm, filled, rows, tokens
from torch import nn

import torchquant
from torchquant import smoothquant_
from torchquant.algorithms import (
    output_difference,
    smoothing_error,
    smoothing_factors,
    smoothquant,
)
from torchquant.configs import Dynamic, QuantizationConfig, Static, Weights


def state(model):
    return copy.deepcopy(model.state_dict())


def same(model, before):
    return all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def outliers(model):
    """A model whose norms have channels with much larger gains."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter[3] = 60.0
    return model


# The factors


def test_factors_are_those_of_the_paper_up_to_a_common_factor():
    inputs, weights = torch.tensor([16.0, 1.0, 4.0]), torch.tensor([1.0, 9.0, 2.0])
    for alpha in (0.0, 0.3, 0.5, 1.0):
        expected = inputs.double() ** alpha / weights.double() ** (1 - alpha)
        factors = smoothing_factors(inputs, weights, alpha)
        assert torch.allclose(factors / expected, factors[0] / expected[0])
        assert math.isclose(float(factors.log().mean()), 0, abs_tol=1e-12)


def test_channels_without_values_or_weights_keep_their_scale():
    inputs = torch.tensor([16.0, 0.0, 4.0, float("inf"), float("nan")])
    factors = smoothing_factors(inputs, torch.tensor([1.0, 3.0, 0.0, 1.0, 1.0]), 0.5)
    assert factors.tolist() == [1.0] * 5
    assert smoothing_factors(torch.zeros(2), torch.ones(2), 0.5).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("activations", [Dynamic(), Dynamic(symmetric=True), Static(), None])
@pytest.mark.parametrize("weights", [Weights(), Weights(4, False)])
def test_the_error_is_that_of_quantized_values(weights, activations):
    x, weight = rows(20, 32), rows(8, 32, seed=2)
    x[:, 3] *= 30
    config = QuantizationConfig(weights, activations)
    error = smoothing_error(x, weight, torch.ones(32), config)
    factors = smoothing_factors(x.abs().amax(0), weight.abs().amax(0), 0.5)
    assert 0 < error < 1
    if activations is not None and weights.bits == 8:
        assert smoothing_error(x, weight, factors, config) < error / 2
    expected = x @ weight.t()
    assert smoothing_error(x, weight, torch.ones(32), config, expected) == error


# The verb


@pytest.mark.parametrize(
    ("alpha", "norm"),
    [
        (0.0, GainNorm),
        (0.5, GainNorm),
        (0.5, nn.LayerNorm),
        (0.5, lambda width: GainNorm(width, 1.0)),
        (1.0, GainNorm),
        (None, nn.LayerNorm),
    ],
)
def test_a_decoder_computes_the_same_on_other_batches(alpha, norm):
    model = outliers(filled(Decoder(norm)))
    other = tokens(3, 7, seed=5)
    expected, before = model(other), state(model)
    report = smoothquant_(model, [tokens(2, 9), tokens(4, 5)], alpha=alpha)
    assert output_difference([expected], [model(other)]) < 1e-5
    assert report.difference < 1e-5 and not same(model, before)
    assert [row.action for row in report] == ["smoothed"] * 15
    assert report["blocks.0.mlp.down"].reason == "after blocks.0.mlp.up"
    if alpha == 1.0:
        assert all(abs(row.peak_after - 1) < 1e-4 for row in report if "head" in row.name)


@torch.no_grad()
def test_quantized_outputs_are_nearer_to_the_float_outputs():
    model = outliers(filled(Decoder()))
    x = tokens(4, 12, seed=7)
    expected = model(x)

    def error(model):
        torchquant.quantize_(model, filter_fn=lambda module, name: True)
        return float((model(x) - expected).square().mean())

    plain = error(copy.deepcopy(model))
    smoothed = copy.deepcopy(model)
    smoothquant_(smoothed, [tokens(4, 12)], alpha=0.5)
    searched = copy.deepcopy(model)
    report = smoothquant_(searched, [tokens(4, 12)])
    errors = error(smoothed), error(searched)
    assert errors[0] < plain / 2 and errors[1] < plain / 8, (plain, errors)
    assert len({row.alpha for row in report}) > 1


def test_the_search_finds_the_least_error_of_the_layers():
    model = filled(nn.Sequential(GainNorm(16), nn.Linear(16, 24)))
    model[0].weight.data[3] = 60.0
    x = rows(32, 16)  # more would be sampled
    normed, weight = model[0](x).detach(), model[1].weight.detach().clone()
    report = smoothquant_(model, [x])
    reading, errors = weight.abs().amax(0), {}
    for magnitudes in (normed.abs().amax(0), normed.square().mean(0).sqrt()):
        for step in range(11):
            factors = smoothing_factors(magnitudes, reading, step / 10)
            error = smoothing_error(normed, weight, factors, QuantizationConfig())
            errors[error] = step / 10, factors
    alpha, factors = errors[min(errors)]
    assert report["1"].alpha == alpha
    assert torch.allclose(model[1].weight, weight * factors.float(), rtol=1e-4)


def test_factors_that_do_not_lower_the_error_are_left():
    model = filled(nn.Sequential(GainNorm(8), nn.Linear(8, 8)))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[1].weight.copy_(torch.eye(8))
    before = state(model)
    signs = rows(64, 8).sign()
    report = smoothquant_(model, [signs])
    assert report["1"].reason == "after 0; no factors lower its error"
    assert report["1"].action == "left" and same(model, before)


def test_small_tokens_count_as_much_as_large_ones():
    x, weight = rows(2, 32), rows(8, 32, seed=2)
    both = torch.cat([x, 1000 * x])
    one = smoothing_error(x, weight, torch.ones(32), QuantizationConfig())
    two = smoothing_error(both, weight, torch.ones(32), QuantizationConfig())
    assert math.isclose(one, two, rel_tol=0.05)


def test_ranges_of_all_batches_count():
    model = filled(nn.Sequential(GainNorm(16), nn.Linear(16, 24)))
    one = rows(4, 16)
    large = one.clone()
    large[:, 5] = 40.0
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    smoothquant_(first, [one, large], alpha=1.0)
    smoothquant_(second, [large, one], alpha=1.0)
    assert torch.equal(first[1].weight, second[1].weight)
    smoothquant_(model, [one, large], alpha=1.0, limit=1)
    assert not torch.equal(first[1].weight, model[1].weight)


@pytest.mark.parametrize("alpha", [None, 0.5])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_do_not_count(alpha, bad):
    model = outliers(filled(nn.Sequential(GainNorm(16), nn.Linear(16, 24))))
    model[0].weight.data[3] = 60.0
    clean, lost = copy.deepcopy(model), copy.deepcopy(model)
    x = rows(32, 16)  # more would be sampled
    spoiled = torch.cat([x, torch.full((1, 16), bad)])
    expected = smoothquant_(clean, [x], alpha=alpha)["1"]
    found = smoothquant_(model, [spoiled], alpha=alpha)["1"]
    assert found.action == "smoothed" and found.alpha == expected.alpha > 0
    assert found.reason == "after 0; 1 inputs with NaN or infinities were left out"
    assert expected.reason == "after 0"
    assert same(model, state(clean))
    before = state(lost)
    found = smoothquant_(lost, [spoiled[-1:]], alpha=alpha)["1"]
    assert (found.action, found.reason) == ("left", "all its inputs held NaN or infinities")
    assert same(lost, before)


def test_layers_that_are_left_have_a_reason():
    class Returned(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc, self.block = nn.LayerNorm(16), nn.Linear(16, 16), Block()

        def forward(self, x):
            normed = self.norm(x)
            return self.block(self.fc(normed)), normed

    report = smoothquant_(filled(Returned()), [rows(2, 5, 16)], alpha=0.5)
    assert report["fc"].action == "left"
    assert report["fc"].reason == "it reads norm, and the model returns it"
    assert report.summary().startswith("7 smoothed, 1 left; greatest channel:")


def test_half_precision_gets_powers_of_two():
    model = outliers(filled(Decoder())).bfloat16()
    expected = model(tokens(2, 9))
    report = smoothquant_(model, [tokens(2, 9)], alpha=0.5)
    assert torch.equal(model(tokens(2, 9)), expected)
    assert report.notes == ("Factors are powers of two, which need no rounding of the weights.",)
    assert report.difference == 0


def test_a_model_that_amplifies_rounding_gets_powers_of_two():
    class Chaos(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = GainNorm(16), nn.Linear(16, 16)

        def forward(self, x):
            return (self.fc(self.norm(x)) * 1e4).sin()

    model = outliers(filled(Chaos()))
    expected = model(rows(5, 16))
    report = smoothquant_(model, [rows(5, 16)], alpha=0.5)
    assert torch.equal(model(rows(5, 16)), expected)
    assert report["fc"].action == "smoothed" and len(report.notes) == 1


def test_bad_input_changes_nothing():
    model = filled(Decoder())
    before, batch = state(model), tokens(2, 9)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        smoothquant_(3, [batch])
    with pytest.raises(TypeError, match="alpha must be a number from 0 to 1 or None, got 'a'"):
        smoothquant_(model, [batch], alpha="a")
    with pytest.raises(TypeError, match="alpha must be a number from 0 to 1 or None, got True"):
        smoothquant_(model, [batch], alpha=True)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha must be from 0 to 1, got"):
            smoothquant_(model, [batch], alpha=alpha)
    with pytest.raises(ValueError, match="loader must have batches"):
        smoothquant_(model, [])
    with pytest.raises(TypeError, match="config must be a torchquant configuration"):
        smoothquant_(model, [batch], config=Weights())
    with pytest.raises(ValueError, match="must hold float linear layers, got none"):
        smoothquant_(nn.ReLU(), [batch])
    calibrated = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64))
    torchquant.prepare_(calibrated)
    torchquant.calibrate(calibrated, [rows(8, 64)])
    with pytest.raises(ValueError, match="must not be calibrated yet"):
        smoothquant_(calibrated, [rows(8, 64)])
    assert same(model, before)


@pytest.mark.parametrize("when", [1, 5])
def test_an_interruption_restores_everything(when, monkeypatch):
    model = outliers(filled(Decoder())).train()
    before, calls = state(model), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == when:
            raise KeyboardInterrupt
        return original(*args)

    original = smoothquant.fold
    monkeypatch.setattr(smoothquant, "fold", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smoothquant_(model, [tokens(2, 9)])
    assert same(model, before) and model.training


def test_outputs_that_change_for_all_factors_are_refused(monkeypatch):
    model = outliers(filled(Decoder()))
    before = state(model)
    monkeypatch.setattr(smoothquant, "output_difference", lambda expected, actual: 0.5)
    report = smoothquant_(model, [tokens(2, 9)], alpha=0.5)
    assert same(model, before) and report.difference == 0
    assert {row.reason for row in report} == {"the outputs of the model would change by 5.0e-01"}


def test_rotation_and_smoothing_keep_the_outputs():
    model = outliers(filled(Decoder(nn.LayerNorm, tied=True)))
    other = tokens(3, 7, seed=5)
    expected = model(other)
    torchquant.rotate_(model, tokens(2, 9))
    report = smoothquant_(model, [tokens(2, 9)], alpha=0.5)
    assert {row.action for row in report} == {"smoothed"}
    assert output_difference([expected], [model(other)]) < 1e-5
