"""adaround_ and correct_bias_ on prepared models: what they change, in any order, and refuse."""

import copy

import pytest
import torch
from torch import nn

import torchquant
from torchquant import adaround_, correct_bias_, equalize_
from torchquant.convert.adjustment import adjustment_of
from torchquant.nn import QuantizedLinear

CONFIG = torchquant.IntxActivationIntxWeightConfig(weight_bits=4, static=True)


def batches(count=4, rows=64):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(48, 48, generator=generator)
    return [torch.randn(rows, 48, generator=generator) @ mix / 7 + 0.3 for _ in range(count)]


def mlp():
    torch.manual_seed(0)
    layers = [nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)]
    return nn.Sequential(*layers).eval()


def prepared(model=None, config=CONFIG):
    model = mlp() if model is None else model
    torchquant.prepare_(model, config, filter_fn=lambda module, name: True)
    torchquant.calibrate(model, batches())
    return model


def converted(model):
    model = copy.deepcopy(model)
    torchquant.convert_(model)
    return model


@torch.no_grad()
def error(model, reference):
    x = torch.cat(batches(8)[4:])
    expected = reference(x)
    return float((model(x) - expected).square().mean() / expected.square().mean())


@torch.no_grad()
def mean_error(model, reference):
    x = torch.cat(batches())
    return float((model(x) - reference(x)).mean(0).abs().max())


# Learned rounding


def test_learned_rounding_lowers_the_error_of_the_converted_model():
    reference, model = mlp(), prepared()
    plain = error(converted(model), reference)
    report = adaround_(model, batches(), iterations=200)
    assert error(converted(model), reference) < 0.4 * plain
    assert [row.action for row in report] == ["rounded"] * 3
    assert all(0 < row.learned_error < row.nearest_error < 0.05 for row in report)
    assert "3 rounded, 0 left;" in report.summary()
    assert "rounded: error" in str(report)


def test_the_prepared_model_stays_the_float_model():
    model = prepared()
    before = copy.deepcopy(model.state_dict())
    adaround_(model, batches(), iterations=5)
    correct_bias_(model, batches())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(batches()[0]), mlp()(batches()[0]))


def test_converted_layers_have_the_integers_that_were_found():
    model = prepared()
    adaround_(model, batches(), iterations=5)
    found = [adjustment_of(module) for module in model if isinstance(module, nn.Linear)]
    layers = [module for module in converted(model) if isinstance(module, QuantizedLinear)]
    for adjustment, layer in zip(found, layers, strict=True):
        assert torch.equal(layer.qweight, adjustment.qweight)
        assert torch.equal(layer.weight_scale, adjustment.weight_scale)
        assert -8 <= layer.qweight.min() < layer.qweight.max() <= 7
    torchquant.convert_(model)
    assert adjustment_of(model[0]).qweight is None


def test_without_a_search_scales_are_those_of_the_range():
    model = prepared()
    plain = [module.weight_scale for module in converted(model) if hasattr(module, "qweight")]
    adaround_(model, batches(), iterations=0, search_scales=False)
    found = [module.weight_scale for module in converted(model) if hasattr(module, "qweight")]
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_numbers_of_bits(bits):
    config = torchquant.IntxActivationIntxWeightConfig(weight_bits=bits, static=True)
    reference, model = mlp(), prepared(config=config)
    plain = error(converted(model), reference)
    adaround_(model, batches(), iterations=100)
    assert error(converted(model), reference) < plain


def test_same_data_gives_the_same_integers_and_a_second_call_starts_anew():
    one, other = prepared(), prepared()
    adaround_(one, batches(), iterations=20)
    first = adjustment_of(one[2]).qweight
    adaround_(other, batches(2), iterations=3)
    correct_bias_(other, batches())
    report = adaround_(other, batches(), iterations=20)
    assert torch.equal(adjustment_of(other[2]).qweight, first)
    assert report.notes == (
        "Corrections of biases were for other integers; call correct_bias_ again.",
    )
    assert adjustment_of(other[2]).bias is None


LEFT = {
    "its weights have zero points": torchquant.Weights(symmetric=False),
    "its weights have scales for groups of inputs": torchquant.Weights(
        4, granularity=torchquant.PerGroup(16)
    ),
}


@pytest.mark.parametrize("reason", LEFT)
def test_weights_with_other_scales_are_left(reason):
    config = torchquant.QuantizationConfig(LEFT[reason], torchquant.Static())
    model = prepared(config=config)
    report = adaround_(model, batches(1), iterations=1)
    assert {(row.action, row.reason) for row in report} == {("left", reason)}
    converted(model)


def test_a_weight_that_changes_afterwards_is_refused_by_convert():
    model = prepared()
    adaround_(model, batches(1), iterations=1)
    with torch.no_grad():
        model[2].weight.mul_(1.5)
    with pytest.raises(
        ValueError, match=r"convert_: 2 cannot be converted: .* call adaround_ again"
    ):
        torchquant.convert_(model)
    assert isinstance(model[0], nn.Linear)
    adaround_(model, batches(1), iterations=1)
    torchquant.convert_(model)


def test_a_model_that_is_prepared_anew_has_no_old_integers():
    model = prepared()
    adaround_(model, batches(1), iterations=1)
    torchquant.to_float_(model)
    eight = torchquant.Int8StaticActivationInt8WeightConfig()
    expected = converted(prepared(config=eight))
    found = converted(prepared(model, eight))
    assert torch.equal(found[0].qweight, expected[0].qweight)
    assert found[0].qweight.max() == 127


# Corrected biases


def test_corrected_biases_take_the_mean_error_out():
    reference, model = mlp(), prepared()
    plain = mean_error(converted(model), reference)
    report = correct_bias_(model, batches())
    assert mean_error(converted(model), reference) < 0.02 * plain
    assert [row.action for row in report] == ["corrected"] * 3
    assert report["0"].error > 0
    assert "3 corrected, 0 left; greatest mean error" in report.summary()


class Branching(nn.Module):
    """No region: each layer rounds its own input."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(mlp())

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if x.shape[0] else x
        return x + 0 if x.sum() < 1e9 else x


@pytest.mark.parametrize("build", [mlp, Branching])
def test_the_rounding_of_inputs_is_corrected_too(build):
    config = torchquant.IntxActivationIntxWeightConfig(8, activation_bits=3, static=True)
    reference, model = build(), prepared(build(), config)
    plain = mean_error(converted(model), reference)
    correct_bias_(model, batches())
    assert mean_error(converted(model), reference) < 0.01 * plain


def test_a_second_correction_is_the_first():
    model = prepared()
    correct_bias_(model, batches())
    first = adjustment_of(model[4]).bias
    correct_bias_(model, batches())
    torch.testing.assert_close(adjustment_of(model[4]).bias, first)


def test_correction_after_rounding_keeps_the_integers():
    reference, model = mlp(), prepared()
    adaround_(model, batches(), iterations=50)
    rounded = converted(model)
    correct_bias_(model, batches())
    both = converted(model)
    assert torch.equal(both[0].qweight, rounded[0].qweight)
    assert mean_error(both, reference) < 0.1 * mean_error(rounded, reference)
    assert error(both, reference) < 1.1 * error(rounded, reference)


def test_layers_without_bias_are_left():
    model = mlp()
    model[2] = nn.Linear(64, 64, bias=False)
    report = correct_bias_(prepared(model), batches())
    assert report["2"].reason == "it has no bias"
    assert report.summary().startswith("2 corrected, 1 left")


def test_all_three_verbs_together():
    reference = mlp()
    with torch.no_grad():
        reference[0].weight[3] *= 50
        reference[2].weight[:, 3] /= 50
    model = copy.deepcopy(reference)
    torchquant.prepare_(model, CONFIG, filter_fn=lambda module, name: True)
    assert [row.action for row in equalize_(model)] == ["equalized", "equalized", "left"]
    torchquant.calibrate(model, batches())
    equalized = error(converted(model), reference)
    assert equalized < 0.5 * error(converted(prepared(copy.deepcopy(reference))), reference)
    adaround_(model, batches(), iterations=100)
    correct_bias_(model, batches())
    assert error(converted(model), reference) < 0.4 * equalized


# Both


class Partly(nn.Module):
    """One layer is called twice, one only for some batches, one never."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.rare, self.never = (nn.Linear(48, 48) for _ in range(4))

    def forward(self, x, rare=False):
        x = self.two(self.one(x).relu()).relu()
        return self.one(self.rare(x) if rare else x)


VERBS = {
    "adaround_": lambda *arguments, **options: adaround_(*arguments, iterations=3, **options),
    "correct_bias_": correct_bias_,
}


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.filterwarnings("ignore:calibrate")
def test_layers_that_are_called_twice_or_never(name):
    torch.manual_seed(0)
    model = Partly()
    torchquant.prepare_(model, CONFIG, filter_fn=lambda module, name: True)
    torchquant.calibrate(model, [{"x": batches()[0], "rare": True}])
    report = VERBS[name](model, batches(1))
    assert report["one"].action in ("rounded", "corrected")
    assert (report["rare"].action, report["rare"].reason) == ("left", "no batch reached it")
    assert "never" not in report, "convert_ leaves it in float"
    converted(model)


@pytest.mark.parametrize("name", VERBS)
def test_layers_behind_the_one_at_work_do_not_run(name):
    model, calls = prepared(), []
    model[4].register_forward_pre_hook(lambda module, args: calls.append(type(module).__name__))
    VERBS[name](model, batches(1))
    assert calls == ["Linear", "Linear", "QuantizedLinear"], "for the order, and for itself"


@pytest.mark.parametrize("name", VERBS)
def test_inputs_with_nan_are_left(name):
    model = prepared()
    broken = batches(1)[0].clone()
    broken[0, 0] = float("nan")
    report = VERBS[name](model, [broken])
    assert report["0"].action == "left"
    assert "NaN or infinities" in report["0"].reason
    assert adjustment_of(model[0]).bias is None
    assert adjustment_of(model[0]).qweight is None


@pytest.mark.parametrize("name", VERBS)
def test_structures_of_batches_limits_and_modes(name):
    usual, other = prepared(), prepared()
    VERBS[name](usual, batches(2))
    other.train()
    pairs = [(x, torch.zeros(len(x))) for x in batches(4)]
    VERBS[name](other, iter(pairs), limit=2)
    assert all(module.training for module in other.modules())
    again = prepared()
    VERBS[name](again, [{"x": x} for x in batches(2)], forward=lambda net, batch: net(batch["x"]))
    for one in (other, again):
        for kept in ("qweight", "bias"):
            expected, found = (getattr(adjustment_of(net[2]), kept) for net in (usual, one))
            assert (expected is None) == (found is None)
            assert expected is None or torch.equal(expected, found)


@pytest.mark.parametrize("name", VERBS)
def test_other_models_are_refused(name):
    verb = VERBS[name]
    with pytest.raises(TypeError, match=rf"{name}: model must be an nn.Module, got NoneType"):
        verb(None, batches())
    remedy = rf"{name}: model must be prepared and calibrated, .* call prepare_ and calibrate first"
    with pytest.raises(ValueError, match=remedy):
        verb(mlp(), batches())
    model = mlp()
    torchquant.prepare_(model, CONFIG, filter_fn=lambda module, name: True)
    with pytest.raises(ValueError, match=remedy):
        verb(model, batches())


@pytest.mark.parametrize("name", VERBS)
def test_loaders_without_batches_and_wrong_limits_are_refused(name):
    model = prepared()
    with pytest.raises(ValueError, match=rf"{name}: loader must have batches, got none"):
        VERBS[name](model, [])
    for limit in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=rf"{name}: limit must be None or a positive number"):
            VERBS[name](model, batches(), limit=limit)


@pytest.mark.parametrize("iterations", [-1, 2.5, True, None])
def test_wrong_iterations_are_refused(iterations):
    with pytest.raises(ValueError, match=r"adaround_: iterations must be an integer of at least 0"):
        adaround_(prepared(), batches(), iterations=iterations)


def test_equalize_refuses_a_calibrated_model():
    model = prepared()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"must not be calibrated yet, .* got ranges of 0, 2, 4;"):
        equalize_(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", VERBS)
def test_progress_bar_is_shown_on_request(name, capsys):
    VERBS[name](prepared(), batches(1), progress=True)
    assert name in capsys.readouterr().err
