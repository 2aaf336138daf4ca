"""linear_dynamic_split: the bits of its layers alone."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ACTIVATIONS,
    FLOATS,
    LAYOUTS,
    NOT_FINITE,
    Shape,
    assert_same_bits,
    check_everywhere,
    floats,
    in_layout,
    sprinkle,
)
from support.split_layers import OUTPUTS, layers
from torch import Tensor

from torchquant import functional, ops
from torchquant._extension import load


@settings(max_examples=150)
@given(data=st.data())
def test_bits_of_the_layers_alone(data):
    """On every instruction set, for any number of layers of any size and kind."""
    outputs = tuple(data.draw(st.lists(st.sampled_from(OUTPUTS), min_size=1, max_size=5)))
    inputs = data.draw(st.integers(1, 200) | st.sampled_from((256, 384, 577)))
    rows = data.draw(st.integers(0, 40) | st.sampled_from((64, 130)))
    names = st.lists(st.sampled_from(ACTIVATIONS), min_size=len(outputs), max_size=len(outputs))
    case = layers(
        outputs,
        inputs,
        zero_points=data.draw(st.booleans()),
        biases=data.draw(st.booleans()),
        activations=tuple(data.draw(st.just([]) | names)),
        symmetric=data.draw(st.booleans()),
        output_dtype=data.draw(st.sampled_from((None, *FLOATS))),
        seed=data.draw(st.integers(0, 9)),
    )
    x = floats(rows, inputs, seed=len(outputs)).to(data.draw(st.sampled_from(FLOATS)))
    check_everywhere(lambda: case.together(x), case.alone(x), (1, 2))


@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        (Shape(600, 1152, 384), (384, 384, 384)),
        (Shape(70, 1100, 300), (1000, 1, 99)),
        (Shape(1, 3072, 2048), (2048, 512, 512)),
        (Shape(33, 96, 4097), (16, 80)),
        (Shape(2, 5000, 96), (2500, 2500)),
        (Shape(1025, 33, 130), (32, 1)),
    ],
    ids=["encoder", "odd", "grouped_queries", "deep", "wide", "many_rows"],
)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_bits_of_large_layers(shape, outputs, symmetric):
    """Several panels of rows, slices of K and threads that share a layer or span two."""
    assert sum(outputs) == shape.outputs
    case = layers(outputs, shape.inputs, zero_points=not symmetric, symmetric=symmetric)
    x = floats(shape.rows, shape.inputs)
    check_everywhere(lambda: case.together(x), case.alone(x), (1, 2, 3))


def test_bits_of_the_specification():
    names = ("gelu", "none", "silu")
    for symmetric, zero_points in itertools.product((True, False), repeat=2):
        case = layers(
            (20, 16, 3), 70, zero_points=zero_points, activations=names, symmetric=symmetric
        )
        x = floats(6, 70)
        for i, got in enumerate(case.together(x)):
            expected = functional.linear_dynamic(
                x,
                case.weights[i],
                case.scales[i],
                case.zero_points[i] if zero_points else None,
                case.biases[i],
                symmetric=symmetric,
                activation=names[i],
            )
            assert_same_bits(got, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_in_any_memory_layout(isa, layout):
    case = layers((48, 5, 16), 77, symmetric=False)
    x = floats(9, 77)
    for dtype in FLOATS:
        got, expected = case.together(in_layout(x.to(dtype), layout)), case.alone(x.to(dtype))
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b, f"{layout}, {dtype}")


@pytest.mark.parametrize("leading", [(0,), (2, 0, 3), (2, 3), (1, 1), ()], ids=str)
def test_leading_dimensions(isa, leading):
    case = layers((17, 32), 40, activations=("none", "relu"))
    x = floats(*leading, 40)
    got = case.together(x)
    assert [tuple(y.shape) for y in got] == [(*leading, 17), (*leading, 32)]
    for a, b in zip(got, case.alone(x), strict=True):
        assert_same_bits(a, b)


def test_rows_that_are_not_finite(isa):
    """Such a row gives NaN in all outputs of all layers; other rows do not change."""
    case = layers((16, 33), 64)
    x = sprinkle(floats(20, 64), NOT_FINITE, seed=3)
    broken = ~x.isfinite().all(-1)
    assert 0 < broken.sum() < 20
    for got, expected in zip(case.together(x), case.alone(x), strict=True):
        assert got[broken].isnan().all()
        assert_same_bits(got[~broken], expected[~broken])


def test_outputs_are_tensors_of_their_own():
    case = layers((16, 16, 5), 64)
    x = floats(4, 64)
    first, second, third = case.together(x)
    storages = {y.untyped_storage().data_ptr() for y in (first, second, third)}
    assert len(storages) == 3
    assert all(y.is_contiguous() for y in (first, second, third))
    before = second.clone()
    first.fill_(0)
    assert torch.equal(second, before)


def test_a_member_s_packed_weight_may_be_a_view_of_all():
    case = layers((48, 16, 32), 100, biases=False)
    packed, x = case.packed, floats(7, 100)
    together = ops.linear_dynamic_split(
        x, packed, torch.cat(case.scales), out_features=[48, 16, 32]
    )
    tile = 0
    for weight, scale, expected in zip(case.weights, case.scales, together, strict=True):
        tiles = -(-len(weight) // 16)
        view = packed[tile : tile + tiles]
        got = ops.linear_dynamic(x, view, scale, out_features=len(weight))
        assert_same_bits(got, expected)
        tile += tiles


def test_the_entry_without_the_dispatcher_s_parsing():
    """The same operator; inside an autocast region the outputs have autocast's type."""
    case, x = layers((48, 16), 100, activations=("gelu", "none")), floats(7, 100)
    options = case.arguments()
    options.pop("output_dtype")
    fast = load().linear_dynamic_split
    for got, expected in zip(fast(x, *options.values()), case.alone(x), strict=True):
        assert_same_bits(got, expected)
    case.output_dtype = torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        for got, expected in zip(fast(x, *options.values()), case.alone(x), strict=True):
            assert_same_bits(got, expected)


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed_sizes", "symbolic_sizes"])
@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
def test_compiles_in_one_graph(dynamic, trained):
    case = layers((20, 16, 3), 70, zero_points=True, activations=("gelu", "none", "silu"))
    options = case.arguments()

    def call(x: Tensor) -> list[Tensor]:
        y = ops.linear_dynamic_split(x + 0, **options)
        return [part * 2 for part in y]

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (6, 3):
        x = floats(rows, 70, seed=rows).requires_grad_(trained)
        got, expected = compiled(x), call(x)
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a.detach(), b.detach())
        if trained:
            grads = [torch.autograd.grad(sum(y.sum() for y in ys), x)[0] for ys in (got, expected)]
            torch.testing.assert_close(grads[0], grads[1])


def test_exports():
    class Projections(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            case = layers((20, 16), 70)
            self.register_buffer("packed", case.packed)
            self.register_buffer("weight_scale", torch.cat(case.scales))

        def forward(self, x: Tensor) -> list[Tensor]:
            return ops.linear_dynamic_split(
                x, self.packed, self.weight_scale, out_features=[20, 16]
            )

    module, rows = Projections(), torch.export.Dim("rows")
    program = torch.export.export(module, (floats(6, 70),), dynamic_shapes=({0: rows},))
    for x in (floats(6, 70), floats(3, 70)):
        for got, expected in zip(program.module()(x), module(x), strict=True):
            assert_same_bits(got, expected)


def test_meta_tensors_give_shapes():
    options = layers((20, 16), 70).arguments()
    on_meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in options.items()}
    got = ops.linear_dynamic_split(torch.empty(2, 3, 70, device="meta").half(), **on_meta)
    assert [(y.device.type, tuple(y.shape), y.dtype) for y in got] == [
        ("meta", (2, 3, 20), torch.half),
        ("meta", (2, 3, 16), torch.half),
    ]
