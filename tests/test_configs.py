"""Configurations: values that cannot be wrong, and their form in JSON."""

import copy
import json
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from support_layers import ASYMMETRIC, CONFIGS

import torchquant
from torchquant import Int8DynamicActivationInt8WeightConfig as Config
from torchquant.configs import check_config, config_from_dict, config_to_dict


def test_defaults() -> None:
    assert Config() == Config(activation_symmetric=False, symmetric=True)
    assert torchquant.Int8DynamicActivationInt8WeightConfig is Config


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_is_a_value(config: Config) -> None:
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert len({config, copy.deepcopy(config)}) == 1
    assert eval(repr(config), {Config.__name__: Config}) == config
    with pytest.raises(FrozenInstanceError):
        config.symmetric = False  # type: ignore[misc]


@pytest.mark.parametrize("name", ["symmetric", "activation_symmetric"])
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
def test_json_round_trip(config: Config) -> None:
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_the_form_in_json() -> None:
    assert config_to_dict(ASYMMETRIC) == {
        "type": "Int8DynamicActivationInt8WeightConfig",
        "activation_symmetric": False,
        "symmetric": False,
    }
    assert config_from_dict({"type": "Int8DynamicActivationInt8WeightConfig"}) == Config()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "configuration type must be one of Int8DynamicActivationInt8WeightConfig, got None"),
        ({"type": "dict"}, "got 'dict'; the file may be from a newer torchquant"),
        (
            {"type": "Int8DynamicActivationInt8WeightConfig", "bits": 4},
            "configuration Int8DynamicActivationInt8WeightConfig does not fit this torchquant: ",
        ),
        (
            {"type": "Int8DynamicActivationInt8WeightConfig", "symmetric": 1},
            "symmetric must be True or False, got 1",
        ),
    ],
    ids=["empty", "type", "field", "value"],
)
def test_what_is_no_configuration(values: dict[str, Any], text: str) -> None:
    before = dict(values)
    with pytest.raises(ValueError) as raised:
        config_from_dict(values)
    assert text in str(raised.value)
    assert values == before


def test_check_config() -> None:
    assert check_config("verb", None) == Config()
    assert check_config("verb", ASYMMETRIC) is ASYMMETRIC
    for wrong in (Config, "int8", {"symmetric": True}, 8):
        with pytest.raises(TypeError) as raised:
            check_config("verb", wrong)  # type: ignore[arg-type]
        assert str(raised.value) == (
            "verb: config must be a torchquant configuration such as "
            f"Int8DynamicActivationInt8WeightConfig(), got {wrong!r}"
        )
