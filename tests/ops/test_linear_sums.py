"""Linear operators are their steps, and their sums are exact to the bounds."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ACTIVATIONS,
    FLOATS,
    FLT_MAX,
    INF,
    NAN,
    Shape,
    assert_same_bits,
    check_everywhere,
    floats,
    integers,
    positive,
)
from support.linear_layers import (
    Layer,
    check_dynamic,
    check_integer,
    check_static,
)

from torchquant import PackedWeight, functional, ops, quantized_linear


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_linear_dynamic_is_its_steps(isa, symmetric, activation, dtype):
    """Quantize the rows, multiply, activate, round: one operator or four, the same bits."""
    layer = Layer(Shape(19, 35, 72), bias="float", weight_zero_point=True)
    x, packed, side = layer.float_input(dtype, "not_finite"), layer.weight, layer.weight_side
    packed = ops.pack_weight(packed)
    q, scale, zero_point = ops.quantize_per_token(x, symmetric=symmetric)
    y = ops.linear_static(
        q, scale, zero_point, packed, **side, bias=layer.bias_tensor, out_features=35
    )
    y = functional.ACTIVATIONS[activation](y).to(dtype)
    fused = ops.linear_dynamic(
        x,
        packed,
        **side,
        bias=layer.bias_tensor,
        out_features=35,
        symmetric=symmetric,
        activation=activation,
    )
    assert_same_bits(fused, y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("limits", [(-128, 127), (-127, 127), (-8, 7)], ids=str)
def test_linear_static_is_its_steps(isa, activation, limits):
    layer = Layer(Shape(19, 35, 72), bias="float", weight_zero_point=True)
    x, packed = layer.float_input(torch.float32, "extreme"), ops.pack_weight(layer.weight)
    scale, zero = torch.tensor([0.3]), torch.tensor([-5], dtype=torch.int32)
    q = ops.quantize(x, scale, zero, qmin=limits[0], qmax=limits[1])
    options = {**layer.weight_side, "bias": layer.bias_tensor, "out_features": 35}
    y = functional.ACTIVATIONS[activation](ops.linear_static(q, scale, zero, packed, **options))
    options |= {"activation": activation, "input_qmin": limits[0], "input_qmax": limits[1]}
    assert_same_bits(ops.linear_static(x, scale, zero, packed, **options), y)
    quantized = ops.linear_static(
        x,
        scale,
        zero,
        packed,
        **options,
        output_scale=torch.tensor([0.7]),
        output_zero_point=11,
        output_dtype=torch.int8,
    )
    assert_same_bits(quantized, ops.quantize(y, 0.7, 11))


def test_integer_linear_is_int8_mm_and_its_compensation(isa):
    """The zero-point algebra, once more in int64: sum (p - zp)(w - zw) from four plain sums."""
    layer = Layer(Shape(21, 40, 130))
    x, w, packed = layer.integer_input(torch.uint8), layer.weight, ops.pack_weight(layer.weight)
    zx = integers(21, 1, seed=8, dtype=torch.uint8).to(torch.int32)
    zw = integers(40, seed=9).to(torch.int32)
    acc = ops.int8_mm(x, packed, 40).long()
    acc = acc - zx * w.long().sum(1) - zw * x.long().sum(1, keepdim=True) + 130 * zx * zw
    y = ops.linear_static(x, torch.ones(1), zx, packed, torch.ones(1), zw, out_features=40)
    assert_same_bits(y, acc.float())


@pytest.mark.parametrize(
    ("dtype", "value", "weight"),
    [
        (torch.uint8, 255, -128),
        (torch.uint8, 255, 127),
        (torch.uint8, 0, -128),
        (torch.int8, -128, -128),
        (torch.int8, -128, 127),
        (torch.int8, 127, -128),
        (torch.int8, 127, 127),
        (torch.int8, -128, -127),
    ],
)
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_extreme_products(dtype, value, weight, rows):
    """All activations and all weights at an end: where 16-bit sums saturate."""
    x = torch.full((rows, 200), value, dtype=dtype)
    w = torch.full((18, 200), weight, dtype=torch.int8)
    packed = ops.pack_weight(w)
    expected = torch.full((rows, 18), value * weight * 200, dtype=torch.int32)
    check_everywhere(lambda: ops.int8_mm(x, packed, 18), expected)


def test_one_weight_of_minus_128_among_many():
    """The flag is per tile of 16 outputs: in the first, in the last, in the tail of K."""
    x = torch.cat([torch.full((3, 77), -128), integers(9, 77).int()]).to(torch.int8)
    for output, position in itertools.product((0, 15, 16, 33), (0, 31, 76)):
        w = torch.full((34, 77), -127, dtype=torch.int8)
        w[output, position] = -128
        expected = x.int() @ w.int().t()
        packed = ops.pack_weight(w)
        check_everywhere(
            lambda: ops.int8_mm(x, packed, 34),  # noqa: B023
            expected,
            what=(output, position),
        )


@pytest.mark.parametrize("inputs", [33_025, 33_026, 65_728, 65_793, 65_794, 131_500])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=["int8", "uint8"])
def test_deep_sums_are_exact(inputs, dtype):
    """Past 33,025 the sum with zero points on both sides, past 65,793 any, leaves 32 bits."""
    top, limits = 3, torch.iinfo(dtype)
    ends = torch.tensor([[limits.max], [limits.min]]).expand(2, inputs)
    x = torch.cat([ends, integers(1, inputs, dtype=dtype).int()]).to(dtype)
    w = torch.cat([torch.full((1, inputs), -128), torch.full((1, inputs), 127)])
    w = torch.cat([w, integers(1, inputs, seed=1).int()]).to(torch.int8)
    packed = PackedWeight.pack(w)
    zero = torch.tensor([[limits.min], [limits.max], [3]], dtype=torch.int32)
    both = {"weight_zero_point": torch.tensor([127, -128, 5], dtype=torch.int32)}
    both |= {"input_zero_point": zero}
    int_bias = torch.tensor([-(2**31), 2**31 - 1, 12345], dtype=torch.int32)
    for options, bias in itertools.product(
        ({}, {"input_zero_point": zero}, both), (None, torch.randn(top), int_bias)
    ):
        options = {"input_scale": 1.0, "weight_scale": positive(top), **options}
        expected = functional.quantized_linear(x, w, bias, **options)
        check_everywhere(
            lambda: quantized_linear(x, packed, bias, **options),  # noqa: B023
            expected,
            what=options,
        )
    if inputs <= 65_793:
        expected = (x.double() @ w.double().t()).to(torch.int32)
        check_everywhere(lambda: ops.int8_mm(x, packed.packed, top), expected)


@pytest.mark.parametrize("inputs", [33_026, 65_800])
def test_deep_float_rows_are_exact(inputs):
    """The same from float rows: the asymmetric ends -128 and 127 against weights of one sign."""
    x = torch.full((3, inputs), 1.0)
    x[0, 0], x[1, : inputs // 2] = -1.0, 0.0
    x[2] = floats(inputs)
    w = torch.stack([torch.full((inputs,), -128), torch.full((inputs,), 127)]).to(torch.int8)
    packed, scale = ops.pack_weight(w), positive(2)
    zero = torch.tensor([127, -128], dtype=torch.int32)
    for symmetric, zw in itertools.product((True, False), (None, zero)):
        check_everywhere(
            lambda: ops.linear_dynamic(x, packed, scale, zw, out_features=2, symmetric=symmetric),  # noqa: B023
            functional.linear_dynamic(
                x, w, weight_scale=scale, weight_zero_point=zw, symmetric=symmetric
            ),
        )


@settings(max_examples=10)
@given(
    seed=st.integers(0, 10**6),
    bias=st.sampled_from(["none", "float", "int32"]),
    inputs=st.sampled_from([33_024, 33_027, 66_000, 70_001]),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_deep_layers(seed, bias, inputs, activation):
    layer = Layer(Shape(2, 3, inputs), seed, bias, seed % 2 == 0, activation=activation)
    check_integer(layer, (torch.int8, torch.uint8)[seed % 2], per_row=True)
    check_static(layer, zero_point=-100)
    if bias != "int32":
        check_dynamic(layer, symmetric=False)


def test_the_float_bias_is_fused():
    """acc * scale + bias where one and two roundings differ."""
    x = torch.arange(1, 128, dtype=torch.int8).reshape(-1, 1)
    scale = torch.tensor([1 + 2.0**-23])
    bias = -x[:40, 0].float().repeat(5)[:130]
    w = torch.ones(130, 1, dtype=torch.int8)
    packed = PackedWeight.pack(w)
    expected = functional.fmaf(x.float(), scale, bias)
    assert not torch.equal(expected, x.float() * scale + bias)
    check_everywhere(
        lambda: quantized_linear(x, packed, bias, input_scale=scale, weight_scale=1.0), expected
    )


def test_the_integer_bias_is_added_before_the_rounding():
    """2^24 + 1 is no fp32 number: adding in float, or fusing, would lose the one."""
    x = torch.ones(2, 1, dtype=torch.int8)
    w = torch.tensor([[1], [-1], [1]], dtype=torch.int8)
    bias = torch.tensor([2**24, -(2**24), 2**31 - 1], dtype=torch.int32)
    scale = torch.tensor([1 / 3])
    exact = torch.tensor([2**24 + 1, -(2**24) - 1, 2**31], dtype=torch.int64)
    expected = (exact.float() * scale).expand(2, 3)
    packed = PackedWeight.pack(w)
    check_everywhere(
        lambda: quantized_linear(x, packed, bias, input_scale=scale, weight_scale=1.0), expected
    )


def test_scales_that_overflow_or_vanish():
    """sx * sw beyond fp32 gives infinities and NaN, below it zeros, as specified."""
    x = torch.tensor([[1, -1], [0, 0], [127, -128]], dtype=torch.int8)
    w = torch.tensor([[1, 0], [0, 1], [1, 1], [5, -7]], dtype=torch.int8)
    packed, bias = PackedWeight.pack(w), torch.tensor([1.0, INF, -INF, NAN])
    scales = torch.tensor([FLT_MAX, 2.0**-126, NAN]).reshape(3, 1)
    for weight_scale, b, activation in itertools.product(
        (2.0, 2.0**-20, FLT_MAX), (None, bias), ACTIVATIONS
    ):
        options = {"input_scale": scales, "weight_scale": weight_scale, "activation": activation}
        check_everywhere(
            lambda: quantized_linear(x, packed, b, **options),  # noqa: B023
            functional.quantized_linear(x, w, b, **options),
        )
        options |= {"output_scale": 0.5, "output_zero_point": 9}
        check_everywhere(
            lambda: quantized_linear(x, packed, b, **options),  # noqa: B023
            functional.quantized_linear(x, w, b, **options),
        )
