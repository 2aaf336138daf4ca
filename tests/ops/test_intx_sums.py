"""Linear operators on weights of 2 to 8 bits: their sums are exact, in order, and fused."""

import itertools

import pytest
import torch
from support import (
    ACTIVATIONS,
    FLT_MAX,
    INF,
    NAN,
    Shape,
    assert_same_bits,
    check_everywhere,
    floats,
    positive,
)
from support.intx_cases import few_bits
from support.intx_layers import BITS, Layer, check_dynamic, check_static
from torch import Tensor

from torchquant import functional, ops

MOST_INPUTS = {bits: 33_025 if bits == 8 else 65_793 for bits in BITS}


def check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int | None = None,
    **options: object,
) -> Tensor:
    """The specification's bits everywhere; returns them."""
    how = {"bits": bits, "group_size": group_size}
    expected = functional.linear_dynamic_intx(x, weight, scale, zero, bias, **how, **options)
    packed = ops.pack_intx_weight(weight, scale, zero, **how)
    sizes = {**how, "out_features": weight.shape[0], "has_zero_point": zero is not None}
    check_everywhere(
        lambda: ops.linear_dynamic_intx(x, packed, bias, **sizes, **options), expected, what=how
    )
    return expected


# ---------------------------------------------------------------- the same layer in other words


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_one_scale_per_channel_is_linear_dynamic(isa, bits, symmetric):
    for rows, zero_points in ((1, False), (3, True), (20, True)):
        layer = Layer(Shape(rows, 35, 150), bits, None, zero_points, True, "gelu", seed=rows)
        x, (scale, zero) = layer.input(spice="not_finite"), layer.scales
        options = {"symmetric": symmetric, "activation": "gelu", "activation_bits": 7}
        zero = None if zero is None else zero.int()
        packed = ops.pack_weight(layer.weight)
        expected = ops.linear_dynamic(
            x, packed, scale, zero, layer.bias_tensor, out_features=35, **options
        )
        assert_same_bits(ops.linear_dynamic_intx(x, **layer.packed, **options), expected)


@pytest.mark.parametrize("bits", BITS)
def test_one_scale_per_channel_is_linear_static(isa, bits):
    for rows, zero_points in ((1, False), (3, True), (20, True)):
        layer = Layer(Shape(rows, 35, 150), bits, None, zero_points, True, seed=rows)
        x, (scale, zero) = layer.input(spice="not_finite"), layer.scales
        side = torch.tensor([0.3]), torch.tensor([-5], dtype=torch.int32)
        options = {"activation": "silu", "input_qmin": -100, "input_qmax": 90}
        zero = None if zero is None else zero.int()
        packed = ops.pack_weight(layer.weight)
        expected = ops.linear_static(
            x, *side, packed, scale, zero, layer.bias_tensor, out_features=35, **options
        )
        assert_same_bits(ops.linear_static_intx(x, *side, **layer.packed, **options), expected)


@pytest.mark.parametrize("bits", BITS[:-1])
@pytest.mark.parametrize("group_size", [None, 64, 20])
def test_storage_changes_nothing(isa, bits, group_size):
    """The same integers stored in 8 bits: other instructions, the same sums."""
    for rows, zero_points, symmetric in ((1, True, False), (4, False, True), (19, True, False)):
        layer = Layer(Shape(rows, 40, 140), bits, group_size, zero_points, seed=bits)
        x = layer.input()
        wide = ops.pack_intx_weight(layer.weight, *layer.scales, bits=8, group_size=layer.size)
        narrow = layer.packed
        expected = ops.linear_dynamic_intx(x, **narrow, symmetric=symmetric)
        as_bytes = {**narrow, "packed": wide, "bits": 8}
        assert_same_bits(ops.linear_dynamic_intx(x, **as_bytes, symmetric=symmetric), expected)


def test_static_is_dynamic_with_the_rows_own_scale(isa):
    """A single row, quantized with the scale that the dynamic operator would choose for it."""
    layer = Layer(Shape(1, 35, 140), 4, 32, True, bias=True)
    x, packed = layer.input(), layer.packed
    for symmetric in (True, False):
        _, scale, zero = ops.quantize_per_token(x, symmetric=symmetric)
        limits = {"input_qmin": -127 if symmetric else -128}
        got = ops.linear_static_intx(x, scale.reshape(1), zero.reshape(1), **packed, **limits)
        assert_same_bits(got, ops.linear_dynamic_intx(x, **packed, symmetric=symmetric))


# ---------------------------------------------------------------- extreme integers


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_extreme_products(bits, rows):
    """All weights at an end, all activations at an end: where sums of 16 bits would saturate."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ends = torch.tensor([low, high], dtype=torch.int8)
    weight = ends.repeat(9).reshape(18, 1).expand(18, 200)
    alternating = ends.repeat(100).expand(2, 200)
    weight = torch.cat([weight, alternating, -1 - alternating])
    up, down = torch.ones(1, 200), torch.full((1, 200), -1.0)
    down[0, 0] = 0.99  # an asymmetric row: nearly all are -128
    for group_size, row, symmetric in itertools.product((None, 64), (up, down), (True, False)):
        shape = (22,) if group_size is None else (22, 4)
        x, scale = row.expand(rows, 200), positive(*shape)
        for zero in (None, few_bits(*shape, bits=bits, seed=1)):
            check(x, weight, scale, zero, bits=bits, group_size=group_size, symmetric=symmetric)


@pytest.mark.parametrize("bits", BITS)
def test_activations_of_minus_128(bits):
    """Every integer of a row is -128: static scales can do that."""
    x, one = torch.full((5, 140), -1e9), torch.ones(1)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = torch.tensor([low, high, 0], dtype=torch.int8).repeat(6).reshape(18, 1).expand(18, 140)
    scale = torch.ones(18, 3)
    packed = ops.pack_intx_weight(weight, scale, bits=bits, group_size=64)
    for value in (-128, 127):
        zero = torch.tensor([127 if value == -128 else -128], dtype=torch.int32)
        expected = (value - zero) * weight.int().sum(1).expand(5, 18)
        check_everywhere(
            lambda: ops.linear_static_intx(
                x * (-1 if value == 127 else 1),  # noqa: B023
                one,
                zero,  # noqa: B023
                packed,
                out_features=18,
                bits=bits,
                group_size=64,
            ),
            expected.float(),
        )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grouped", [False, True], ids=["channels", "a group"])
def test_the_deepest_sums_are_exact(bits, grouped):
    """As many inputs of one scale as are allowed, and sums as large as they can be."""
    inputs = MOST_INPUTS[bits]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = torch.tensor([low, high, low, high], dtype=torch.int8).reshape(4, 1).repeat(1, inputs)
    weight[2:, ::2] = few_bits(2, inputs, bits=bits)[:, ::2]
    x = torch.ones(3, inputs)
    x[1, 1:], x[2] = -1.0, floats(inputs)
    zero = torch.tensor([high, low, high, 0], dtype=torch.int8)
    scale = positive(4)
    if grouped:
        scale, zero = scale.reshape(4, 1), zero.reshape(4, 1)
    for symmetric, z in itertools.product((True, False), (None, zero)):
        size = inputs if grouped else None
        check(x, weight, scale, z, bits=bits, group_size=size, symmetric=symmetric)


def test_the_deepest_static_sums_are_exact():
    """(-128 - 127) * (-128 - 127) * 33,025 is the greatest sum of all."""
    weight = torch.full((2, 33_025), -128, dtype=torch.int8)
    zero = torch.full((2, 1), 127, dtype=torch.int8)
    packed = ops.pack_intx_weight(weight, torch.ones(2, 1), zero, bits=8, group_size=33_025)
    x, zero_x = torch.full((3, 33_025), -1e9), torch.tensor([127], dtype=torch.int32)
    sizes = {"out_features": 2, "bits": 8, "group_size": 33_025, "has_zero_point": True}
    check_everywhere(
        lambda: ops.linear_static_intx(x, torch.ones(1), zero_x, packed, **sizes),
        torch.full((3, 2), 255.0 * 255 * 33_025),
    )


# ---------------------------------------------------------------- the order of the roundings


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_groups_are_added_in_ascending_order(rows):
    """2^24 and then -2^24 leave room for ones in between, or not, depending on the order."""
    weight = torch.ones(17, 4 * 32, dtype=torch.int8)
    x = torch.zeros(rows, 4 * 32)
    x[:, ::32] = 127.0
    big, one = 2.0**24 / 127, 1.0 / 127
    results = []
    for order in ((big, one, one, -big), (one, one, big, -big), (big, -big, one, one)):
        scale = torch.tensor(order).expand(17, 4)
        results.append(check(x, weight, scale, bits=2, group_size=32))
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("rows", [1, 6])
def test_a_groups_scale_is_fused(rows):
    """t + acc * scale where one and two roundings differ."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 640, generator=generator)
    weight, scale = few_bits(100, 640, bits=4), positive(100, 20)
    y = check(x, weight, scale, bits=4, group_size=32)
    q, sx, _ = functional.quantize_per_token(x)
    t = torch.zeros(rows, 100)
    for g in range(20):
        part = slice(32 * g, 32 * g + 32)
        t = t + (q[:, part].float() @ weight[:, part].float().t()) * scale[:, g]
    assert not torch.equal(y, t * sx)
    torch.testing.assert_close(y, t * sx, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 6])
def test_the_bias_is_fused(rows):
    """t * scale + bias where one and two roundings differ: t is scaled by the row, then added."""
    x = torch.tensor([[1 + 2.0**-23] * 32]).expand(rows, 32)
    weight = torch.ones(130, 32, dtype=torch.int8)
    scale = positive(130, 1)
    sx = functional.quantize_per_token(x)[1]
    t = functional.fmaf(torch.full((1, 130), 127.0 * 32), scale[:, 0], 0.0)
    bias = -(t * sx[:1])[0]
    y = check(x, weight, scale, None, bias, bits=2, group_size=32)
    assert y.any(), "two roundings would give 0"


@pytest.mark.parametrize("group_size", [None, 32])
def test_scales_that_overflow_or_vanish(group_size):
    """Scales beyond fp32's range of products give infinities, NaN and zeros, as specified."""
    x, weight = floats(6, 96, seed=3), few_bits(18, 96, bits=4)
    bias = torch.tensor([1.0, INF, -INF, NAN, 0.0, -0.0]).repeat(3)
    shape = (18,) if group_size is None else (18, 3)
    for value in (2.0**-126, 2.0**-100, FLT_MAX, 1e36, INF, NAN):
        scale = torch.full(shape, value)
        scale[::2] = positive(*shape)[::2]
        for b, activation in itertools.product((None, bias), ACTIVATIONS[::3]):
            how = {"bits": 4, "group_size": group_size, "activation": activation}
            check(x * 1e20, weight, scale, None, b, **how)


def test_a_sum_of_zero_is_positive_zero():
    """As in the int8 layers: the integer 0 has no sign, and t begins at +0."""
    for group_size in (None, 2):
        shape = (16,) if group_size is None else (16, 2)
        weight = torch.full((16, 4), -2, dtype=torch.int8)
        y = check(torch.zeros(3, 4), weight, torch.ones(shape), bits=2, group_size=group_size)
        assert not y.signbit().any()


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 5])
def test_fused_is_unfused(isa, activation, rows):
    layer = Layer(Shape(rows, 35, 72), 4, 32, True, bias=True)
    x, packed = layer.input(torch.bfloat16, "extreme"), layer.packed
    side = torch.tensor([0.3]), torch.tensor([-5], dtype=torch.int32)
    for call in (
        lambda **options: ops.linear_dynamic_intx(x, **packed, symmetric=False, **options),
        lambda **options: ops.linear_static_intx(x, *side, **packed, **options),
    ):
        plain = call(output_dtype=torch.float32)
        wanted = functional.ACTIVATIONS[activation](plain).to(torch.float16)
        assert_same_bits(call(activation=activation, output_dtype=torch.float16), wanted)


def test_dequantized_values_are_the_product_of_the_dequantized_weight():
    """Not bits: that the layer is about F.linear of the values that the integers represent."""
    for bits, group_size in itertools.product(BITS, (None, 20)):
        layer = Layer(Shape(4, 30, 90), bits, group_size, True)
        (scale, zero), x = layer.scales, layer.input()
        if group_size is None:
            scale, zero = scale.reshape(-1, 1), zero.reshape(-1, 1)
        size = group_size or 90
        wide = [t.repeat_interleave(size, 1)[:, :90] for t in (scale, zero)]
        values = (layer.weight.float() - wide[1]) * wide[0]
        expected = torch.nn.functional.linear(x, values)
        got = ops.linear_dynamic_intx(x, **layer.packed)
        assert (got - expected).norm() < 0.02 * expected.norm(), (bits, group_size)


def test_minimal_layers():
    for bits in BITS:
        check_dynamic(Layer(Shape(1, 1, 1), bits, 1, True, bias=True))
        check_static(Layer(Shape(1, 1, 1), bits, None, True, bias=True))
