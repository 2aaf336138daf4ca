"""Triton's kernels of training, affine quantization and elementwise operators: the CPU's bits."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ACTIVATIONS,
    EXTREME,
    FLOATS,
    LAYOUTS,
    NAN,
    NOT_FINITE,
    SPECIAL,
    assert_same_bits,
    floats,
    generator,
    in_layout,
    integers,
    sprinkle,
)
from support.triton import DEVICE, module
from torch import Tensor

from torchquant import functional
from torchquant.functional.affine import _expand
from torchquant.functional.fake_quantize import _sum_by_scale
from torchquant.scheme import PerAxis, PerGroup, PerTensor

training_ops, tiles, norms = module("training_ops"), module("tiles"), module("norms")
# The interpreter computes with numpy, which reports what IEEE arithmetic says with infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

RANGES = ((-128, 127), (-127, 127), (0, 255), (-8, 7), (0, 15), (-2, 1), (0, 3), (-(2**20), 2**20))
ZERO_POINTS = ("none", "integer", "one_integer", "far_integer", "real", "one_real")


@pytest.fixture(autouse=True)
def small_tiles_and_poisoned_memory(monkeypatch):
    """Small tensors take several programs; what torch.empty returns holds NaN or great integers."""
    monkeypatch.setattr(tiles, "TILE", 512)
    monkeypatch.setattr(norms, "LEAST_PROGRAMS", 2)
    monkeypatch.setattr(norms, "CACHED_BYTES", 2**12)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def moved(*arguments):
    return [a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments]


def run(name, *args, **kwargs):
    """The operator in Triton, and on the CPU."""
    got = training_ops.OPERATORS[name](*moved(*args), **kwargs)
    assert got is not NotImplemented
    expected = getattr(torch.ops.torchquant, name)(*args, **kwargs)
    return got, expected


def check(name, *args, **kwargs):
    got, expected = run(name, *args, **kwargs)
    if isinstance(got, Tensor):
        got, expected = (got,), (expected,)
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.device == DEVICE or ours.device.type == DEVICE.type
        assert_same_bits(ours.cpu(), theirs, (name, kwargs))


def awkward(*shape, seed=0, dtype=torch.float32, share=0.1):
    """Values around the ends of every range, and all odd ones."""
    x = floats(*shape, seed=seed)
    return sprinkle(x, SPECIAL + EXTREME + NOT_FINITE, seed, share).to(dtype)


def layouts_of_scales(shape):
    """``axis`` or ``group_size`` of every kind, also with groups that do not divide the row."""
    found = [{}, *({"axis": axis} for axis in range(-len(shape), len(shape)))]
    row = shape[-1]
    return found + [{"group_size": size} for size in sorted({1, 3, 8, 32, row, row + 5})]


def scales_of(x, layout, seed=0):
    """Ordinary steps and, now and then, the least and a huge one."""
    _, shape = tiles.spans_of(x.shape, layout.get("axis"), layout.get("group_size"))
    s = torch.rand(shape, generator=generator(seed)) * 0.3 + 1e-3
    pick = torch.randint(0, 40, shape, generator=generator(seed + 1))
    s[pick == 0] = 2.0**-126
    s[pick == 1] = 2.0**100
    s[pick == 2] = NAN
    return s


def zero_points(kind, shape, qmin, qmax, seed=0):
    if kind == "none":
        return None
    if kind.startswith("one"):
        shape = (1,)
    if kind.endswith("real"):
        return torch.randn(shape, generator=generator(seed))
    if kind == "far_integer":
        return torch.tensor([-(2**22), 2**22, 1000])[
            torch.randint(0, 3, shape, generator=generator(seed))
        ].to(torch.int32)
    return torch.randint(qmin, qmax + 1, shape, generator=generator(seed)).to(torch.int32)


shapes = st.builds(
    lambda sizes, last: (*sizes, last), st.lists(st.integers(1, 6), max_size=2), st.integers(1, 80)
)
seeds = st.integers(0, 10_000)


# ---------------------------------------------------------------- fake quantization


@settings(deadline=None, max_examples=60)
@given(
    shapes,
    st.sampled_from(FLOATS),
    st.sampled_from(LAYOUTS),
    st.sampled_from(RANGES),
    st.sampled_from(ZERO_POINTS),
    seeds,
    st.data(),
)
def test_values_and_masks(shape, dtype, memory, limits, kind, seed, data):
    x = in_layout(awkward(*shape, seed=seed, dtype=dtype), memory)
    layout = data.draw(st.sampled_from(layouts_of_scales(shape)))
    s = scales_of(x, layout, seed)
    z = zero_points(kind, s.shape, *limits, seed)
    check("fake_quantize", x, s, z, *limits, **layout)
    check("fake_quantize_mask", x, s, z, *limits, **layout)
    check("in_range", x, s, z, *limits, **layout)


@pytest.mark.parametrize("limits", [*RANGES, (-7, 6), (3, 8), (-9, -2)], ids=str)
def test_masks_at_the_ends_of_the_range(limits):
    """Ties round to even, in or out of the range; so do their neighbours, to the nearest."""
    for zero in (0, 1, limits[0], limits[1], -(2**22), 2**22):
        ties = torch.tensor([end - zero + half for end in limits for half in (-0.5, 0.5)])
        x = torch.cat([ties, ties.nextafter(ties + 9), ties.nextafter(ties - 9)])
        for step in (1.0, 0.25, 2.0**100):
            s, z = torch.tensor([step]), torch.tensor([zero], dtype=torch.int32)
            check("fake_quantize_mask", x * step, s, z, *limits)
            check("in_range", x * step, s, None if zero == 0 else z, *limits)


ROWS_OF_BYTES = (  # masks of tiles whose spans are whole bytes, and of those whose are not
    ((4, 96), {"axis": 0}),
    ((3, 5, 16), {"axis": 1}),
    ((40, 24), {"axis": 1}),
    ((6, 80), {"group_size": 16}),
    ((6, 72), {"group_size": 16}),
    ((6, 72), {"group_size": 32}),
    ((6, 75), {"group_size": 32}),
    ((6, 75), {"group_size": 25}),
    ((9, 75), {"group_size": 75}),
    ((3, 75), {"axis": 1}),
    ((2, 3, 3, 3), {"axis": 0}),
    ((2, 3, 3, 3), {"axis": 1}),
    ((1030,), {}),
    ((600, 1), {"axis": 0}),
    ((600, 1), {"axis": 1}),
)


@pytest.mark.parametrize(("shape", "layout"), ROWS_OF_BYTES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_tile(shape, layout, dtype):
    x = awkward(*shape, dtype=dtype)
    s = scales_of(x, layout).nan_to_num(0.1)
    z = zero_points("integer", s.shape, -8, 7)
    check("fake_quantize_mask", x, s, z, -8, 7, **layout)
    check("fake_quantize", x, s, z, -8, 7, **layout)
    check("minmax", x, **layout)
    grad = torch.randn(shape, generator=generator(1)).to(dtype)
    x = x.nan_to_num(0.3, 9.0, -9.0)
    check_learned_gradients(grad, x, s, z, -8, 7, **layout)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((20_001,), {}),
        ((3, 9000), {"axis": 0}),
        ((3, 8, 768), {"axis": 1}),
        ((30, 776), {"axis": 1}),
        ((30, 768), {"group_size": 64}),
        ((30, 776), {"group_size": 32}),
        ((30, 777), {"group_size": 777}),
    ],
    ids=str,
)
def test_tiles_of_their_true_size(monkeypatch, shape, layout):
    monkeypatch.setattr(tiles, "TILE", 4096)
    x, grad = awkward(*shape, share=0.5), torch.randn(shape, generator=generator(1))
    s = scales_of(x, layout).nan_to_num(0.1).clamp(0.01, 0.4)
    z = zero_points("integer", s.shape, 0, 15)
    check("fake_quantize_mask", x, s, z, 0, 15, **layout)
    check("quantize", x, s, z, 0, 15, **layout)
    check("minmax", x, **layout)
    check_learned_gradients(grad, x.nan_to_num(0.3, 9.0, -9.0), s, z, 0, 15, **layout)


@settings(deadline=None, max_examples=40)
@given(
    shapes,
    st.sampled_from(FLOATS),
    st.sampled_from(LAYOUTS),
    st.sampled_from(RANGES),
    st.booleans(),
    seeds,
    st.data(),
)
def test_learned_steps(shape, dtype, memory, limits, with_offset, seed, data):
    x = in_layout(awkward(*shape, seed=seed, dtype=dtype), memory)
    layout = data.draw(st.sampled_from(layouts_of_scales(shape)))
    s = sprinkle(scales_of(x, layout, seed), (0.0, -1.0, math.inf, 2.0**-130), seed, 0.1)
    offset = None
    if with_offset:
        offset = torch.randn(s.shape, generator=generator(seed)) * s * (limits[1] - limits[0])
        offset = sprinkle(offset, NOT_FINITE, seed + 1, 0.1)
    check("fake_quantize_learned", x, s, offset, *limits, 0.5, **layout)


def check_learned_gradients(grad, x, s, z, qmin, qmax, **layout):
    """grad_input's bits; the sums as near to float64's as the CPU's, whose order is another."""
    got, expected = run("fake_quantize_learned_backward", grad, x, s, z, qmin, qmax, **layout)
    assert_same_bits(got[0].cpu(), expected[0])
    granularity = PerTensor()
    if "axis" in layout:
        granularity = PerAxis(layout["axis"])
    elif "group_size" in layout:
        granularity = PerGroup(layout["group_size"])
    kwargs = {"qmin": qmin, "qmax": qmax, "dtype": torch.float64}
    oracle = functional.fake_quantize_learned_backward(
        grad, x, s, z, granularity=granularity, **kwargs
    )
    # Every element with a scale of its own: the terms of the sums.
    each = [
        None if t is None else _expand(t, x, granularity).expand(x.shape).reshape(-1)
        for t in (s, z)
    ]
    _, *terms = functional.fake_quantize_learned_backward(
        grad.reshape(-1), x.reshape(-1), *each, granularity=PerAxis(0), **kwargs
    )
    for ours, want, term in zip(got[1:], oracle[1:], terms, strict=True):
        ours = ours.cpu()
        assert ours.dtype == torch.float32 and ours.shape == s.shape
        most = _sum_by_scale(term.abs().reshape(x.shape), s, granularity)
        # 16 turns, a thread's 16 elements, a tree over 256 threads, and a term is rounded thrice.
        assert ((ours.double() - want).abs() <= most * (48 * 2.0**-24) + 1e-38).all()


@settings(deadline=None, max_examples=40)
@given(
    shapes,
    st.sampled_from(FLOATS),
    st.sampled_from(LAYOUTS),
    st.sampled_from(RANGES[:-1]),
    st.booleans(),
    seeds,
    st.data(),
)
def test_learned_gradients(shape, dtype, memory, limits, with_zero, seed, data):
    x = sprinkle(floats(*shape, seed=seed), SPECIAL + EXTREME, seed, 0.1).to(dtype)
    x = in_layout(x.clamp(-6e4, 6e4), memory)
    grad = in_layout(torch.randn(shape, generator=generator(seed)).to(dtype), memory)
    layout = data.draw(st.sampled_from(layouts_of_scales(shape)))
    s = scales_of(x, layout, seed).nan_to_num(0.1)
    z = zero_points("integer" if with_zero else "none", s.shape, *limits, seed)
    check_learned_gradients(grad, x, s, z, *limits, **layout)


@pytest.mark.parametrize("layout", [{}, {"axis": 0}, {"axis": 1}, {"group_size": 77}], ids=str)
def test_sums_of_several_turns_and_parts(monkeypatch, layout):
    """Where there are many tiles, a program takes several; summing again gives the same bits."""
    monkeypatch.setattr(tiles, "TILE", 256)
    monkeypatch.setattr(tiles, "PARTS", 4)
    x = torch.randn(20, 150, generator=generator(0)) * 3
    grad = torch.randn(20, 150, generator=generator(1))
    s = scales_of(x, layout).nan_to_num(0.1).clamp(0.01, 0.4)
    check_learned_gradients(grad, x, s, None, -8, 7, **layout)
    x.view(-1)[::101] = NAN
    check("minmax", x, **layout)
    args = moved(grad, x, s, None)
    first, second = (
        training_ops.fake_quantize_learned_backward(*args, -8, 7, **layout) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a.cpu(), b.cpu())


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("layout", [{}, {"axis": 0}, {"axis": 1}, {"group_size": 4}], ids=str)
def test_gradients_of_what_is_not_finite(value, layout):
    """Where the CPU's sums are NaN ours are, and nowhere else."""
    x, grad = floats(5, 9), floats(5, 9, seed=1)
    for changed in (x, grad):
        before = changed[2, 3].clone()
        changed[2, 3] = value
        s = scales_of(x, layout).nan_to_num(0.1).clamp(0.01, 0.4)
        got, expected = run("fake_quantize_learned_backward", grad, x, s, None, -8, 7, **layout)
        assert_same_bits(got[0].cpu(), expected[0])
        for ours, theirs in zip(got[1:], expected[1:], strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
        changed[2, 3] = before
    for step in (NAN, math.inf, -1.0, 0.0):
        s = scales_of(x, layout).nan_to_num(0.1).clamp(0.01, 0.4)
        s.view(-1)[-1] = step
        got, expected = run("fake_quantize_learned_backward", grad, x, s, None, 0, 15, **layout)
        assert_same_bits(got[0].cpu(), expected[0])
        for ours, theirs in zip(got[1:], expected[1:], strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


@settings(deadline=None, max_examples=40)
@given(shapes, st.sampled_from(FLOATS), st.sampled_from(LAYOUTS), seeds, st.data())
def test_ranges_and_masks_of_gradients(shape, dtype, memory, seed, data):
    x = in_layout(awkward(*shape, seed=seed, dtype=dtype, share=0.5), memory)
    check("minmax", x, **data.draw(st.sampled_from(layouts_of_scales(shape))))
    check("positive", x)
    bits = torch.ops.torchquant.positive(x)
    check("mask_gradient", in_layout(awkward(*shape, seed=seed + 1, dtype=dtype), memory), bits)


def test_ranges_without_a_finite_element():
    x = torch.full((3, 40), NAN)
    x[1] = -0.0
    check("minmax", x, 0)
    check("minmax", x, 1)
    check("minmax", x[:1])


def test_masks_of_several_programs():
    x = awkward(3, 3001, seed=3)
    check("positive", x)
    check("mask_gradient", x, torch.ops.torchquant.positive(x))


def test_a_row_alone_gives_what_it_gives_in_a_batch():
    x, s = awkward(7, 75), torch.rand(7, 1) * 0.1 + 0.01
    for i in range(7):
        whole = training_ops.fake_quantize(*moved(x, s, None), -8, 7, group_size=75)
        alone = training_ops.fake_quantize(*moved(x[i], s[i], None), -8, 7, group_size=75)
        assert_same_bits(alone, whole[i])


@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 30, 70), (33, 65, 17)], ids=str)
@pytest.mark.parametrize("kind", ["none", "integer", "one_integer"])
def test_product_with_a_fake_quantized_weight(shape, kind):
    m, n, k = shape
    grad = torch.randn(m, n, generator=generator(0))
    weight = in_layout(torch.randn(n, k, generator=generator(1)), "sliced")
    for s in (scales_of(weight, {"axis": 0}).nan_to_num(0.1).clamp(0.01, 1.0), torch.tensor([0.1])):
        z = zero_points(kind, (n,), -8, 7)
        got, expected = run("mm_fake_quantized", grad, weight, s, z, -8, 7)
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            again = training_ops.mm_fake_quantized(*moved(grad, weight, s, z), -8, 7)
        assert_same_bits(again, got)


# ---------------------------------------------------------------- affine


@settings(deadline=None, max_examples=50)
@given(
    shapes,
    st.sampled_from(FLOATS),
    st.sampled_from(LAYOUTS),
    st.sampled_from((torch.int8, torch.uint8)),
    st.sampled_from(ZERO_POINTS),
    seeds,
    st.data(),
)
def test_quantize_and_dequantize(shape, dtype, memory, integer, kind, seed, data):
    x = in_layout(awkward(*shape, seed=seed, dtype=dtype), memory)
    layout = data.draw(st.sampled_from(layouts_of_scales(shape)))
    s = scales_of(x, layout, seed)
    limits = (-128, 127) if integer == torch.int8 else (0, 255)
    z = zero_points(kind, s.shape, *limits, seed)
    check("quantize", x, s, z, *limits, **layout, dtype=integer)
    check("quantize", x, s, z, 0, 7, **layout, dtype=integer)
    q = in_layout(integers(*shape, seed=seed, dtype=integer), memory)
    check("dequantize", q, s, z, **layout, dtype=dtype)


# ---------------------------------------------------------------- element by element


@settings(deadline=None, max_examples=40)
@given(
    shapes,
    st.sampled_from(FLOATS),
    st.sampled_from((None, *FLOATS)),
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
    st.sampled_from(ACTIVATIONS),
    seeds,
)
def test_activations(shape, dtype, wanted, memory, other, activation, seed):
    x = in_layout(awkward(*shape, seed=seed, dtype=dtype), memory)
    up = in_layout(awkward(*shape, seed=seed + 1, dtype=dtype), other)
    check("activation", x, activation, wanted)
    check("gated_activation", x, up, activation)
    for name, args in (("activation", (x, activation)), ("gated_activation", (x, up, activation))):
        got, expected = run(name, *args)
        strides = zip(got.shape, got.stride(), expected.stride(), strict=True)
        assert all(size == 1 or ours == theirs for size, ours, theirs in strides)


def test_activations_of_halves_and_of_other_orders_of_dimensions():
    wide = awkward(5, 7, 140)
    gate, up = wide.chunk(2, -1)
    check("gated_activation", gate, up, "silu")
    check("gated_activation", gate.contiguous(), up, "silu")
    images = awkward(2, 5, 6, 7).to(memory_format=torch.channels_last)
    check("activation", images, "gelu")
    check("gated_activation", images, images.contiguous(), "gelu")
    check("activation", torch.tensor(-0.5), "tanh")
    check("activation", torch.randn(4, 1).expand(4, 6), "relu")


# ---------------------------------------------------------------- norms


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 6), max_size=2),
    st.integers(1, 300),
    st.sampled_from(FLOATS),
    st.sampled_from((None, *FLOATS)),
    st.sampled_from(LAYOUTS),
    st.sampled_from((0.0, 1e-6, 1e-5, 1e-45)),
    st.booleans(),
    seeds,
)
def test_norms(sizes, last, dtype, weights, memory, eps, flag, seed):
    shape = (*sizes, last)
    x = in_layout(awkward(*shape, seed=seed, dtype=dtype, share=0.02), memory)
    weight = None if weights is None else floats(last, seed=seed + 1, dtype=weights)
    bias = None if weights is None or not flag else floats(last, seed=seed + 2, dtype=weights)
    check("rms_norm", x, weight, eps, flag)
    check("layer_norm", x, weight, bias, eps)
    residual = in_layout(floats(*shape, seed=seed + 3, dtype=dtype), memory)
    check("layer_norm", x, weight, bias, eps, residual)


@pytest.mark.parametrize("size", [15, 16, 17, 255, 256, 257, 1000])
def test_norms_of_many_rows(size):
    x, weight, bias = floats(37, size), floats(size, seed=1), floats(size, seed=2)
    check("rms_norm", x, weight, 1e-6)
    check("layer_norm", x, weight, bias, 1e-5)


# ---------------------------------------------------------------- signatures, and what is left


def test_operators_have_the_schemas_signatures():
    for name, function in training_ops.OPERATORS.items():
        schema = getattr(torch.ops.torchquant, name).default._schema
        parameters = inspect.signature(function).parameters
        assert list(parameters) == [argument.name for argument in schema.arguments]
        for argument in schema.arguments:
            default = parameters[argument.name].default
            if argument.name == "dtype" and argument.has_default_value():
                continue  # a schema counts types, Python names them
            wanted = argument.default_value if argument.has_default_value() else inspect._empty
            assert default == wanted, (name, argument.name)


X, ONE = torch.randn(4, 6), torch.tensor([0.1])
LEFT = {
    "empty": ("fake_quantize", X[:0], ONE, None, -8, 7),
    "empty_bits": ("positive", X[:0]),
    "float64": ("fake_quantize", X.double(), ONE, None, -8, 7),
    "scale_of_another_type": ("fake_quantize", X, ONE.half(), None, -8, 7),
    "scale_of_another_shape": ("fake_quantize", X, torch.ones(5), None, -8, 7, 0),
    "several_scales": ("fake_quantize", X, torch.ones(4), None, -8, 7),
    "axis_and_group": ("fake_quantize", X, torch.ones(4), None, -8, 7, 0, 6),
    "no_such_axis": ("fake_quantize", X, torch.ones(4), None, -8, 7, 2),
    "zero_point_of_another_type": ("fake_quantize", X, ONE, ONE.double(), -8, 7),
    "zero_points_of_another_shape": ("fake_quantize", X, torch.ones(4), torch.ones(5), -8, 7, 0),
    "range": ("fake_quantize", X, ONE, None, 7, 7),
    "wide_range": ("fake_quantize", X, ONE, None, 0, 2**22),
    "offset": ("fake_quantize_learned", X, ONE, torch.ones(2), -8, 7, 1.0),
    "grad": ("fake_quantize_learned_backward", X.half(), X, ONE, None, -8, 7),
    "learned_zero": ("fake_quantize_learned_backward", X, X, ONE, ONE, -8, 7),
    "bits": ("mask_gradient", X, torch.zeros(2, dtype=torch.uint8)),
    "minmax": ("minmax", X.long()),
    "group": ("minmax", X, None, 0),
    "quantize_range": ("quantize", X, ONE, None, -128, 128),
    "quantize_type": ("quantize", X, ONE, None, -8, 7, None, None, torch.int32),
    "dequantize": ("dequantize", X.int(), ONE, None),
    "activation": ("activation", X, "swish"),
    "up": ("gated_activation", X, X[:1], "silu"),
    "norm_weight": ("rms_norm", X, torch.ones(5), 1e-6),
    "norm_eps": ("rms_norm", X, None, -1.0),
    "norm_bias": ("layer_norm", X, None, torch.ones(6), 1e-6),
    "norm_residual": ("layer_norm", X, None, None, 1e-6, X[:2]),
    "norm_scalar": ("rms_norm", torch.tensor(1.0), None, 1e-6),
    "product": ("mm_fake_quantized", X, X, ONE, None, -8, 7),
    "product_range": ("mm_fake_quantized", X, X.t(), ONE, None, 0, 255),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_to_others(case):
    name, *args = LEFT[case]
    assert training_ops.OPERATORS[name](*moved(*args)) is NotImplemented
