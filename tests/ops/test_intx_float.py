"""linear_intx, float activations on weights of 2 to 8 bits, has the bits of its specification."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ACTIVATIONS,
    FLOATS,
    LAYOUTS,
    NAN,
    NOT_FINITE,
    SPICES,
    Shape,
    assert_same_bits,
    check_everywhere,
    floats,
    in_layout,
)
from support.intx_layers import BITS, FLOAT_DTYPES, GROUPS, Layer, check_float, layers

from torchquant import functional, ops

ALL_BITS = pytest.mark.parametrize("bits", BITS)


@settings(max_examples=50)
@given(
    layer=layers(),
    dtype=FLOAT_DTYPES,
    output_dtype=st.sampled_from((None, *FLOATS)),
    spice=st.sampled_from(list(SPICES)),
)
def test_linear_intx_is_its_specification(layer, dtype, output_dtype, spice):
    check_float(layer, dtype, output_dtype, spice)


@ALL_BITS
@pytest.mark.parametrize("group_size", GROUPS)
def test_every_number_of_rows(bits, group_size):
    """All heights of a register tile, a block of the panel and one more, and many rows."""
    for number, rows in enumerate((1, 2, 3, 4, 5, 6, 7, 8, 9, 50)):
        shape = Shape(rows, (35, 70)[number % 2], (70, 160)[number % 3 == 0])
        layer = Layer(shape, bits, group_size, number % 2 == 0, number % 4 > 0, seed=number)
        check_float(layer)
        if rows <= 2:  # with and without a table of weights
            check_float(replace(layer, zero_points=not layer.zero_points))


@ALL_BITS
def test_every_number_of_outputs(bits):
    """Whole tiles of 16 outputs, parts of one, several side by side and what remains of those."""
    for number, outputs in enumerate((1, 15, 16, 17, 32, 33, 48, 64, 79, 130)):
        check_float(Layer(Shape((1, 2, 3)[number % 3], outputs, 96), bits, 64, number % 2 == 0))


@pytest.mark.parametrize("inputs", range(1, 131, 3))
def test_every_tail_of_a_row(inputs):
    """The last group ends anywhere in a block of 32 inputs, and in a quad of 4."""
    for rows, dtype, bits in zip((1, 3, 9), FLOATS, (4, 3, 8), strict=True):
        for group_size in (None, 20):
            check_float(Layer(Shape(rows, 18, inputs), bits, group_size, rows == 3), dtype)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 7, 31, 33, 63, 65, 100, 129, 500])
def test_every_size_of_a_group(group_size):
    for rows, bits in itertools.product((1, 9), (4, 5)):
        check_float(Layer(Shape(rows, 18, 300), bits, group_size, True, True, seed=group_size))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_epilogue(dtype):
    """Whole vectors and a tail, each activation, each type of output."""
    for activation, rows in itertools.product(ACTIVATIONS, (1, 5)):
        layer = Layer(Shape(rows, 47, 40), 4, 32, bias=rows == 1, activation=activation)
        check_float(layer, output_dtype=dtype)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_threads(bits):
    """More threads than processors; the work is divided by tiles, and rows by panels."""
    for rows, group_size in ((1, 128), (3, None), (70, 64)):
        check_float(Layer(Shape(rows, 300, 520), bits, group_size, True, True), counts=(1, 2, 5))


def test_more_rows_than_a_panel_holds():
    check_float(Layer(Shape(70, 18, 4096), 4, 128, bias=True), counts=(1, 2))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_at_the_ends_of_their_range(bits):
    """The greatest differences u - zero, and the weights that a table begins and ends with."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for value, zero in itertools.product((low, high, 0), (low, high, None)):
        weight = torch.full((20, 70), value, dtype=torch.int8)
        scale = torch.full((20, 3), 2.0**-10)
        zeros = None if zero is None else torch.full((20, 3), zero, dtype=torch.int8)
        packed = ops.pack_intx_weight(weight, scale, zeros, bits=bits, group_size=32)
        options = {"bits": bits, "group_size": 32}
        for rows in (1, 2, 9):
            x = floats(rows, 70, seed=rows)
            expected = functional.linear_intx(x, weight, scale, zeros, **options)
            given = {"out_features": 20, "has_zero_point": zero is not None, **options}
            check_everywhere(lambda: ops.linear_intx(x, packed, **given), expected)  # noqa: B023


@pytest.mark.parametrize("group_size", [None, 20])
def test_a_row_alone_is_the_row_in_any_batch(isa, group_size):
    layer = Layer(Shape(70, 50, 100), 5, group_size, True, bias=True)
    x, packed = layer.input(spice="not_finite"), layer.packed
    whole = ops.linear_intx(x, **packed)
    for split in ([1] * 70, [2, 3, 65], [4, 5, 8, 53], [16, 54], [0, 70], [31, 2, 37]):
        parts = torch.cat([ops.linear_intx(part, **packed) for part in x.split(split)])
        assert_same_bits(parts, whole, f"split into {split}")


def test_a_row_that_is_not_finite_leaves_the_others_alone(isa):
    for rows in (3, 37):
        layer = Layer(Shape(rows, 40, 70), 4, 32, bias=True)
        clean, packed = layer.input(), layer.packed
        expected = ops.linear_intx(clean, **packed)
        for value, row in itertools.product(NOT_FINITE, {0, rows // 2, rows - 1}):
            x = clean.clone()
            x[row, 69] = value
            got, others = ops.linear_intx(x, **packed), torch.arange(rows) != row
            assert_same_bits(got[others], expected[others])
            assert not got[row].isfinite().any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_in_any_layout(layout):
    for rows, dtype in itertools.product((1, 5), FLOATS):
        check_float(Layer(Shape(rows, 20, 40), 4, 32, layout=layout), dtype)


def test_parameters_in_any_layout():
    layer = Layer(Shape(9, 21, 40), 5, 32, True, bias=True)
    weight = in_layout(layer.packed["packed"], "offset")  # contiguous, at an odd address
    for rows, layout in itertools.product((1, 9), ("offset", "strided")):
        x, bias = layer.input()[:rows], in_layout(layer.packed["bias"], layout)
        given = {**layer.packed, "packed": weight, "bias": bias}
        expected = functional.linear_intx(x, **layer.canonical)
        check_everywhere(lambda: ops.linear_intx(x, **given), expected)  # noqa: B023


def test_batches_of_any_shape():
    layer = Layer(Shape(1, 7, 30), 4, 20, True, bias=True, activation="silu")
    for shape in ((30,), (0, 30), (2, 0, 30), (0, 1, 30), (2, 3, 30), (1, 1, 30)):
        x = floats(1, 30).expand(6, 30)[:1].expand(shape) if 0 in shape else floats(*shape)
        expected = functional.linear_intx(x, **layer.canonical)
        assert expected.shape == (*shape[:-1], 7)
        check_everywhere(lambda: ops.linear_intx(x, **layer.packed), expected)  # noqa: B023


def test_the_same_call_twice_and_after_others(isa):
    """Scratch memory is reused: leftovers of an earlier, larger call must not matter."""
    layer = Layer(Shape(5, 20, 70), 3, 20, True, bias=True)
    x, packed = layer.input(), layer.packed
    first = ops.linear_intx(x, **packed)
    for shape in (Shape(100, 16, 500), Shape(3, 100, 64), Shape(1, 1, 1000)):
        other = replace(layer, shape=shape, bits=8, group_size=None)
        big = torch.full((shape.rows, shape.inputs), NAN)
        ops.linear_intx(big, **other.packed)
        ops.linear_dynamic_intx(torch.zeros_like(big), **other.packed)
        assert_same_bits(ops.linear_intx(x, **packed), first)


@ALL_BITS
def test_close_to_the_product_with_the_weight_that_the_integers_mean(bits):
    """Within the bound of a sum of fp32 products, against float64."""
    layer = Layer(Shape(9, 64, 512), bits, 128, True)
    x, (scale, zero) = layer.input(), layer.scales
    weight = (
        layer.weight.double() - zero.repeat_interleave(128, 1)
    ) * scale.double().repeat_interleave(128, 1)
    got = ops.linear_intx(x, **layer.packed)
    bound = (128 + 4 + 1) * 2.0**-24 * (x.double().abs() @ weight.abs().t())
    assert ((got.double() - x.double() @ weight.t()).abs() <= bound).all()
