"""Linear operators on weights of 2 to 8 bits give the bits of their specification, everywhere.

The specification (`torchquant.functional`) adds integers in float64 and has an exact fmaf, so it
cannot share a mistake with the kernels; tests/functional compares it with rational numbers.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ACTIVATIONS, FLOATS, NAN, SPICES, Shape, assert_same_bits
from support.intx_layers import (
    BITS,
    FLOAT_DTYPES,
    GROUPS,
    Layer,
    check_dynamic,
    check_static,
    layers,
)

from torchquant import ops

ALL_BITS = pytest.mark.parametrize("bits", BITS)
ALL_GROUPS = pytest.mark.parametrize("group_size", GROUPS)


@settings(max_examples=50)
@given(
    layer=layers(),
    dtype=FLOAT_DTYPES,
    output_dtype=st.sampled_from((None, *FLOATS)),
    symmetric=st.booleans(),
    activation_bits=st.sampled_from((8, 8, 7, 4, 2)),
    spice=st.sampled_from(list(SPICES)),
)
def test_linear_dynamic_intx_is_its_specification(
    layer, dtype, output_dtype, symmetric, activation_bits, spice
):
    check_dynamic(layer, dtype, output_dtype, symmetric, activation_bits, spice)


@settings(max_examples=50)
@given(
    layer=layers(),
    dtype=FLOAT_DTYPES,
    output_dtype=FLOAT_DTYPES,
    zero_point=st.sampled_from((0, -8, 7, 3)),
    limits=st.sampled_from(((-128, 127), (-127, 127), (-8, 7))),
    spice=st.sampled_from(list(SPICES)),
)
def test_linear_static_intx_is_its_specification(
    layer, dtype, output_dtype, zero_point, limits, spice
):
    check_static(layer, dtype, zero_point, limits, output_dtype, spice)


@ALL_BITS
@ALL_GROUPS
def test_every_number_of_rows(bits, group_size):
    """One row, few rows, a block of the panel and one more, more than share an unpacked group."""
    for number, rows in enumerate((1, 2, 3, 4, 5, 8, 9, 16, 17, 50)):
        shape = Shape(rows, 35, (70, 160)[number % 2])
        zero_points, symmetric = number % 3 == 0, number % 2 == 0
        layer = Layer(shape, bits, group_size, zero_points, bias=number % 4 > 0, seed=number)
        check_dynamic(layer, symmetric=symmetric)


@ALL_BITS
def test_every_number_of_outputs(bits):
    """Whole tiles of 16 outputs, parts of one, several side by side."""
    for number, outputs in enumerate((1, 15, 16, 17, 31, 32, 33, 64, 79, 130)):
        layer = Layer(Shape((1, 3, 7)[number % 3], outputs, 96), bits, 64, number % 2 == 0)
        check_dynamic(layer, symmetric=number % 2 == 0)
        check_static(layer, zero_point=-5)


@ALL_BITS
@pytest.mark.parametrize("rows", [1, 31])
def test_a_row_alone_by_many_outputs(bits, rows):
    """One row, also behind blocks of several rows: more tiles of outputs than share a step."""
    for group_size in (32, None):
        layer = Layer(Shape(rows, 621, 70), bits, group_size, zero_points=group_size is not None)
        check_dynamic(layer, symmetric=bits % 2 == 0)


@pytest.mark.parametrize("inputs", range(1, 131, 3))
def test_every_tail_of_a_row(inputs):
    """The last group ends anywhere in a block of 32 inputs, and in a quad of 4."""
    for rows, dtype, bits in zip((1, 3, 6), FLOATS, (4, 3, 8), strict=True):
        for group_size in (None, 32, 20):
            layer = Layer(Shape(rows, 18, inputs), bits, group_size, rows == 3, seed=inputs)
            check_dynamic(layer, dtype, symmetric=rows == 1)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 7, 31, 33, 63, 65, 100, 500])
def test_every_size_of_a_group(group_size):
    for rows, bits in itertools.product((1, 6), (4, 5)):
        layer = Layer(Shape(rows, 18, 300), bits, group_size, True, bias=True, seed=group_size)
        check_dynamic(layer, symmetric=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_epilogue(activation, dtype):
    """Whole vectors and a tail, each type of output, per channel and in groups."""
    for rows, group_size in ((1, 32), (6, 32), (2, None), (5, None)):
        layer = Layer(Shape(rows, 47, 40), 4, group_size, bias=rows % 2 > 0, activation=activation)
        check_dynamic(layer, output_dtype=dtype)
        check_static(layer, output_dtype=dtype)


@ALL_BITS
def test_threads(bits):
    """More threads than processors; the work is divided by tiles, and rows by panels."""
    for rows, group_size in ((1, 128), (3, None), (70, 64)):
        layer = Layer(Shape(rows, 300, 520), bits, group_size, True, bias=True)
        check_dynamic(layer, symmetric=False, counts=(1, 2, 5))
    check_static(Layer(Shape(9, 260, 520), bits, 64), zero_point=7, counts=(1, 3))


def test_groups_of_more_blocks_than_are_unpacked_at_a_time():
    """Kernels unpack up to 64 blocks of 32 inputs: the sums of longer groups are in parts."""
    for bits, group_size, rows in ((4, 2048, 5), (4, 2049, 9), (3, None, 6), (8, 4100, 17)):
        for symmetric in (True, False):
            layer = Layer(Shape(rows, 20, 4200), bits, group_size, symmetric, seed=bits)
            check_dynamic(layer, symmetric=symmetric)


def test_more_rows_than_a_panel_holds():
    """The panel of quantized rows has a limit in bytes; what remains is the next panel."""
    check_dynamic(Layer(Shape(300, 18, 4096), 4, 128, True, bias=True), symmetric=False)


def test_the_same_call_twice_and_after_others(isa):
    """Scratch memory is reused: leftovers of an earlier, larger call must not matter."""
    layer = Layer(Shape(5, 20, 70), 3, 20, True, bias=True)
    x, packed = layer.input(), layer.packed
    first = ops.linear_dynamic_intx(x, **packed, symmetric=False)
    for shape in (Shape(200, 16, 500), Shape(3, 100, 64), Shape(1, 1, 1000)):
        other = replace(layer, shape=shape, bits=8, group_size=None)
        big = torch.full((shape.rows, shape.inputs), NAN)
        ops.linear_dynamic_intx(big, **other.packed)
        ops.linear_static_intx(torch.zeros_like(big), torch.ones(1), None, **other.packed)
        assert_same_bits(ops.linear_dynamic_intx(x, **packed, symmetric=False), first)
