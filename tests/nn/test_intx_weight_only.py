"""QuantizedIntxLinear with float activations: values, dtypes, gradients, verbs."""

import pytest
import torch
from support import FLOATS, assert_same_bits, floats, supported_isas
from support.layers import float_layer, outcome
from torch import Tensor, nn

import torchquant
from torchquant import (
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    QuantizationConfig,
    cpu,
    functional,
)
from torchquant.nn import QuantizedIntxLinear

CONFIGS = {
    "int4": IntxWeightOnlyConfig(4, 32),
    "int3_zero": IntxWeightOnlyConfig(3, 48, symmetric=False),
    "int8": Int8WeightOnlyConfig(),
    "int8_groups": Int8WeightOnlyConfig(32),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def specified(layer: QuantizedIntxLinear, x: Tensor) -> Tensor:
    weights = layer.config.weights
    granularity = weights.granularity
    return functional.linear_intx(
        x,
        layer.integers,
        layer.qweight_scale,
        layer.qweight_zero_point,
        layer.bias.detach(),
        bits=weights.bits,
        group_size=granularity.group_size if isinstance(granularity, PerGroup) else None,
        activation=layer.activation,
    )


@configs
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values(dtype: torch.dtype, config: QuantizationConfig) -> None:
    layer = QuantizedIntxLinear.from_float(float_layer(dtype=dtype), config, "gelu")
    x = floats(2, 3, 64, dtype=dtype)
    weight = layer.to_float().float()
    exact = functional.gelu(weight(x.float()))
    found = layer(x).detach()
    assert found.dtype == dtype and found.shape == (2, 3, 32)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found.float(), exact.detach(), rtol=tolerance, atol=tolerance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x[:0]).shape == (0, 3, 32)
    assert_same_bits(layer(x.transpose(0, 1)).detach(), found.transpose(0, 1).contiguous())
    assert_same_bits(found, specified(layer, x))
    for isa in supported_isas():
        with cpu.use_isa(isa):
            assert_same_bits(layer(x[1, 2]).detach(), found[1, 2])


@configs
def test_gradients(config: QuantizationConfig) -> None:
    layer = QuantizedIntxLinear.from_float(float_layer(), config)
    x = floats(5, 64).requires_grad_()
    grad = floats(5, 32, seed=4)
    layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.dequantized(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0), rtol=1e-4, atol=1e-4)
    plain = layer(x).detach()
    assert_same_bits(nn.functional.linear(x, layer.weight, layer.bias).detach(), plain)


@configs
def test_compiled(config: QuantizationConfig) -> None:
    layer, x = QuantizedIntxLinear.from_float(float_layer(), config).eval(), floats(5, 64)
    compiled = torch.compile(layer, fullgraph=True)
    assert_same_bits(compiled(x), layer(x))


def test_verbs() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Conv1d(64, 64, 3))
    report = torchquant.quantize_(model, Int8WeightOnlyConfig())
    assert outcome(report) == {
        "0": "quantized",
        "2": "quantized",
        "3": "skipped: convolutions need Dynamic or Static activations, not None",
    }
    assert report["0"].weights == "int8 per channel"
    assert str(report.fusions[0]) == "fused: 0 with 1 (gelu)"
    assert "activations float" in repr(model[0])
    x = floats(3, 64)
    with torch.no_grad():
        found = model[:3](x)
    torchquant.to_float_(model)
    torch.testing.assert_close(model[:3](x).detach(), found, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="prepare_: config must have static activations"):
        torchquant.prepare_(model, IntxWeightOnlyConfig())
    mixed = {"0": IntxWeightOnlyConfig(group_size=64), "2": Int8StaticActivationInt8WeightConfig()}
    with pytest.raises(ValueError, match="quantize_: config must have dynamic activations"):
        torchquant.quantize_(model, mixed)


def test_groups_that_are_larger_than_a_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    weights = [layer.weight for layer in model]
    with pytest.raises(ValueError, match=r"0: group_size must be at most in_features = 64, got 96"):
        torchquant.quantize_(model, IntxWeightOnlyConfig(4, 96), strict=True)
    assert [layer.weight for layer in model] == weights
    report = torchquant.quantize_(model, IntxWeightOnlyConfig(4, 96))
    assert outcome(report) == {
        "0": "skipped: group_size must be at most in_features = 64, got 96",
        "1": "quantized",
    }
    assert list(report.float_families) == ["linear layers"]
