"""A row's bits depend on nothing but the row: batches, neighbours, memory layouts."""

import itertools
import math

import pytest
import torch
from support import (
    FLOATS,
    LAYOUTS,
    NOT_FINITE,
    Shape,
    assert_same_bits,
    check_everywhere,
    floats,
    in_layout,
    integers,
    positive,
)
from support.linear_layers import (
    Layer,
)

from torchquant import PackedWeight, functional, ops, quantized_linear


def batch_splits(rows: int) -> list[list[int]]:
    return [
        [1] * rows,
        [rows - 1, 1],
        [2, 3, rows - 5],
        [16, rows - 16],
        [0, rows],
        [31, 2, rows - 33],
    ]


@pytest.mark.parametrize("shape", [Shape(70, 50, 100), Shape(40, 300, 257)], ids=["small", "wide"])
def test_a_row_alone_is_the_row_in_any_batch(isa, shape):
    layer = Layer(shape, bias="float", weight_zero_point=True, activation="gelu")
    x = layer.float_input(torch.float32, "not_finite")
    xq = layer.integer_input(torch.uint8)
    packed, side, bias = ops.pack_weight(layer.weight), layer.weight_side, layer.bias_tensor
    scale, zero = torch.tensor([0.02]), torch.tensor([5], dtype=torch.int32)
    calls = {
        "symmetric": (x, lambda part: ops.linear_dynamic(part, packed, **side, bias=bias, **n)),
        "asymmetric": (
            x,
            lambda part: ops.linear_dynamic(
                part, packed, **side, bias=bias, symmetric=False, **n, activation="silu"
            ),
        ),
        "static": (
            x,
            lambda part: ops.linear_static(part, scale, zero, packed, **side, bias=bias, **n),
        ),
        "integer": (
            xq,
            lambda part: ops.linear_static(part, scale, zero, packed, **side, bias=bias, **n),
        ),
        "int8_mm": (xq, lambda part: ops.int8_mm(part, packed, shape.outputs)),
        "quantize_per_token": (x, lambda part: ops.quantize_per_token(part)[0]),
    }
    n = {"out_features": shape.outputs}
    for name, (batch, call) in calls.items():
        whole = call(batch)
        for split in batch_splits(shape.rows):
            parts = torch.cat([call(part) for part in batch.split(split)])
            assert_same_bits(parts, whole, f"{name} split into {split}")


def test_a_row_with_nan_leaves_the_others_alone(isa):
    layer = Layer(Shape(37, 40, 70), bias="float")
    packed, side, n = ops.pack_weight(layer.weight), layer.weight_side, {"out_features": 40}
    clean = layer.float_input(torch.float32)
    scale, zero = torch.tensor([0.02]), torch.tensor([5], dtype=torch.int32)
    for value, row in itertools.product(NOT_FINITE, (0, 5, 36)):
        x = clean.clone()
        x[row, 69] = value
        others = torch.arange(37) != row
        for symmetric in (True, False):
            y = ops.linear_dynamic(x, packed, **side, **n, symmetric=symmetric)
            expected = ops.linear_dynamic(clean, packed, **side, **n, symmetric=symmetric)
            assert y[row].isnan().all()
            assert_same_bits(y[others], expected[others])
        y = ops.linear_static(x, scale, zero, packed, **side, **n)
        assert_same_bits(
            y[others], ops.linear_static(clean, scale, zero, packed, **side, **n)[others]
        )
        assert y[row].isnan().all() == math.isnan(value)
        quantized = ops.linear_static(
            x,
            scale,
            zero,
            packed,
            **side,
            **n,
            output_scale=torch.tensor([1.0]),
            output_zero_point=-3,
            output_dtype=torch.int8,
        )
        if math.isnan(value):
            assert quantized[row].eq(-3).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("leading", [(6,), (2, 3), (2, 1, 3)], ids=str)
def test_layout_of_the_input_does_not_matter(layout, leading):
    weight, side = integers(20, 33), Layer(Shape(6, 20, 33)).weight_side
    packed = ops.pack_weight(weight)
    for dtype in FLOATS:
        x = in_layout(floats(*leading, 33).to(dtype), layout)
        check_everywhere(
            lambda: ops.linear_dynamic(x, packed, **side, out_features=20),  # noqa: B023
            functional.linear_dynamic(x, weight, **side),
        )
        check_everywhere(
            lambda: ops.quantize_per_token(x, symmetric=False),  # noqa: B023
            functional.quantize_per_token(x, symmetric=False),
        )
    xq = in_layout(integers(*leading, 33), layout)
    check_everywhere(
        lambda: quantized_linear(xq, PackedWeight(packed, 20, 33), input_scale=0.1, **side),
        functional.quantized_linear(xq, weight, input_scale=0.1, **side),
    )


def test_expanded_tensors():
    row, weight = floats(1, 40), integers(20, 40)
    packed, x = ops.pack_weight(weight), row.expand(35, 40)
    bias, scale = torch.tensor([0.5]).expand(20), torch.tensor([0.1]).expand(20)
    zero = torch.tensor([3], dtype=torch.int32).expand(20)
    check_everywhere(
        lambda: ops.linear_dynamic(x, packed, scale, zero, bias, out_features=20),
        functional.linear_dynamic(x, weight, scale, zero, bias),
    )
    column = floats(35, 1).expand(35, 40)
    check_everywhere(
        lambda: ops.linear_dynamic(column, packed, scale, out_features=20),
        functional.linear_dynamic(column, weight, weight_scale=scale),
    )
    weights = integers(1, 40).expand(20, 40)
    check_everywhere(
        lambda: ops.int8_mm(integers(5, 40, seed=1), ops.pack_weight(weights), 20),
        (integers(5, 40, seed=1).int() @ weights.int().t()),
    )


def test_parameters_in_any_layout():
    layer = Layer(Shape(9, 21, 40), bias="float", weight_zero_point=True)
    x, side, packed = layer.float_input(torch.float32), layer.weight_side, layer.weight
    expected = functional.linear_dynamic(x, packed, bias=layer.bias_tensor, **side)
    packed = in_layout(ops.pack_weight(packed), "offset")  # contiguous, at an odd address
    assert packed.data_ptr() % 2 == 1
    for layout in ("offset", "strided"):
        scale, zero, bias = (
            in_layout(t, layout)
            for t in (side["weight_scale"], side["weight_zero_point"], layer.bias_tensor)
        )
        check_everywhere(
            lambda: ops.linear_dynamic(x, packed, scale, zero, bias, out_features=21),  # noqa: B023
            expected,
        )
    rows = in_layout(positive(9, 1), "strided")
    zeros = in_layout(integers(9, 1).int(), "strided")
    xq = layer.integer_input(torch.int8)
    check_everywhere(
        lambda: quantized_linear(
            xq, PackedWeight(packed, 21, 40), input_scale=rows, input_zero_point=zeros, **side
        ),
        functional.quantized_linear(
            xq, layer.weight, input_scale=rows, input_zero_point=zeros, **side
        ),
    )


@pytest.mark.parametrize("rows", [0, 1], ids=["no_rows", "one_row"])
@pytest.mark.parametrize("leading", [(), (0,), (2, 0)], ids=str)
def test_empty_and_one_dimensional_batches(rows, leading):
    """No rows at all, and [K] without a batch dimension."""
    shape = (*leading, rows, 30) if leading or not rows else (30,)
    weight, packed = integers(7, 30), ops.pack_weight(integers(7, 30))
    side = Layer(Shape(1, 7, 30)).weight_side
    x = floats(*shape) if math.prod(shape) else torch.empty(shape)
    q = integers(*shape)
    check_everywhere(
        lambda: ops.linear_dynamic(x, packed, **side, out_features=7),
        functional.linear_dynamic(x, weight, **side),
    )
    check_everywhere(
        lambda: quantized_linear(q, PackedWeight(packed, 7, 30), input_scale=0.1, **side),
        functional.quantized_linear(q, weight, input_scale=0.1, **side),
    )
    check_everywhere(lambda: ops.int8_mm(q, packed, 7), q.int() @ weight.int().t())
    check_everywhere(lambda: ops.quantize_per_token(x), functional.quantize_per_token(x))
    check_everywhere(lambda: ops.quantize(x, 0.1), functional.quantize(x, 0.1))
    check_everywhere(lambda: ops.dequantize(q, 0.1), functional.dequantize(q, 0.1))
