"""QuantizedIntxLinear: conversion from and to float layers, and the bits of its output."""

import itertools

import pytest
import torch
from support import ACTIVATIONS, FLOATS, assert_same_bits, floats, supported_isas
from support.layers import (
    assert_same_state,
    expected_output,
    float_layer,
    layer_of,
)
from torch import nn

from torchquant import (
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    IntxActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerTensor,
    QuantizationConfig,
    Weights,
    cpu,
    functional,
)
from torchquant import Int8DynamicActivationIntxWeightConfig as Config
from torchquant.configs import Activations
from torchquant.nn import QuantizedIntxLinear, QuantizedLinear

BITS = range(2, 9)
GROUPS = (None, 32, 48)


def intx_layer(config: QuantizationConfig, **sizes: int) -> QuantizedIntxLinear:
    return QuantizedIntxLinear.from_float(float_layer(**sizes), config)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_forward_has_the_bits_of_the_specification(
    bits: int, group_size: int | None, symmetric: bool
) -> None:
    for activation_symmetric in (True, False):
        config = Config(bits, group_size, symmetric, activation_symmetric)
        layer = intx_layer(config, out_features=33, in_features=100)
        x = floats(5, 100, seed=3)
        expected = expected_output(layer, x)
        assert_same_bits(layer(x), expected)
        for row in range(5):
            assert_same_bits(layer(x[row]), expected[row])
        for isa in supported_isas():
            with cpu.use_isa(isa):
                assert_same_bits(layer(x), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_from_float_has_the_integers_of_the_specification(
    bits: int, group_size: int | None, symmetric: bool
) -> None:
    weights = Config(bits, group_size, symmetric).weights
    for dtype in FLOATS:
        linear = float_layer(33, 100, dtype=dtype)
        layer = QuantizedIntxLinear.from_float(linear, Config(bits, group_size, symmetric))
        weight = linear.weight.detach()
        scale, zero_point = functional.choose_qparams(
            weight, bits=bits, symmetric=symmetric, granularity=weights.granularity
        )
        qmin, qmax = weights.range
        integers = functional.quantize(
            weight, scale, zero_point, qmin=qmin, qmax=qmax, granularity=weights.granularity
        )
        assert_same_bits(layer.integers, integers)
        assert_same_bits(layer.qweight_scale, scale)
        assert (layer.qweight_zero_point is None) is symmetric
        if zero_point is not None:
            assert_same_bits(layer.qweight_zero_point, zero_point.to(torch.int8))
        assert_same_bits(layer.qweight, functional.pack_integers(integers, bits))
        assert layer.bias is linear.bias
        assert layer.dtype == layer.weight.dtype == dtype
        dequantized = functional.dequantize(
            integers, scale, zero_point, granularity=weights.granularity
        )
        assert_same_bits(layer.dequantized(), dequantized.to(dtype))


def test_rounding_in_chunks_gives_the_same_bits_as_rounding_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for config in (Config(4, 48), Config(3, None, False), Config(5, 32, False)):
        whole = intx_layer(config, out_features=100, in_features=100)
        with monkeypatch.context() as patch:
            patch.setattr("torchquant.nn.intx_weight._CHUNK", 700)
            assert_same_state(intx_layer(config, out_features=100, in_features=100), whole)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    layer, x = layer_of(Config(), activation), floats(3, 64)
    assert_same_bits(layer(x), expected_output(layer, x))
    assert f"activation={activation}" in repr(layer) or activation == "none"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes_and_autocast(dtype: torch.dtype) -> None:
    layer, x = layer_of(Config(4, 32)), floats(2, 3, 64, dtype=dtype)
    assert_same_bits(layer(x), expected_output(layer, x))
    assert layer(x[:0]).shape == (0, 3, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(layer(x), expected_output(layer, x, torch.bfloat16))


def test_to_float_and_back() -> None:
    layer = layer_of(Config(4, 32))
    linear = layer.to_float()
    assert type(linear) is nn.Linear
    assert_same_bits(linear.weight.detach(), layer.dequantized())
    assert_same_state(QuantizedIntxLinear.from_float(linear, layer.config), layer)


def test_from_integers() -> None:
    config = Config(4, 32, symmetric=False)
    made = layer_of(config)
    layer = QuantizedIntxLinear.from_integers(
        made.integers, made.qweight_scale, made.qweight_zero_point, made.bias, config
    )
    assert_same_state(layer, made)
    assert layer.bias is made.bias
    with pytest.raises(ValueError, match=r"weight must be from -8 to 7 for bits = 4, got 8"):
        QuantizedIntxLinear.from_integers(
            torch.full((32, 64), 8, dtype=torch.int8), torch.ones(32, 2), config=Config()
        )
    with pytest.raises(ValueError, match=r"weight_zero_point must be given with weight_scale"):
        QuantizedIntxLinear.from_integers(made.integers, made.qweight_scale, config=config)
    with pytest.raises(ValueError, match=r"weight_zero_point must be None for int4 in groups"):
        QuantizedIntxLinear.from_integers(
            made.integers, made.qweight_scale, made.qweight_zero_point, config=Config()
        )


def test_given_scales() -> None:
    weight, scale = floats(32, 64), torch.rand(32, 2) + 0.1
    layer = QuantizedIntxLinear.from_tensors(weight, None, Config(), weight_scale=scale)
    assert_same_bits(layer.qweight_scale, scale)
    granularity = layer.config.weights.granularity
    expected = functional.quantize(weight, scale, qmin=-8, qmax=7, granularity=granularity)
    assert_same_bits(layer.integers, expected)


def test_the_class_of_a_configuration() -> None:
    intx, int8 = QuantizedIntxLinear, QuantizedLinear
    for config, expected in (
        (Config(8, 32), intx),
        (Config(7, None), intx),
        (Config(8, None), int8),
        (IntxWeightOnlyConfig(8, None), intx),
        (Int8DynamicActivationInt8WeightConfig(), int8),
        (Int8StaticActivationInt8WeightConfig(), int8),
        (IntxActivationIntxWeightConfig(4, 4), intx),
        (IntxActivationIntxWeightConfig(4, static=True), int8),
    ):
        assert QuantizedLinear.class_for(config) is expected, config
    assert QuantizedLinear.class_for(Config(4, None), (16, 65_793)) is intx
    assert QuantizedLinear.class_for(Config(4, None), (16, 65_794)) is int8

    class Own(QuantizedLinear): ...

    assert Own.class_for(Config(4, None)) is Own and Own.variants() == (Own,)


def test_configurations_and_shapes_that_do_not_fit() -> None:
    other = QuantizationConfig(Config().weights, Activations())
    for config, text in (
        (Config(4, 65), "group_size must be at most in_features = 64, got 65"),
        (other, "linear layers need Dynamic or Static activations or None, not Activations"),
        (
            QuantizationConfig(Weights(4, granularity=PerTensor())),
            r"linear weights need PerAxis\(0\) or PerGroup\(group_size\), not PerTensor\(\)",
        ),
    ):
        for make in (
            lambda config: QuantizedIntxLinear.from_float(float_layer(), config),
            lambda config: QuantizedIntxLinear(64, 32, config=config),
        ):
            with pytest.raises(ValueError, match=text):
                make(config)
    text = "at most 65793 inputs can share a scale of 4 bits, got 65794; choose a smaller group"
    with pytest.raises(ValueError, match=text):
        QuantizedIntxLinear(65_794, 1, config=Config(4, None))
    QuantizedIntxLinear(65_794, 1, config=Config(4, 128))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_bytes(bits: int, symmetric: bool) -> None:
    """Within 2 % of the bits of the weights and scales; a zero point is 8 bits."""
    for group_size in (32, 64, 128, None):
        layer = QuantizedIntxLinear(4096, 64, False, Config(bits, group_size, symmetric))
        scales = 64 * (4096 // (group_size or 4096))
        wanted = 64 * 4096 * bits / 8 + scales * (4 if symmetric else 5)
        assert wanted <= layer.packed.numel() <= 1.02 * wanted
        stored = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
        assert stored == wanted


def test_gradients_reach_the_input_and_the_bias() -> None:
    for config in (Config(4, 32), Config(3, None, False)):
        layer = layer_of(config)
        x = floats(5, 64).requires_grad_()
        layer(x).square().sum().backward()
        other = x.detach().clone().requires_grad_()
        output = layer(other)
        assert torch.allclose(x.grad, 2 * output.detach() @ layer.dequantized(), atol=1e-4)
        assert torch.allclose(layer.bias.grad, (2 * output.detach()).sum(0), atol=1e-4)
        assert x.grad.abs().max() > 0


def test_forms_of_the_call_agree() -> None:
    layer, x = layer_of(Config(4, 32), "gelu").eval(), floats(3, 64)
    expected = layer(x)
    assert_same_bits(torch.compile(layer, fullgraph=True)(x), expected)
    exported = torch.export.export(layer, (x,)).module()
    assert_same_bits(exported(x), expected)
    plain = layer_of(Config(4, 32))
    assert_same_bits(nn.functional.linear(x, plain.weight, plain.bias), plain(x))
    model = nn.Sequential(plain)
    assert_same_bits(torch.fx.symbolic_trace(model)(x), plain(x))
    with pytest.raises(ValueError, match=r"IntxLinear: input must be \[..., in_features\]"):
        layer(floats(3, 65))


def test_names_of_messages_do_not_depend_on_the_base_class() -> None:
    for cls, method in itertools.product((QuantizedLinear, QuantizedIntxLinear), ("from_float",)):
        with pytest.raises(TypeError, match=rf"^{cls.__name__}.{method}: "):
            getattr(cls, method)(nn.ReLU())
