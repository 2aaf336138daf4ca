"""Configurations: values that cannot be wrong, and their form in JSON."""

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest
from support.layers import ASYMMETRIC, CONFIGS

import torchquant
from torchquant import Int8DynamicActivationInt8WeightConfig as Config
from torchquant import (
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerTensor,
    QATConfig,
    QuantizationConfig,
    configs,
)
from torchquant.configs import (
    Dynamic,
    Weights,
    check_config,
    config_from_dict,
    config_to_dict,
)
from torchquant.training.configuration import LearnedWeights, training_config


def test_defaults() -> None:
    assert Config() == Config(activation_symmetric=False, weight_symmetric=True)
    assert (
        Config() == QuantizationConfig() == QuantizationConfig(Weights(8, True), Dynamic(8, False))
    )
    assert torchquant.Int8DynamicActivationInt8WeightConfig is Config


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_is_a_value(config: QuantizationConfig) -> None:
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert len({config, copy.deepcopy(config)}) == 1
    assert eval(repr(config), {**vars(configs), "PerAxis": torchquant.PerAxis}) == config
    with pytest.raises(FrozenInstanceError):
        config.weights = Weights()  # type: ignore[misc]


@pytest.mark.parametrize("name", ["weight_symmetric", "activation_symmetric"])
@pytest.mark.parametrize("value", [0, 1, None, "yes", 1.0, []])
def test_fields_are_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(TypeError) as raised:
        Config(**{name: value})
    assert str(raised.value) == (
        f"Int8DynamicActivationInt8WeightConfig: {name} must be True or False, got {value!r}"
    )


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="bits"):
        Config(bits=4)  # type: ignore[call-arg]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_json_round_trip(config: QuantizationConfig) -> None:
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_the_form_in_json() -> None:
    weights = {
        "type": "Weights",
        "bits": 8,
        "symmetric": False,
        "narrow_range": None,
        "granularity": {"type": "PerAxis", "axis": 0},
    }
    activations = {"type": "Dynamic", "bits": 8, "symmetric": False}
    assert config_to_dict(ASYMMETRIC) == {
        "type": "QuantizationConfig",
        "weights": weights,
        "activations": activations,
    }
    assert config_from_dict({"type": "QuantizationConfig"}) == Config()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "configuration type must be one of PerTensor, "),
        ({}, "QuantizationConfig, "),
        ({}, "got None"),
        ({"type": "dict"}, "got 'dict'; the file may be from a newer torchquant"),
        (
            {"type": "QuantizationConfig", "bits": 4},
            "configuration QuantizationConfig does not fit this torchquant: ",
        ),
        ({"type": "Weights", "symmetric": 1}, "symmetric must be True or False, got 1"),
        (
            {"type": "QuantizationConfig", "weights": {"type": "Dynamic"}},
            "weights must be Weights(), got Dynamic(",
        ),
    ],
    ids=["empty", "empty_names", "empty_got", "type", "field", "value", "part"],
)
def test_invalid_configurations_are_refused(values: dict[str, Any], text: str) -> None:
    before = copy.deepcopy(values)
    with pytest.raises(ValueError) as raised:
        config_from_dict(values)
    assert text in str(raised.value)
    assert values == before


def test_check_config() -> None:
    assert check_config("verb", None) == Config()
    assert check_config("verb", ASYMMETRIC) is ASYMMETRIC
    name = "Int8DynamicActivationInt8WeightConfig"
    for wrong, got in (
        (Config, f"{name} without parentheses; call it: {name}()"),
        ("int8", "'int8'"),
        ({"symmetric": True}, "{'symmetric': True}"),
        (8, "8"),
        (Foreign(), "Foreign() of "),  # torchao's has the same name
    ):
        with pytest.raises(TypeError) as raised:
            check_config("verb", wrong)  # type: ignore[arg-type]
        text = f"verb: config must be a torchquant configuration such as {name}(), got {got}"
        assert str(raised.value).startswith(text)


@dataclass
class Foreign:
    """A configuration of another library."""


def test_the_names_of_parts_are_unique() -> None:
    with pytest.raises(TypeError, match="the name of a part must be unique, got 'Weights' for"):
        type("Weights", (Weights,), {"__module__": "another"})


OTHERS = [
    Int8StaticActivationInt8WeightConfig(),
    Int8StaticActivationInt8WeightConfig(True, False, activation_narrow_range=False),
    IntxActivationIntxWeightConfig(3, 5, static=True),
]


@pytest.mark.parametrize("config", OTHERS, ids=repr)
def test_the_other_configurations_are_values_too(config: Any) -> None:
    assert pickle.loads(pickle.dumps(config)) == config
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    assert check_config("test", config) is config


@pytest.mark.parametrize(
    ("config", "weight", "activation"),
    [
        (Config(), (-127, 127), (-128, 127)),
        (Config(activation_symmetric=True, weight_symmetric=False), (-128, 127), (-127, 127)),
        (Int8StaticActivationInt8WeightConfig(True), (-127, 127), (-127, 127)),
        (
            Int8StaticActivationInt8WeightConfig(True, activation_narrow_range=False),
            (-127, 127),
            (-128, 127),
        ),
        (IntxActivationIntxWeightConfig(2, 4), (-2, 1), (-8, 7)),
        (IntxActivationIntxWeightConfig(8, 4, activation_symmetric=True), (-127, 127), (-8, 7)),
        (QATConfig(), (-127, 127), (-128, 127)),
        (QATConfig(learned_weights=True), (-128, 127), (-128, 127)),
        (QATConfig(weight_bits=2), (-2, 1), (-128, 127)),
        (
            QATConfig(activations="static", learned_activations=True),
            (-127, 127),
            (-128, 127),
        ),
        (QATConfig(activations="static", activation_symmetric=True), (-127, 127), (-127, 127)),
    ],
    ids=str,
)
def test_ranges(config: Any, weight: tuple[int, int], activation: tuple[int, int]) -> None:
    assert config.weights.range == weight
    assert config.activations.range == activation


def test_what_training_configurations_become() -> None:
    assert QATConfig().deployed() == Config()
    assert QATConfig(activations="static").deployed() == Int8StaticActivationInt8WeightConfig()
    learned = {"activations": "static", "learned_activations": True}
    signed = QATConfig(**learned).deployed()
    assert signed == Int8StaticActivationInt8WeightConfig(True, activation_narrow_range=False)
    for more in ({"learned_offset": True}, {"activation_signed": False}):
        deployed = QATConfig(weight_bits=4, **learned, **more).deployed()
        assert deployed == IntxActivationIntxWeightConfig(4, 8, static=True)


def test_what_training_configurations_of_groups_become() -> None:
    assert QATConfig(4, group_size=32).deployed() == Int8DynamicActivationIntxWeightConfig(4, 32)
    zero_points = QATConfig(3, weight_symmetric=False, activation_symmetric=True, group_size=64)
    assert zero_points.deployed() == Int8DynamicActivationIntxWeightConfig(3, 64, False, True)
    floats = QATConfig(5, activations=None, group_size=128)
    assert floats.deployed() == IntxWeightOnlyConfig(5, 128)
    assert QATConfig(activations=None).deployed() == Int8WeightOnlyConfig()
    for config in (QATConfig(4, group_size=32), floats):
        assert training_config("x", config.deployed()) == config
    learned = QATConfig(4, learned_weights=True, group_size=32, edge_bits=8)
    assert learned.deployed() == Int8DynamicActivationIntxWeightConfig(4, 32)
    assert learned.edge() == QATConfig(8, group_size=32)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(learned)))) == learned
    assert str(learned.weights) == "int4 learned in groups of 32"
    with pytest.raises(TypeError, match=r"LearnedWeights: granularity must be PerAxis\(0\) or"):
        LearnedWeights(4, PerTensor())


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ({"weight_bits": 1}, ValueError, "weight_bits must be an integer from 2 to 8, got 1"),
        ({"activation_bits": 8.0}, ValueError, "activation_bits must be an integer from 2 to 8"),
        ({"edge_bits": 9}, ValueError, "edge_bits must be an integer from 2 to 8, got 9"),
        ({"activations": "observed"}, ValueError, 'activations must be "dynamic" or "static"'),
        ({"averaging_constant": 0.0}, ValueError, r"averaging_constant must be in \(0, 1\]"),
        ({"averaging_constant": "x"}, TypeError, "averaging_constant must be a number"),
        ({"learned_weights": 1}, TypeError, "learned_weights must be True or False, got 1"),
        ({"learned_activations": True}, ValueError, "computed from each token's own range"),
        ({"learned_offset": True}, ValueError, "learned_offset needs learned_activations=True"),
        ({"learned_weights": True, "weight_symmetric": False}, ValueError, "no zero point"),
        ({"activation_signed": False}, ValueError, "activation_signed must be True unless"),
        ({"group_size": 0}, ValueError, "group_size must be a positive integer, or None .* got 0"),
        ({"group_size": True}, ValueError, "group_size must be a positive integer, .* got True"),
        ({"group_size": 32, "activations": "static"}, ValueError, "group_size must be None with"),
        ({"activations": None, "activation_bits": 4}, ValueError, "left out with activations=None"),
        ({"activations": None, "learned_activations": True}, ValueError, "activations stay float"),
    ],
    ids=str,
)
def test_training_configurations_that_make_no_sense(
    values: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        QATConfig(**values)
