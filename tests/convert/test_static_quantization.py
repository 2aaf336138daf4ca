"""prepare_, calibrate, convert_: static int8 layers, bit for bit those of the observed range."""

import copy
import io
import pickle
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from support.calibrated_models import (
    CALIBRATIONS,
    assert_layers_are,
    expected_layer,
    hooks_of,
    inputs_of,
    mlp,
    observer_states,
    rows,
    static,
)
from support.layers import outcome, unchanged
from support.processes import in_processes
from support.static_processes import calibrated_alone, calibrated_in_process
from torch import Tensor, nn

import torchquant
from torchquant import (
    Fusion,
    IntxActivationIntxWeightConfig,
    QATConfig,
    calibrate,
    convert_,
    prepare_,
    prepare_qat_,
    quantize_,
    to_float_,
)
from torchquant.configs import Percentile, config_from_dict, config_to_dict
from torchquant.nn import QuantizedLinear

CONFIGS = {name: static(observer=name) for name in CALIBRATIONS}
CONFIGS |= {
    "symmetric": static(activation_symmetric=True, weight_symmetric=False),
    "all integers": static(activation_symmetric=True, activation_narrow_range=False),
    "few bits": IntxActivationIntxWeightConfig(4, 5, static=True, observer=Percentile(99.0, 64)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_converted_layers_have_the_observed_range(config: Any) -> None:
    model, batches = mlp(), rows()
    inputs = inputs_of(model, batches, lambda model, batch: model(batch))
    expected = {
        name: expected_layer(model.get_submodule(name), config, inputs[name]) for name in inputs
    }
    layers = [model[0], model[2]]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    outputs = [model(batch) for batch in batches]
    report = prepare_(model, config)
    assert outcome(report) == {"0": "prepared", "2": "prepared"}
    assert [model[0], model[2]] == layers and list(model.state_dict()) == list(before)
    calibration = calibrate(model, batches)
    assert (calibration.batches, calibration.samples) == (3, 8 + 11 + 14)
    for batch, output in zip(batches, outputs, strict=True):
        assert_same_bits(model(batch), output)
    report = convert_(model, fusion=Fusion(False, False))
    assert outcome(report) == {"0": "converted", "2": "converted"}
    assert_layers_are(model, expected)
    assert not hooks_of(model)
    reference = nn.Sequential(expected["0"], nn.ReLU(), expected["2"])
    for batch in batches:
        assert_same_bits(model(batch), reference(batch))
    for row, name in zip(calibration.layers, expected, strict=True):
        assert row.scale == float(expected[name].input_scale)
        assert row.zero_point == int(expected[name].input_zero_point)
        ends = (
            min(float(x.min()) for x in inputs[name]),
            max(float(x.max()) for x in inputs[name]),
        )
        # A moving average forgets the ends of the batches.
        assert row.observed == ends or row.observer.startswith("Moving")


@pytest.mark.parametrize("name", ["minmax", "percentile", "histogram", "entropy"])
def test_no_order_of_batches_and_no_division_into_calls_changes_the_layers(name: str) -> None:
    batches = rows(5)
    models = [mlp() for _ in range(3)]
    for model in models:
        prepare_(model, static(observer=name))
    calibrate(models[0], batches)
    calibrate(models[1], reversed(batches))
    calibrate(models[2], batches[3:]), calibrate(models[2], batches, limit=3)
    x = floats(16, 64, seed=99)
    for model in models:
        convert_(model)
    assert_same_bits(models[1](x), models[0](x))
    assert_same_bits(models[2](x), models[0](x))


def test_static_layers_of_a_transformer() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    original = copy.deepcopy(model)
    batches = [
        {
            "input_ids": torch.randint(0, 200, (2, length)),
            "attention_mask": torch.ones(2, length, dtype=torch.int64),
        }
        for length in (5, 12)
    ]
    inputs = inputs_of(model, batches, lambda model, batch: model(**batch))
    assert len(inputs) == 13
    expected = {
        name: expected_layer(original.get_submodule(name), static(), seen)
        for name, seen in inputs.items()
    }
    report = prepare_(model, example_inputs=batches[0])
    assert not any("Not reached" in note for note in report.notes)
    calibration = calibrate(model, batches)
    assert (calibration.batches, calibration.samples) == (2, 4)
    text = str(calibration)
    assert "encoder.layer.{0,1}.attention.self.query" in text
    convert_(model)
    assert_layers_are(model, expected)
    with torch.no_grad():
        got = model(**batches[0]).last_hidden_state
        wanted = original(**batches[0]).last_hidden_state
    error = (got - wanted).square().mean() / wanted.square().mean()
    assert float(error) < 1e-3


def test_layers_with_different_configurations_and_several_calls() -> None:
    model = mlp()
    exact = static(observer="minmax")
    report = prepare_(model, {"0": exact, "*": None})
    assert outcome(report) == {"0": "prepared: as '0'", "2": "skipped: None for the pattern '*'"}
    report = prepare_(model, static())
    assert outcome(report) == {
        "0": "skipped: already prepared, with another configuration",
        "2": "prepared",
    }
    assert outcome(prepare_(model, {"0": exact, "2": static()})) == {
        "0": "skipped: already prepared",
        "2": "skipped: already prepared",
    }
    observers = {name: type(hook.observer).__name__ for name, hook in hooks_of(model).items()}
    assert observers == {"0": "MinMaxObserver", "2": "HistogramObserver"}
    assert outcome(quantize_(model, filter_fn="0"))["0"] == (
        "skipped: prepared for calibration; calibrate(model, loader) and convert_(model) follow"
    )
    assert outcome(prepare_qat_(model))["2"].startswith("skipped: prepared for calibration")
    calibrate(model, rows())
    convert_(model)
    assert outcome(prepare_(model)) == {
        "0": "skipped: already quantized",
        "2": "skipped: already quantized",
    }
    trained = mlp()
    prepare_qat_(trained, filter_fn="0")
    assert outcome(prepare_(trained))["0"] == "skipped: prepared for training"
    calibrate(trained, rows())
    trained.train()(rows()[0])
    assert outcome(convert_(trained)) == {"0": "converted", "2": "converted"}


def test_activations_are_fused_as_in_quantize() -> None:
    model = mlp()
    prepare_(model)
    calibrate(model, rows())
    plain, fused = copy.deepcopy(model), model
    assert [str(row) for row in convert_(fused).fusions] == ["fused: 0 with 1 (relu)"]
    assert convert_(plain, fusion=Fusion(activations=False)).fusions == ()
    x = floats(7, 64)
    with torch.no_grad():
        assert_same_bits(fused(x), plain(x))  # a ReLU changes no bit
    with pytest.raises(TypeError, match="convert_: fusion must be"):
        convert_(mlp(), fusion=True)  # type: ignore[arg-type]


def test_prepared_models_are_copied_pickled_and_taken_back() -> None:
    model = mlp()
    prepare_(model)
    calibrate(model, rows(2))
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    others = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stored, weights_only=False),
    ]
    states = observer_states(model)
    calibrate(model, rows(1, seed=7))
    for other in others:
        assert str(observer_states(other)) == str(states)
        calibrate(other, rows(1, seed=7))
        assert str(observer_states(other)) == str(observer_states(model))
    assert list(model.state_dict()) == list(mlp().state_dict())
    taken_back = others[0]
    layers = list(taken_back)
    assert "2 layers have no observer any more." in to_float_(taken_back).notes
    assert not hooks_of(taken_back) and list(taken_back) == layers
    x = floats(4, 64)
    convert_(model), convert_(others[1])
    assert_same_bits(others[1](x), model(x))


def test_hooks_of_the_user_stay() -> None:
    model = mlp()
    calls: list[str] = []
    model[0].register_forward_pre_hook(lambda module, args: calls.append("before"))
    prepare_(model)
    handle = model[0].register_forward_hook(lambda module, args, output: calls.append("after"))
    calibrate(model, rows(1))
    convert_(model)
    calls.clear()
    model(floats(2, 64))
    assert calls == ["before", "after"]
    handle.remove()
    calls.clear()
    model(floats(2, 64))
    assert calls == ["before"]


def test_layers_without_a_range_stay_in_float() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
            self.used = [0, 1]

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[0](x) + self.experts[1](x * 0) + self.experts[2](x * torch.nan)

    torch.manual_seed(0)
    model = Experts()
    report = prepare_(model, example_inputs=floats(2, 64))
    assert any("Not reached by example_inputs: experts.3." in note for note in report.notes)
    with pytest.warns(RuntimeWarning) as caught:
        calibration = calibrate(model, [floats(8, 64)])
    texts = [str(warning.message) for warning in caught]
    assert any("HistogramObserver of experts.2: 512 values were NaN" in text for text in texts)
    assert any(text.startswith("calibrate: layers without a range (experts.1:") for text in texts)
    assert [(row.action, row.reason.partition(";")[0]) for row in calibration.layers] == [
        ("observed", ""),
        ("no range", "it saw only zeros"),
        ("no range", "it saw no finite values, only NaN and infinities"),
        ("no range", "no batch reached it"),
    ]
    assert calibration.nonfinite == {"experts.2": 512} == torchquant.report_nonfinite(model)
    assert "not finite" in str(calibration) and "3 without a range" in calibration.summary()
    layers = list(model.experts)
    with unchanged(model), pytest.raises(ValueError, match="with strict=True a batch must have"):
        convert_(model, strict=True)
    assert len(hooks_of(model)) == 4
    converted = convert_(model)
    left = "skipped: left in float: no range, because no batch with values other than 0 reached it"
    assert list(outcome(converted).values()) == ["converted", left, left, left]
    assert isinstance(model.experts[0], QuantizedLinear)
    assert list(model.experts)[1:] == layers[1:]
    assert not hooks_of(model)


def test_two_processes_convert_to_the_model_of_one() -> None:
    batches = rows(5)
    expected = calibrated_alone(batches)
    for states in in_processes(calibrated_in_process, [batches[:1], batches[1:]]):
        for name, state in states.items():
            for key, value in state.items():
                assert_same_bits(value, expected[name][key], (name, key))


# ---------------------------------------------------------------- refusals


def test_the_three_calls_are_named_where_one_is_missing() -> None:
    model = mlp()
    with unchanged(model), pytest.raises(ValueError) as raised:
        quantize_(model, static())
    assert "call prepare_(model, config), calibrate(model, loader) and convert_(model)" in str(
        raised.value
    )
    with pytest.raises(ValueError, match=r"calibrate: .* got none; call prepare_\(model, config\)"):
        calibrate(model, rows())
    with pytest.raises(ValueError, match=r"call prepare_\(model, config\) and calibrate"):
        convert_(model)
    prepare_(model)
    with unchanged(model), pytest.raises(ValueError) as raised:
        convert_(model)
    assert str(raised.value) == (
        "convert_: 0 cannot be converted: HistogramObserver of 0: no batch reached it; call "
        "calibrate(model, loader) first"
    )
    assert len(hooks_of(model)) == 2


def test_arguments_of_prepare() -> None:
    model = mlp()
    with unchanged(model):
        for arguments, error, text in (
            ((torchquant.Int8DynamicActivationInt8WeightConfig(),), ValueError, "use quantize_"),
            ((QATConfig(),), TypeError, "use prepare_qat_"),
            ((3,), TypeError, "config must be a torchquant configuration"),
            ((None, floats(2, 5)), ValueError, "got a float32 tensor [2, 5], and the model raised"),
            ((None, "words"), ValueError, "got a str"),
        ):
            with pytest.raises(error) as raised:  # type: ignore[call-overload]
                prepare_(model, *arguments)
            assert str(raised.value).startswith("prepare_: ") and text in str(raised.value)
        with pytest.raises(ValueError, match="the pattern 'nothing' of config matches no"):
            prepare_(model, {"nothing": static()}, strict=True)
        with pytest.raises(ValueError, match="a bare Linear"):
            prepare_(nn.Linear(64, 64))
        with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
            prepare_([model])  # type: ignore[arg-type]
    assert not hooks_of(model)
    model[0] = nn.utils.parametrizations.weight_norm(nn.Linear(64, 128))
    with pytest.raises(ValueError, match="with strict=True every selected layer"):
        prepare_(model, strict=True)
    assert not hooks_of(model)
    assert outcome(prepare_(model))["2"] == "prepared"


def test_a_layer_that_changed_after_the_preparation_is_named() -> None:
    model = mlp()
    prepare_(model)
    calibrate(model, rows())
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with unchanged(model), pytest.raises(ValueError, match="convert_: 2 cannot be converted: "):
        convert_(model)
    assert len(hooks_of(model)) == 2


def test_training_with_an_observer_of_calibration_is_refused() -> None:
    with pytest.raises(ValueError, match=r"observer=None or MovingAverage\(\), got Entropy"):
        prepare_qat_(mlp(), static(observer="entropy"))
    model = mlp()
    prepare_qat_(model, static(observer=torchquant.configs.MovingAverage(0.5)))
    assert model[0].config.activations.averaging_constant == 0.5  # type: ignore[union-attr]


def test_bfloat16_models() -> None:
    model = mlp().to(torch.bfloat16)
    prepare_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, [batch.bfloat16() for batch in rows()])
    convert_(model)
    assert model(rows()[0].bfloat16()).dtype == torch.bfloat16
    assert model[0].input_scale.dtype == torch.float32  # type: ignore[union-attr]


def test_files_keep_the_observer_and_old_files_have_none(tmp_path: Path) -> None:
    model = mlp().eval()
    prepare_(model, static(observer=Percentile(99.5, 64)))
    calibrate(model, rows())
    with pytest.warns(RuntimeWarning, match=r"no observed ranges, but 2 layers .* \(0, 2\); call"):
        torchquant.save(model, tmp_path / "file")
    convert_(model)
    torchquant.save(model, tmp_path / "file")
    loaded = mlp(seed=1).eval()
    torchquant.load(tmp_path / "file", loaded)
    assert loaded[0].config.activations.observer == Percentile(99.5, 64)
    x = floats(5, 64)
    assert_same_bits(loaded(x), model(x))
    old = config_to_dict(static())
    del old["activations"]["observer"]  # as files before the field have it
    assert config_from_dict(old) == static()


def test_batches_are_not_kept() -> None:
    alive: list[Any] = []

    def batches() -> Any:
        for index in range(20):
            batch = floats(4, 64, seed=index)
            alive.append(weakref.ref(batch))
            assert sum(reference() is not None for reference in alive) <= 2
            yield batch
            del batch

    model = mlp()
    prepare_(model)
    assert calibrate(model, batches()).batches == 20
