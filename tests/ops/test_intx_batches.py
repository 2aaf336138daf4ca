"""A row's bits on weights of few bits depend on the row alone: batches, neighbours, layouts."""

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
)
from support.intx_layers import Layer
from torch import Tensor

from torchquant import functional, ops

SCALE, ZERO = torch.tensor([0.02]), torch.tensor([5], dtype=torch.int32)


def batch_splits(rows: int) -> list[list[int]]:
    return [
        [1] * rows,
        [rows - 1, 1],
        [2, 3, rows - 5],
        [4, 5, 8, rows - 17],
        [16, rows - 16],
        [0, rows],
        [31, 2, rows - 33],
    ]


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("group_size", [None, 64, 20])
def test_a_row_alone_is_the_row_in_any_batch(isa, bits, group_size):
    layer = Layer(Shape(70, 50, 100), bits, group_size, True, bias=True)
    x, packed = layer.input(spice="not_finite"), layer.packed
    calls = {
        "symmetric": lambda part: ops.linear_dynamic_intx(part, **packed, activation="gelu"),
        "asymmetric": lambda part: ops.linear_dynamic_intx(part, **packed, symmetric=False),
        "static": lambda part: ops.linear_static_intx(part, SCALE, ZERO, **packed),
    }
    for name, call in calls.items():
        whole = call(x)
        for split in batch_splits(70):
            parts = torch.cat([call(part) for part in x.split(split)])
            assert_same_bits(parts, whole, f"{name} split into {split}")


@pytest.mark.parametrize("group_size", [None, 32])
def test_a_row_that_is_not_finite_leaves_the_others_alone(isa, group_size):
    for rows in (3, 37):
        layer = Layer(Shape(rows, 40, 70), 4, group_size, bias=True)
        clean, packed = layer.input(), layer.packed
        for value, row in itertools.product(NOT_FINITE, {0, rows // 2, rows - 1}):
            x = clean.clone()
            x[row, 69] = value
            others = torch.arange(rows) != row
            for symmetric in (True, False):
                y = ops.linear_dynamic_intx(x, **packed, symmetric=symmetric)
                expected = ops.linear_dynamic_intx(clean, **packed, symmetric=symmetric)
                assert y[row].isnan().all()
                assert_same_bits(y[others], expected[others])
            y = ops.linear_static_intx(x, SCALE, ZERO, **packed)
            expected = ops.linear_static_intx(clean, SCALE, ZERO, **packed)
            assert_same_bits(y[others], expected[others])
            if math.isnan(value):
                assert y[row].isnan().all()
            else:  # infinities saturate
                x[row, 69] = math.copysign(1e9, value)
                assert_same_bits(y, ops.linear_static_intx(x, SCALE, ZERO, **packed))
                assert y.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("leading", [(6,), (2, 3), (2, 1, 3)], ids=str)
def test_layout_of_the_input_does_not_matter(layout, leading):
    layer = Layer(Shape(6, 20, 33), 4, 20, True)
    canonical, packed = layer.canonical, layer.packed
    for dtype in FLOATS:
        x = in_layout(floats(*leading, 33).to(dtype), layout)
        check_everywhere(
            lambda: ops.linear_dynamic_intx(x, **packed),  # noqa: B023
            functional.linear_dynamic_intx(x, **canonical),
        )
        check_everywhere(
            lambda: ops.linear_static_intx(x, SCALE, ZERO, **packed),  # noqa: B023
            functional.linear_static_intx(x, SCALE, ZERO, **canonical),
        )


def test_expanded_tensors():
    layer = Layer(Shape(35, 20, 40), 3, 32)
    canonical, packed = layer.canonical, layer.packed
    bias = torch.tensor([0.5]).expand(20)
    for x in (floats(1, 40).expand(35, 40), floats(35, 1).expand(35, 40)):
        check_everywhere(
            lambda: ops.linear_dynamic_intx(x, **{**packed, "bias": bias}),  # noqa: B023
            functional.linear_dynamic_intx(x, **{**canonical, "bias": bias}),
        )
    weight = layer.weight[:1].expand(20, 40)
    scale = torch.tensor([[0.5, 2.0]]).expand(20, 2)
    again = ops.pack_intx_weight(weight, scale, bits=3, group_size=32)
    assert torch.equal(
        again, ops.pack_intx_weight(weight.clone(), scale.clone(), bits=3, group_size=32)
    )


def test_parameters_in_any_layout():
    layer = Layer(Shape(9, 21, 40), 5, 32, True, bias=True)
    x, packed = layer.input(), layer.packed
    expected = functional.linear_dynamic_intx(x, **layer.canonical)
    weight = in_layout(packed["packed"], "offset")  # contiguous, at an odd address
    assert weight.data_ptr() % 2 == 1
    for layout in ("offset", "strided"):
        bias = in_layout(packed["bias"], layout)
        check_everywhere(
            lambda: ops.linear_dynamic_intx(x, **{**packed, "packed": weight, "bias": bias}),  # noqa: B023
            expected,
        )


@pytest.mark.parametrize("rows", [0, 1], ids=["no_rows", "one_row"])
@pytest.mark.parametrize("leading", [(), (0,), (2, 0)], ids=str)
def test_empty_and_one_dimensional_batches(rows, leading):
    """No rows at all, and [K] without a batch dimension."""
    shape = (*leading, rows, 30) if leading or not rows else (30,)
    x = floats(*shape) if math.prod(shape) else torch.empty(shape)
    for group_size in (None, 20):
        layer = Layer(Shape(1, 7, 30), 4, group_size, True, bias=True, activation="silu")
        packed, canonical = layer.packed, layer.canonical

        def dynamic(given: Tensor = x, packed: dict[str, object] = packed) -> Tensor:
            return ops.linear_dynamic_intx(given, **packed)

        def static(given: Tensor = x, packed: dict[str, object] = packed) -> Tensor:
            return ops.linear_static_intx(given, SCALE, ZERO, **packed)

        check_everywhere(dynamic, functional.linear_dynamic_intx(x, **canonical))
        check_everywhere(static, functional.linear_static_intx(x, SCALE, ZERO, **canonical))
