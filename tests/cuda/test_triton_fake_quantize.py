"""Fake quantization, masks, learned steps and ranges on Triton's kernels: the CPU's bits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
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
    sprinkle,
)
from support.triton_operators import (
    RANGES,
    ZERO_POINTS,
    awkward,
    check,
    layouts_of_scales,
    moved,
    operator,
    run,
    scales_of,
    seeds,
    shapes,
    small_tiles_and_poisoned_memory,  # noqa: F401  (a fixture)
    tiles,
    zero_points,
)

from torchquant import functional
from torchquant.functional.affine import _expand
from torchquant.functional.fake_quantize import _sum_by_scale
from torchquant.scheme import PerAxis, PerGroup, PerTensor

# The interpreter computes with numpy, which warns of overflow and NaN.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("small_tiles_and_poisoned_memory"),
]


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
        operator("fake_quantize_learned_backward")(*args, -8, 7, **layout) for _ in range(2)
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
        whole = operator("fake_quantize")(*moved(x, s, None), -8, 7, group_size=75)
        alone = operator("fake_quantize")(*moved(x[i], s[i], None), -8, 7, group_size=75)
        assert_same_bits(alone, whole[i])
