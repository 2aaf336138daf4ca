"""QATLinear: copies, state dicts, configurations, and errors."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from support import assert_same_bits
from support.qat_layers import CONFIGS, frozen, layer_of
from torch import nn

from torchquant import (
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    IntxActivationIntxWeightConfig,
    LSQQuantizer,
    QATConfig,
    QATLinear,
    TrainingConfig,
)
from torchquant.training.configuration import training_config


@pytest.mark.parametrize("config", CONFIGS)
def test_copies_and_state_dicts(config: str) -> None:
    layer = layer_of(config, activation="relu")
    layer.enable_quantization(False).enable_quantization()
    frozen(layer)
    x = torch.randn(5, 40)
    want = layer(x).detach()
    assert_same_bits(copy.deepcopy(layer)(x).detach(), want)
    assert_same_bits(pickle.loads(pickle.dumps(layer))(x).detach(), want)
    other = QATLinear(40, 24, config=CONFIGS[config], activation="relu").enable_quantization(False)
    other.load_state_dict(layer.state_dict())
    assert_same_bits(other(x).detach(), want)


def test_from_float_shares_the_parameters() -> None:
    linear = nn.Linear(8, 4).eval()
    layer = QATLinear.from_float(linear, activation="relu")
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    back = layer.to_float()
    assert type(back) is nn.Linear
    assert back.weight is linear.weight
    assert not QATLinear.from_float(nn.Linear(8, 4, bias=False)).to_float().bias


def test_quantizers_follow_the_configuration() -> None:
    assert QATLinear(8, 4).input_quantizer is None
    assert QATLinear(8, 4).weight_quantizer is None
    layer = QATLinear(8, 4, config=CONFIGS["lsq_unsigned_a2"])
    assert isinstance(layer.input_quantizer, LSQQuantizer)
    assert (layer.input_quantizer.qmin, layer.input_quantizer.qmax) == (0, 3)
    assert layer.input_quantizer.num_features == 8
    assert layer.weight_quantizer.step.shape == (4,)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, QATConfig()),
        (
            Int8DynamicActivationInt8WeightConfig(True, False),
            QATConfig(activation_symmetric=True, weight_symmetric=False),
        ),
        (Int8StaticActivationInt8WeightConfig(), QATConfig(activations="static")),
        (IntxActivationIntxWeightConfig(3, 5), QATConfig(3, 5)),
        (
            IntxActivationIntxWeightConfig(4, 8, True, True),
            QATConfig(4, activations="static", activation_symmetric=True),
        ),
    ],
)
def test_configurations_to_deploy_can_be_trained(config: Any, expected: TrainingConfig) -> None:
    assert training_config("x", config) == expected
    if config is not None:
        assert training_config("x", config).deployed() == config


def test_errors() -> None:
    for call, error, message in (
        (
            lambda: QATLinear(8, 4, activation="gelu"),
            ValueError,
            "activation must be none or relu, got 'gelu'",
        ),
        (
            lambda: QATLinear(8, 4, config="int8"),
            TypeError,
            "QATLinear: config must be a torchquant configuration",
        ),
        (lambda: QATLinear.from_float(nn.ReLU()), TypeError, "must be a plain nn.Linear, got ReLU"),
        (
            lambda: QATLinear(
                8,
                4,
                config=Int8StaticActivationInt8WeightConfig(True, activation_narrow_range=False),
            ),
            ValueError,
            "config must leave activation_narrow_range at None",
        ),
        (lambda: QATLinear(8, 4)(torch.ones(2, 9)), ValueError, "in_features = 8, got [2, 9]"),
        (lambda: QATLinear(8, 4)([1.0]), TypeError, "QATLinear: input must be a tensor, got list"),
        (
            lambda: QATLinear(8, 4)(torch.ones(2, 8).int()),
            TypeError,
            "input must be float32, bfloat16 or float16",
        ),
        (
            lambda: QATLinear(8, 4)(torch.ones(2, 8, device="meta")),
            ValueError,
            "QATLinear: input must be on the layer's device cpu",
        ),
    ):
        with pytest.raises(error, match=re.escape(message)):
            call()
    layer = QATLinear(8, 4)
    with torch.no_grad():
        layer.weight[1, 2] = float("nan")
    assert layer(torch.ones(2, 8)).isnan().any()
    with pytest.raises(ValueError, match="the weight must be finite"):
        layer.to_quantized()
