"""Linear operators give the bits of their specification, on every instruction set.

The other side of each comparison is `torchquant.functional` (or integers in plain torch): with
float64 sums of integers and an exact fmaf it cannot share a mistake with the kernels.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ACTIVATIONS,
    FLOATS,
    NAN,
    Shape,
    assert_same_bits,
    check_everywhere,
)
from support.linear_layers import (
    FLOAT_DTYPES,
    SPICES,
    Layer,
    activation_at,
    check_dynamic,
    check_integer,
    check_static,
    layers,
    shape_classes,
)

from torchquant import ops

INTEGER_OUTPUTS = st.one_of(
    st.builds(
        lambda bits, scale, zero: {
            "output_scale": scale,
            "output_bits": bits,
            "output_zero_point": zero % 2**bits - 2 ** (bits - 1),
        },
        st.integers(2, 8),
        st.sampled_from([0.03, 1.0, 7.5]),
        st.integers(0, 255),
    ),
    st.builds(
        lambda bits, scale, zero: {
            "output_scale": scale,
            "output_bits": bits,
            "output_zero_point": zero % 2**bits,
            "output_dtype": torch.uint8,
        },
        st.integers(2, 8),
        st.sampled_from([0.03, 1.0, 7.5]),
        st.integers(0, 255),
    ),
)


OUTPUTS = st.one_of(st.builds(lambda d: {"output_dtype": d}, FLOAT_DTYPES), INTEGER_OUTPUTS)


@settings(max_examples=60)
@given(
    layer=layers(("none", "float")),
    dtype=FLOAT_DTYPES,
    output_dtype=st.sampled_from((None, *FLOATS)),
    symmetric=st.booleans(),
    spice=st.sampled_from(list(SPICES)),
)
def test_linear_dynamic_is_its_specification(layer, dtype, output_dtype, symmetric, spice):
    check_dynamic(layer, dtype, output_dtype, symmetric, spice)


@settings(max_examples=60)
@given(
    layer=layers(("none", "float", "int32")),
    dtype=st.sampled_from((torch.int8, torch.uint8)),
    per_row=st.booleans(),
    zero_point=st.booleans(),
    output=OUTPUTS,
)
def test_quantized_linear_is_its_specification(layer, dtype, per_row, zero_point, output):
    check_integer(layer, dtype, per_row, zero_point, **output)


@settings(max_examples=60)
@given(
    layer=layers(("none", "float", "int32")),
    dtype=FLOAT_DTYPES,
    zero_point=st.sampled_from((0, -128, 127, 13)),
    spice=st.sampled_from(list(SPICES)),
    output=OUTPUTS,
)
def test_linear_static_of_floats_is_its_specification(layer, dtype, zero_point, spice, output):
    check_static(layer, dtype, zero_point, spice, **output)


@settings(max_examples=40)
@given(
    layer=layers(("none",)),
    dtype=st.sampled_from((torch.int8, torch.uint8)),
)
def test_int8_mm_is_the_integer_product(layer, dtype):
    x, weight = layer.integer_input(dtype), layer.weight
    expected = (x.to(torch.int64) @ weight.to(torch.int64).t()).to(torch.int32)
    packed = ops.pack_weight(weight)
    check_everywhere(lambda: ops.int8_mm(x, packed, layer.shape.outputs), expected, what=layer)


@shape_classes
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_linear_dynamic_at_every_shape(shapes, symmetric):
    for number, shape in enumerate(shapes):
        layer = Layer(
            shape,
            seed=number,
            bias=("float", "none")[number % 2],
            weight_zero_point=not symmetric and number % 3 == 0,
            minus_128=number % 3 > 0,
            activation=activation_at(number, shape),
        )
        check_dynamic(layer, FLOATS[number % 3], symmetric=symmetric, counts=(1, 2))


@shape_classes
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=["int8", "uint8"])
def test_quantized_linear_at_every_shape(shapes, dtype):
    for number, shape in enumerate(shapes):
        layer = Layer(
            shape,
            seed=number,
            bias=("float", "none", "int32")[number % 3],
            weight_zero_point=number % 2 == 0,
            minus_128=number % 4 > 0,
        )
        check_integer(layer, dtype, per_row=number % 5 > 2, counts=(1, 2))


@shape_classes
def test_linear_static_at_every_shape(shapes):
    for number, shape in enumerate(shapes):
        activation = activation_at(number, shape)
        layer = Layer(shape, seed=number, bias="float", activation=activation)
        output = {"output_scale": 3.0, "output_zero_point": 7} if number % 2 else {}
        check_static(layer, FLOATS[number % 3], zero_point=-9, counts=(1, 2), **output)


@shape_classes
def test_int8_mm_at_every_shape(shapes):
    for number, shape in enumerate(shapes):
        layer = Layer(shape, seed=number, minus_128=number % 2 == 0)
        x, packed = layer.integer_input((torch.int8, torch.uint8)[number % 2]), layer.weight
        # Integers below 2^53: exact in float64, whatever the order.
        expected = (x.double() @ packed.double().t()).to(torch.int32)
        packed = ops.pack_weight(packed)
        outputs = shape.outputs
        check_everywhere(lambda: ops.int8_mm(x, packed, outputs), expected, (1, 2), shape)  # noqa: B023


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_every_epilogue(activation, dtype, bias):
    """Whole vectors and every length of tail, each output type, each activation."""
    layer = Layer(Shape(5, 47, 33), bias="float" if bias else "none", activation=activation)
    check_dynamic(layer, output_dtype=dtype)
    check_integer(layer, output_dtype=dtype)
    if dtype == torch.float32:
        for bits, signed in itertools.product((8, 3), (True, False)):
            output = {"output_scale": 2.5, "output_zero_point": 3, "output_bits": bits}
            output |= {} if signed else {"output_dtype": torch.uint8}
            check_integer(layer, **output)
            check_static(layer, **output)


@pytest.mark.parametrize("outputs", range(1, 35))
def test_every_tail_of_columns(outputs):
    for rows in (1, 2, 4, 7, 17):
        check_dynamic(Layer(Shape(rows, outputs, 20), seed=outputs, bias="float"))


@pytest.mark.parametrize("inputs", range(1, 131, 3))
def test_every_tail_of_a_row(inputs):
    for rows, dtype in zip((1, 3, 18), FLOATS, strict=True):
        for symmetric in (True, False):
            layer = Layer(Shape(rows, 18, inputs), seed=inputs, weight_zero_point=True)
            check_dynamic(layer, dtype, symmetric=symmetric)
        check_integer(layer, torch.uint8, per_row=True)


def test_the_same_call_twice_and_after_others(isa):
    """Scratch memory is reused: leftovers of an earlier, larger call must not matter."""
    layer = Layer(Shape(5, 20, 70), bias="float", weight_zero_point=True)
    x, packed, side = layer.float_input(torch.float32), layer.weight, layer.weight_side
    packed = ops.pack_weight(packed)
    first = ops.linear_dynamic(x, packed, **side, out_features=20)
    for shape in (Shape(200, 16, 500), Shape(3, 100, 64), Shape(1, 1, 1000)):
        other = replace(layer, shape=shape)
        big = torch.full((shape.rows, shape.inputs), NAN)
        ops.linear_dynamic(
            big, ops.pack_weight(other.weight), **other.weight_side, out_features=shape.outputs
        )
        ops.int8_mm(
            torch.full(big.shape, -1, dtype=torch.int8),
            ops.pack_weight(other.weight),
            shape.outputs,
        )
        assert_same_bits(ops.linear_dynamic(x, packed, **side, out_features=20), first)


def test_more_threads_than_processors():
    layer = Layer(Shape(150, 260, 300), bias="float", weight_zero_point=True)
    check_dynamic(layer, counts=(1, 2, 5))
    check_integer(layer, per_row=True, counts=(1, 3))
