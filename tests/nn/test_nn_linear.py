"""QuantizedLinear: conversion from and to float layers, and the bits of its output."""

import copy

import pytest
import torch
from support import ACTIVATIONS, FLOATS, LAYOUTS, assert_same_bits, floats, in_layout
from support.layers import (
    ASYMMETRIC,
    CONFIGS,
    assert_same_state,
    expected_output,
    float_layer,
    layer_of,
)
from torch import nn

from torchquant import Int8DynamicActivationInt8WeightConfig as Config
from torchquant import PerAxis, QuantizationConfig, cpu, functional, ops
from torchquant.nn import QuantizedLinear

SHAPES = {
    "tile": (16, 64),
    "odd": (33, 67),
    "one_output": (1, 40),
    "one_input": (20, 1),
    "two_blocks": (48, 8191),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_has_the_bits_of_the_specification(
    shape: tuple[int, int], config: QuantizationConfig
) -> None:
    layer = layer_of(config, out_features=shape[0], in_features=shape[1])
    x = floats(5, shape[1], seed=3)
    assert_same_bits(layer(x), expected_output(layer, x))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_from_float_has_the_integers_of_the_specification(
    shape: tuple[int, int], dtype: torch.dtype, config: QuantizationConfig
) -> None:
    linear = float_layer(*shape, dtype=dtype)
    layer = QuantizedLinear.from_float(linear, config)
    weight = linear.weight.detach()
    scale, zero_point = functional.choose_qparams(
        weight, symmetric=config.weights.symmetric, granularity=PerAxis(0)
    )
    qmin = -127 if config.weights.symmetric else -128
    qweight = functional.quantize(weight, scale, zero_point, qmin=qmin, granularity=PerAxis(0))
    assert_same_bits(layer.qweight, qweight)
    assert_same_bits(layer.weight_scale, scale)
    assert (layer.weight_zero_point is None) == (zero_point is None) == config.weights.symmetric
    if layer.weight_zero_point is not None and zero_point is not None:
        assert_same_bits(layer.weight_zero_point, zero_point)
    assert layer.bias is not None
    assert layer.bias is linear.bias
    assert layer.dtype == layer.weight.dtype == linear.weight.dtype


@pytest.mark.parametrize("rows", [16, 17, 31, 32, 33, 100])
def test_packing_in_blocks_gives_the_same_bits_as_packing_at_once(rows: int) -> None:
    in_features = (1 << 13) + 1
    for config in (Config(), ASYMMETRIC):
        layer = layer_of(config, out_features=rows, in_features=in_features)
        assert torch.equal(layer.packed, ops.pack_weight(layer.qweight))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_from_float_of_a_weight_in_any_layout(layout: str) -> None:
    linear = float_layer(20, 48)
    plain = QuantizedLinear.from_float(linear)
    linear.weight = nn.Parameter(in_layout(linear.weight.detach(), layout))
    assert_same_state(QuantizedLinear.from_float(linear), plain)


def test_from_float_does_not_change_the_float_layer() -> None:
    linear = float_layer()
    weight, bias = linear.weight, linear.bias
    values = copy.deepcopy(linear.state_dict())
    layer = QuantizedLinear.from_float(linear)
    assert linear.weight is weight
    assert linear.bias is bias
    assert all(torch.equal(values[key], value) for key, value in linear.state_dict().items())
    assert layer.bias is bias, "the bias must be the same object, so that ties stay"


def test_from_float_uses_the_shape_of_the_weight_if_attributes_are_out_of_date() -> None:
    linear = float_layer(32, 64, bias=False)
    linear.weight = nn.Parameter(floats(20, 40))  # pruned or resized by hand
    layer = QuantizedLinear.from_float(linear)
    assert (layer.out_features, layer.in_features) == (20, 40)
    x = floats(3, 40)
    assert_same_bits(layer(x), expected_output(layer, x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_from_float_keeps_training_mode_and_requires_grad(
    training: bool, requires_grad: bool
) -> None:
    linear = float_layer().train(training).requires_grad_(requires_grad)
    layer = QuantizedLinear.from_float(linear)
    assert layer.training is training
    assert layer.bias is not None
    assert layer.bias.requires_grad is requires_grad
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    back = layer.to_float()
    assert back.training is training
    assert back.bias.requires_grad is requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_is_ignored(dtype: torch.dtype) -> None:
    linear, x = float_layer(), floats(3, 64)
    expected = QuantizedLinear.from_float(linear, ASYMMETRIC)
    try:
        torch.set_default_dtype(dtype)
        layer = QuantizedLinear.from_float(linear, ASYMMETRIC)
        empty = QuantizedLinear(64, 32, config=ASYMMETRIC)
        empty.load_state_dict(layer.state_dict(), assign=True)
    finally:
        torch.set_default_dtype(torch.float32)
    for made in (layer, empty):
        assert_same_state(made, expected)
        assert_same_bits(made(x), expected(x))


def test_the_device_context_is_ignored() -> None:
    linear, x = float_layer(), floats(3, 64)
    with torch.device("meta"):
        layer = QuantizedLinear.from_float(linear, ASYMMETRIC)
    assert_same_bits(layer(x), QuantizedLinear.from_float(linear, ASYMMETRIC)(x))
    assert layer.to_float().weight.device.type == "cpu"


def test_gradients_pass_through_a_layer_created_in_inference_mode() -> None:
    linear = float_layer()
    with torch.inference_mode():
        layer = QuantizedLinear.from_float(linear)
    x = floats(3, 64).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.bias is not None
    assert layer.bias.grad is not None


@pytest.mark.parametrize("config", [Config(), ASYMMETRIC], ids=["default", "asymmetric"])
@pytest.mark.parametrize("bias", [True, False])
def test_to_float_has_the_values_of_the_integers(config: QuantizationConfig, bias: bool) -> None:
    linear = float_layer(33, 67, bias=bias)
    layer = QuantizedLinear.from_float(linear, config)
    back = layer.to_float()
    assert type(back) is nn.Linear
    expected = functional.dequantize(
        layer.qweight, layer.weight_scale, layer.weight_zero_point, granularity=PerAxis(0)
    )
    assert_same_bits(back.weight.detach(), expected)
    step = layer.weight_scale.unsqueeze(1)
    assert bool(((back.weight - linear.weight).abs() <= 0.5001 * step).all())
    assert (back.bias is None) is not bias
    if bias:
        assert_same_bits(back.bias.detach(), linear.bias.detach())
    again = QuantizedLinear.from_float(back, config)
    assert torch.equal(again.qweight, layer.qweight)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            QuantizedLinear(64, 32),
            "QuantizedLinear(in_features=64, out_features=32, bias=True, int8 per channel, "
            "activations int8 per token with zero point)",
        ),
        (
            QuantizedLinear(64, 32, bias=False, config=ASYMMETRIC, activation="gelu"),
            "QuantizedLinear(in_features=64, out_features=32, bias=False, int8 per channel with "
            "zero point, activations int8 per token with zero point, activation=gelu)",
        ),
    ],
    ids=["default", "all_options"],
)
def test_repr(layer: QuantizedLinear, text: str) -> None:
    assert repr(layer) == text


def test_a_new_layer_gives_zero() -> None:
    for config in CONFIGS.values():
        layer = QuantizedLinear(64, 32, config=config)
        assert_same_bits(layer(floats(3, 64)).abs(), torch.zeros(3, 32))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_output_dtype_follows_the_input(dtype: torch.dtype, activation: str) -> None:
    layer = layer_of(activation=activation)
    x = floats(7, 64, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype
    assert_same_bits(out, expected_output(layer, x))


def test_training_and_evaluation_give_the_same_bits() -> None:
    layer, x = layer_of(), floats(7, 64)
    expected = expected_output(layer, x)
    for mode in (layer.train(), layer.eval()):
        assert_same_bits(mode(x).detach(), expected)
        with torch.no_grad():
            assert_same_bits(mode(x), expected)
        with torch.inference_mode():
            assert_same_bits(mode(x).clone(), expected)
    assert_same_bits(layer(x.requires_grad_()).detach(), expected)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (2, 1, 3, 64)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_leading_dimensions(shape: tuple[int, ...], bias: bool) -> None:
    layer = layer_of(bias=bias)
    x = floats(*shape)
    out = layer(x)
    assert out.shape == (*shape[:-1], 32)
    assert_same_bits(out.reshape(-1, 32), expected_output(layer, x.reshape(-1, 64)))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (0, 3, 64)], ids=str)
def test_empty_batch(shape: tuple[int, ...]) -> None:
    layer = layer_of()
    x = torch.empty(shape, requires_grad=True)
    out = layer(x)
    assert out.shape == (*shape[:-1], 32)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_in_any_layout(layout: str) -> None:
    layer, x = layer_of(), floats(6, 64)
    assert_same_bits(layer(in_layout(x, layout)), layer(x))


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_autocast_decides_the_output_dtype(dtype: torch.dtype, autocast_dtype: torch.dtype) -> None:
    layer, x = layer_of(), floats(5, 64, dtype=dtype)
    expected = expected_output(layer, x, output_dtype=autocast_dtype)
    with torch.autocast("cpu", dtype=autocast_dtype):
        assert_same_bits(layer(x), expected)
        assert_same_bits(layer(nn.Parameter(x)).detach(), expected)  # without the fast call
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == dtype


@pytest.mark.cpu_only("a path has no instruction sets")
def test_every_instruction_set_runs_the_same_layer(isa: str) -> None:
    layer, x = layer_of(ASYMMETRIC), floats(5, 64)
    assert_same_bits(layer(x), expected_output(layer, x))
    with cpu.use_isa("scalar"):
        other = layer_of(ASYMMETRIC)
        other.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert_same_bits(other(x), expected_output(layer, x))
