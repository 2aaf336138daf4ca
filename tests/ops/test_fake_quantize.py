"""Fake quantization in training: specification, kernels, gradients, FakeQuantize, refusals."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    EXTREME,
    FLOATS,
    INF,
    LAYOUTS,
    NAN,
    NOT_FINITE,
    SPECIAL,
    assert_same_bits,
    check_everywhere,
    floats,
    generator,
    in_layout,
    sprinkle,
    threads,
)
from torch.autograd import gradcheck, gradgradcheck

from torchquant import FakeQuantize, functional, ops
from torchquant.functional.affine import _expand
from torchquant.functional.fake_quantize import _sum_by_scale
from torchquant.scheme import PerAxis, PerGroup, PerTensor, PerToken

RANGES = ((-128, 127), (-127, 127), (0, 255), (-8, 7), (0, 15), (-2, 1), (0, 3))
LEARNED = ((-128, 127), (-8, 7), (0, 15), (-4, 3), (-2, 1), (0, 3))


def awkward(*shape, seed=0, dtype=torch.float32, share=0.1):
    """Values around the ends of every range, and all odd ones."""
    x = floats(*shape, seed=seed)
    return sprinkle(x, SPECIAL + EXTREME + NOT_FINITE, seed, share).to(dtype) if shape else x


def granularities(shape):
    found = [PerTensor()]
    if shape:
        found += [PerAxis(axis) for axis in range(len(shape))]
        found += [PerGroup(1), PerGroup(3), PerGroup(32), PerToken()]
    return found


def scales(shape, seed=0):
    """Ordinary steps and, now and then, the least and a huge one."""
    s = torch.rand(shape, generator=generator(seed)) * 0.3 + 1e-3
    pick = torch.randint(0, 40, shape, generator=generator(seed + 1))
    s[pick == 0] = 2.0**-126
    s[pick == 1] = 2.0**100
    return s


def zero_points(kind, shape, qmin, qmax, seed=0):
    if kind == "none":
        return None
    if kind == "integer":
        z = torch.randint(qmin, qmax + 1, shape, generator=generator(seed))
        return z.to(torch.int32)
    return torch.randn(shape, generator=generator(seed))


ZERO_POINTS = ("none", "integer", "real")


# ---------------------------------------------------------------- specification


def test_bits_are_packed_from_the_lowest_on():
    mask = torch.tensor([[True, False, False, True, True], [False, False, False, False, True]])
    assert functional.pack_bits(mask).tolist() == [0b00011001, 0b10]
    for shape in ((), (1,), (8,), (3, 5), (2, 3, 4), (0,), (0, 4)):
        mask = torch.rand(shape, generator=generator(len(shape))) < 0.5
        bits = functional.pack_bits(mask)
        assert bits.shape == ((mask.numel() + 7) // 8,)
        assert torch.equal(functional.unpack_bits(bits, shape), mask)
    with pytest.raises(ValueError, match=r"bits must have shape \[2\] for \[9\], got \[1\]"):
        functional.unpack_bits(torch.zeros(1, dtype=torch.uint8), (9,))


def test_in_range_looks_at_the_rounded_value():
    s = torch.tensor([0.5])
    x = torch.tensor([-2.25, -2.26, 1.75, 1.76, 0.0, NAN, INF, -INF])
    expected = [True, False, False, False, True, False, False, False]
    assert functional.in_range(x, s, qmin=-4, qmax=3).tolist() == expected  # 3.5 rounds to 4
    assert functional.in_range(x, s, 4, qmin=0, qmax=7).tolist() == expected


def test_learned_offset_deploys_as_an_integer():
    """The same bits as fake_quantize with the integer that learned_zero_point gives."""
    x, s = floats(9, 40), scales((9,))
    offset = torch.randn(9, generator=generator(3)) * 20 * s
    for qmin, qmax in LEARNED:
        z = functional.learned_zero_point(s, offset, qmin, qmax)
        assert z.dtype == torch.int32 and z.min() >= qmin and z.max() <= qmax
        kwargs = {"qmin": qmin, "qmax": qmax, "granularity": PerAxis(0)}
        assert_same_bits(
            ops.fake_quantize_learned(x, s, offset, **kwargs),
            functional.fake_quantize(x, s, z, **kwargs),
        )


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-45, -INF, 2.0**-127])
def test_a_step_at_or_below_zero_is_used_as_the_least(value):
    x, least = floats(3, 20), torch.tensor([2.0**-126])
    expected = functional.fake_quantize(x, least)
    check_everywhere(lambda: ops.fake_quantize_learned(x, torch.tensor([value])), expected)
    assert_same_bits(functional.fake_quantize_learned(x, torch.tensor([value])), expected)
    grads = ops.fake_quantize_learned_backward(x, x, torch.tensor([value]))
    for got, want in zip(grads, ops.fake_quantize_learned_backward(x, x, least), strict=True):
        assert_same_bits(got, want)


def test_a_diverged_step_or_offset_stays_visible():
    x, nan, one = floats(3, 20), torch.tensor([NAN]), torch.ones(1)
    for step, offset in ((nan, None), (nan, one), (one, nan)):
        check_everywhere(
            lambda step=step, offset=offset: ops.fake_quantize_learned(x, step, offset),
            torch.full_like(x, NAN),
        )
        assert functional.fake_quantize_learned(x, step, offset).isnan().all()
        leaves = [t.clone().requires_grad_() for t in (x, step, one if offset is None else offset)]
        ops.fake_quantize_learned(*leaves).sum().backward()
        assert leaves[1].grad.isnan().all()
    y = ops.fake_quantize_learned(torch.tensor([1.0, NAN]), torch.tensor([0.5]))
    assert y[0] == 1.0 and y[1].isnan()


# ---------------------------------------------------------------- kernels equal the specification


@settings(deadline=None, max_examples=120)
@given(
    st.lists(st.integers(0, 7), max_size=3),
    st.integers(1, 200),
    st.sampled_from(FLOATS),
    st.sampled_from(LAYOUTS),
    st.sampled_from(RANGES),
    st.sampled_from(ZERO_POINTS),
    st.integers(0, 10_000),
    st.data(),
)
def test_any_shape_layout_and_value(sizes, last, dtype, layout, limits, kind, seed, data):
    shape = (*sizes, last)
    x = awkward(*shape, seed=seed, dtype=dtype)
    x = in_layout(x, layout) if x.numel() else x
    granularity = data.draw(st.sampled_from(granularities(shape)))
    qmin, qmax = limits
    parameters = granularity.scale_shape(shape)
    s, z = scales(parameters, seed), zero_points(kind, parameters, qmin, qmax, seed)
    kwargs = {"qmin": qmin, "qmax": qmax, "granularity": granularity}
    y = functional.fake_quantize(x, s, z, **kwargs)
    mask = functional.in_range(x, s, z, **kwargs)
    bits = functional.pack_bits(mask)
    check_everywhere(lambda: ops.fake_quantize(x, s, z, **kwargs), y)
    check_everywhere(lambda: ops.fake_quantize_mask(x, s, z, **kwargs), (y, bits))
    check_everywhere(lambda: ops.in_range(x, s, z, **kwargs), bits)
    check_everywhere(lambda: ops.positive(x), functional.pack_bits(x > 0))
    grad = awkward(*shape, seed=seed + 1, dtype=dtype)
    grad = in_layout(grad, layout) if grad.numel() else grad
    check_everywhere(lambda: ops.mask_gradient(grad, bits), functional.mask_gradient(grad, mask))
    check_everywhere(
        lambda: ops.minmax(x, granularity=granularity),
        functional.minmax(x, granularity=granularity),
    )
    offset = torch.randn(parameters, generator=generator(seed)) * s * (qmax - qmin)
    check_everywhere(
        lambda: ops.fake_quantize_learned(x, s, offset, **kwargs),
        functional.fake_quantize_learned(x, s, offset, **kwargs),
    )


def large_cases():
    yield (300_001,), PerTensor()
    yield (700, 130), PerAxis(0)
    yield (130, 1030), PerAxis(-1)
    yield (5, 64, 7, 9), PerAxis(1)
    yield (90, 777), PerGroup(32)
    yield (90, 777), PerGroup(100)
    yield (300, 259), PerToken()
    yield (3, 9000), PerToken()
    yield (40_000, 3), PerAxis(1)
    yield (3, 40_000), PerAxis(0)
    yield (40_000, 1), PerAxis(1)


@pytest.mark.parametrize(("shape", "granularity"), list(large_cases()), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_tensors_with_any_number_of_threads(shape, granularity, dtype):
    """Threads share spans, columns and bytes of masks in every way; sums keep their bits."""
    g = generator(math.prod(shape))
    x = (torch.randn(shape, generator=g) * 3).to(dtype)
    x.view(-1)[::1001] = NAN
    parameters = granularity.scale_shape(shape)
    s = torch.rand(parameters, generator=g) * 0.3 + 0.1
    z = torch.randint(-8, 8, parameters, generator=g).to(torch.int32)
    kwargs = {"qmin": -8, "qmax": 7, "granularity": granularity}
    mask = functional.in_range(x, s, z, **kwargs)
    expected = (functional.fake_quantize(x, s, z, **kwargs), functional.pack_bits(mask))
    counts = (1, 3)
    check_everywhere(lambda: ops.fake_quantize_mask(x, s, z, **kwargs), expected, counts)
    check_everywhere(
        lambda: ops.mask_gradient(x, expected[1]), functional.mask_gradient(x, mask), counts
    )
    check_everywhere(lambda: ops.positive(x), functional.pack_bits(x > 0), counts)
    check_everywhere(
        lambda: ops.minmax(x, granularity=granularity),
        functional.minmax(x, granularity=granularity),
        counts,
    )
    x, grad = x.nan_to_num(0.3), torch.randn(shape, generator=g).to(dtype)
    with threads(1):
        first = ops.fake_quantize_learned_backward(grad, x, s, z, **kwargs)
    check_everywhere(
        lambda: ops.fake_quantize_learned_backward(grad, x, s, z, **kwargs), first, counts
    )
    check_learned_gradients(first, grad, x, s, z, **kwargs)


def check_learned_gradients(got, grad, x, s, z=None, *, qmin, qmax, granularity):
    """Within the rounding of fp32 of the float64 oracle, whose integers are the fp32 ones."""
    kwargs = {"qmin": qmin, "qmax": qmax}
    oracle = functional.fake_quantize_learned_backward(
        grad, x, s, z, **kwargs, granularity=granularity, dtype=torch.float64
    )
    assert_same_bits(got[0], oracle[0])
    # Every element with a scale of its own: the terms of the sums.
    each = [
        None if t is None else _expand(t, x, granularity).expand(x.shape).reshape(-1)
        for t in (s, z)
    ]
    _, *terms = functional.fake_quantize_learned_backward(
        grad.reshape(-1),
        x.reshape(-1),
        *each,
        **kwargs,
        granularity=PerAxis(0),
        dtype=torch.float64,
    )
    for value, want, term in zip(got[1:], oracle[1:], terms, strict=True):
        assert value.dtype == torch.float32 and value.shape == s.shape
        most = _sum_by_scale(term.abs().reshape(x.shape), s, granularity)
        # A lane adds up to 256 terms, 16 lanes are added, and a term is rounded thrice.
        assert ((value.double() - want).abs() <= most * (264 * 2.0**-24) + 1e-38).all()


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(0, 7), max_size=3),
    st.integers(1, 200),
    st.sampled_from(FLOATS),
    st.sampled_from(LAYOUTS),
    st.sampled_from(LEARNED),
    st.booleans(),
    st.integers(0, 10_000),
    st.data(),
)
def test_learned_gradients(sizes, last, dtype, layout, limits, with_zero, seed, data):
    shape = (*sizes, last)
    x = sprinkle(floats(*shape, seed=seed), SPECIAL + EXTREME, seed, 0.1).to(dtype).clamp(-6e4, 6e4)
    grad = torch.randn(shape, generator=generator(seed)).to(dtype)
    if x.numel():
        x, grad = in_layout(x, layout), in_layout(grad, layout)
    granularity = data.draw(st.sampled_from(granularities(shape)))
    qmin, qmax = limits
    s = scales(granularity.scale_shape(shape), seed)
    z = zero_points("integer" if with_zero else "none", s.shape, qmin, qmax, seed)
    kwargs = {"qmin": qmin, "qmax": qmax, "granularity": granularity}
    got = ops.fake_quantize_learned_backward(grad, x, s, z, **kwargs)
    check_everywhere(
        lambda: ops.fake_quantize_learned_backward(grad, x, s, z, **kwargs), got, (1, 2)
    )
    check_learned_gradients(got, grad, x, s, z, **kwargs)


def test_a_long_sum_is_accurate():
    """Blocks are added in float64: the error stays that of 4096 elements."""
    x = torch.randn(1 << 21, generator=generator(0))
    grad, s = torch.randn(1 << 21, generator=generator(1)), torch.tensor([0.01])
    _, got, _ = ops.fake_quantize_learned_backward(grad, x, s)
    _, want, _ = functional.fake_quantize_learned_backward(grad, x, s, dtype=torch.float64)
    assert abs(got.double() - want) <= 2.0**-22 * (1 << 21) ** 0.5 * 30


@pytest.mark.parametrize("value", NOT_FINITE)
def test_what_is_not_finite_gets_no_gradient(value):
    x = torch.tensor([0.1, value, 0.3], requires_grad=True)
    ops.fake_quantize(x, 0.1).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 1.0]
    step = torch.tensor([0.1], requires_grad=True)
    (grad,) = torch.autograd.grad(ops.fake_quantize_learned(x, step).sum(), x)
    assert grad.tolist() == [1.0, 0.0, 1.0]


# ---------------------------------------------------------------- torch's own operators


def ordinary(shape, dtype, s):
    """Everything torch treats as we do: |x / s| < 2^31, not NaN."""
    limit = min(float(2.0**30 * s.min()), float(torch.finfo(dtype).max))
    x = sprinkle(floats(*shape, seed=5), (0.0, -0.0, 1e-40, 0.5, -2.5, 100.0, -1e4), 6, 0.5)
    return x.clamp(-limit, limit).to(dtype)


@pytest.mark.parametrize("limits", RANGES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_gradients_are_torchs(limits, dtype):
    qmin, qmax = limits
    s = torch.rand(24, generator=generator(1)) * 0.2 + 0.01
    z = zero_points("integer", (24,), qmin, qmax)
    x = ordinary((24, 333), dtype, s).requires_grad_()
    factor = torch.randn(24, 333, generator=generator(2)).to(dtype)
    one_s, one_z = s[3:4].clone(), z[3:4].clone()
    pairs = (
        (
            FakeQuantize.apply(x, one_s, one_z, qmin, qmax),
            torch.fake_quantize_per_tensor_affine(x, one_s, one_z, qmin, qmax),
        ),
        (
            FakeQuantize.apply(x, s[:, None], z[:, None], qmin, qmax),
            torch.fake_quantize_per_channel_affine(x, s, z, 0, qmin, qmax),
        ),
    )
    for ours, theirs in pairs:
        assert_same_bits(ours.detach(), theirs.detach())
        got, want = (torch.autograd.grad(y, x, factor)[0] for y in (ours, theirs))
        assert torch.equal(got, want)


def test_learned_values_are_those_of_torchs_learnable_op():
    s = torch.rand(24, generator=generator(1)) * 0.2 + 0.01
    x = ordinary((24, 333), torch.float32, s)
    for qmin, qmax in LEARNED:
        z = zero_points("integer", (24,), qmin, qmax)
        offset = -(z * s)
        assert torch.equal(functional.learned_zero_point(s, offset, qmin, qmax), z)
        theirs = torch._fake_quantize_learnable_per_channel_affine(
            x, s, z.float(), 0, qmin, qmax, 1.0
        )
        ours = ops.fake_quantize_learned(x, s, offset, qmin=qmin, qmax=qmax, granularity=PerAxis(0))
        assert_same_bits(ours, theirs)
        theirs = torch._fake_quantize_learnable_per_tensor_affine(
            x, s[:1], z[:1].float(), qmin, qmax, 1.0
        )
        ours = ops.fake_quantize_learned(x, s[:1], offset[:1], qmin=qmin, qmax=qmax)
        assert_same_bits(ours, theirs)


# ---------------------------------------------------------------- gradients


class StraightThrough(torch.autograd.Function):
    """In float64: the function whose exact gradient the straight-through one is."""

    @staticmethod
    def forward(ctx, x, s, qmin, qmax):
        ctx.save_for_backward(x)
        ctx.arguments = s, qmin, qmax
        return x.clamp(float((qmin - 0.5) * s), float((qmax + 0.5) * s))

    @staticmethod
    def backward(ctx, grad):
        s, qmin, qmax = ctx.arguments
        mask = functional.in_range(ctx.saved_tensors[0].float(), s, qmin=qmin, qmax=qmax)
        return functional.mask_gradient(grad, mask), None, None, None


class LearnedSurrogate(torch.autograd.Function):
    """In float64: linear in all three, with the roundings of the first call frozen."""

    @staticmethod
    def forward(ctx, x, s, offset, frozen, qmin, qmax):
        ctx.save_for_backward(x, s, offset)
        ctx.limits = qmin, qmax
        inside, residual, end = frozen
        return torch.where(inside, x + s * residual, s * end + offset)

    @staticmethod
    def backward(ctx, grad):
        x, s, offset = (t.float() for t in ctx.saved_tensors)
        qmin, qmax = ctx.limits
        z = functional.learned_zero_point(s, offset, qmin, qmax)
        kwargs = {"qmin": qmin, "qmax": qmax, "dtype": torch.float64}
        grads = functional.fake_quantize_learned_backward(grad, x, s, z, **kwargs)
        return *grads, None, None, None


def test_straight_through_is_the_gradient_of_the_surrogate():
    x = floats(5, 12, seed=1).double().requires_grad_()
    s = torch.tensor([0.0625])
    assert gradcheck(lambda x: StraightThrough.apply(x, s, -8, 7), (x,))
    grad = torch.randn(5, 12, generator=generator(1))
    (want,) = torch.autograd.grad(StraightThrough.apply(x, s, -8, 7), x, grad.double())
    leaf = x.detach().float().requires_grad_()
    for y in (
        ops.fake_quantize(leaf, s, qmin=-8, qmax=7),
        FakeQuantize.apply(leaf, s, 0, -8, 7),
    ):
        (got,) = torch.autograd.grad(y, leaf, grad)
        assert_same_bits(got, want.float())


@pytest.mark.parametrize("limits", LEARNED, ids=str)
def test_learned_gradients_are_those_of_the_surrogate(limits):
    """Also with respect to the scale while the offset stays: LSQ+'s coordinates."""
    qmin, qmax = limits
    s, offset = torch.tensor([0.17]), torch.tensor([0.3])
    x = torch.randn(40, generator=generator(2)) * s * (qmax - qmin)
    grad = torch.randn(40, generator=generator(1))
    z = functional.learned_zero_point(s, offset, qmin, qmax)
    v = x * (1 / s)
    inside = (qmin - z < v) & (v < qmax - z)
    wide = [t.double().requires_grad_() for t in (x, s, offset)]
    residual = torch.round(v).double() - wide[0].detach() / wide[1].detach()
    frozen = inside, residual, torch.where(v <= qmin - z, qmin, qmax).double()
    assert 0 < inside.sum() < 40

    def surrogate(x, s, offset):
        return LearnedSurrogate.apply(x, s, offset, frozen, qmin, qmax)

    assert gradcheck(surrogate, wide)
    want = torch.autograd.grad(surrogate(*wide), wide, grad.double())
    leaves = [t.clone().requires_grad_() for t in (x, s, offset)]
    y = ops.fake_quantize_learned(*leaves, qmin=qmin, qmax=qmax, grad_factor=0.25)
    got = torch.autograd.grad(y, leaves, grad)
    assert_same_bits(got[0], want[0].float())
    for ours, exact in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(ours.double(), exact * 0.25, rtol=1e-6, atol=1e-6)


def test_mask_gradient_is_linear_and_has_gradients_of_gradients():
    bits = functional.pack_bits(torch.rand(3, 7, generator=generator(0)) < 0.5)
    grad = torch.randn(3, 7, generator=generator(1)).requires_grad_()
    loose = {"eps": 0.5, "atol": 1e-3}
    assert gradcheck(lambda g: ops.mask_gradient(g, bits), (grad,), **loose)
    assert gradgradcheck(lambda g: ops.mask_gradient(g, bits) * g, (grad,), **loose)


def test_gradients_of_gradients():
    x = torch.linspace(-2, 2, 9).requires_grad_()
    for call in (
        lambda: ops.fake_quantize(x, 0.5, qmin=-2, qmax=2),
        lambda: FakeQuantize.apply(x, 0.5, 0, -2, 2),
    ):
        (grad,) = torch.autograd.grad((call() * x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), x)
        mask = functional.in_range(x.detach(), 0.5, qmin=-2, qmax=2)
        assert torch.equal(second, 2 * mask.float())


def test_gradients_of_learned_gradients_are_refused():
    x, step = torch.ones(3, requires_grad=True), torch.tensor([0.5], requires_grad=True)
    y = ops.fake_quantize_learned(x, step).sum()
    with pytest.raises(RuntimeError, match="backward without create_graph=True"):
        torch.autograd.grad(y, (x, step), create_graph=True)


def test_only_what_is_asked_for_gets_a_gradient():
    x, step, offset = torch.ones(3), torch.tensor([0.5], requires_grad=True), torch.zeros(1)
    ops.fake_quantize_learned(x, step, offset).sum().backward()
    assert step.grad is not None and x.grad is None and offset.grad is None
    offset.requires_grad_()
    ops.fake_quantize_learned(x * 1e3, step.detach(), offset).sum().backward()
    assert offset.grad.tolist() == [3.0]
    x.requires_grad_()
    for name in ("fake_quantize_mask", "in_range", "positive", "minmax"):
        arguments = (x,) if name in ("positive", "minmax") else (x, 0.5)
        result = getattr(ops, name)(*arguments)
        results = result if isinstance(result, tuple) else (result,)
        assert not any(t.requires_grad for t in results), name


def test_forward_mode_raises_instead_of_vanishing():
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.ones(3), torch.ones(3))
        for call in (
            lambda: ops.fake_quantize(x, 0.5),
            lambda: ops.fake_quantize_learned(x, torch.ones(1)),
            lambda: ops.mask_gradient(x, torch.ones(1, dtype=torch.uint8)),
        ):
            with pytest.raises(RuntimeError, match="jvp is not implemented"):
                call()


def saved_bytes(call):
    """Of the tensors that autograd keeps for backward; what the arguments hold anyway is free."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(sizes)


def test_one_bit_an_element_is_kept():
    x = torch.randn(100, 33, requires_grad=True)
    expected = (3300 + 7) // 8
    assert saved_bytes(lambda: ops.fake_quantize(x, 0.1)) == expected
    assert saved_bytes(lambda: FakeQuantize.apply(x, 0.1, 0, -8, 7)) == expected
    assert saved_bytes(lambda: ops.fake_quantize(x.detach(), 0.1)) == 0


# ---------------------------------------------------------------- FakeQuantize

X = floats(4, 5, 6, 7, seed=3)
SHAPES = (
    (1,),
    (5, 1, 1),
    (1, 5, 1, 1),
    (4, 1, 1, 1),
    (4, 5, 6, 1),
    (4, 5, 1, 1),
    (7,),
    (6, 7),
    (5, 6, 1),
    (1, 1, 6, 1),
    (4, 1, 6, 1),
    (1, 5, 1, 7),
    (4, 5, 6, 7),
    (1, 1, 1, 1),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ZERO_POINTS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_any_scale_that_broadcasts(shape, kind, layout):
    s = torch.rand(shape, generator=generator(1)) * 0.3 + 0.05
    z = zero_points(kind, shape, -8, 7)
    x = in_layout(X, layout).requires_grad_()
    y = FakeQuantize.apply(x, s, z, -8, 7)
    each = [None if t is None else t.expand(X.shape).reshape(-1) for t in (s, z)]
    kwargs = {"qmin": -8, "qmax": 7, "granularity": PerAxis(0)}
    flat = X.reshape(-1)
    assert_same_bits(y.detach(), functional.fake_quantize(flat, *each, **kwargs).view(X.shape))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, functional.in_range(flat, *each, **kwargs).view(X.shape).float())
    assert_same_bits(FakeQuantize.apply(x.detach(), s, z, -8, 7), y.detach())


def test_zero_point_and_scale_broadcast_against_each_other():
    s, z = torch.tensor([0.1]), torch.arange(-2, 3, dtype=torch.int32).reshape(5, 1, 1)
    expected = FakeQuantize.apply(X, s.expand(5, 1, 1), z, -8, 7)
    assert_same_bits(FakeQuantize.apply(X, s, z, -8, 7), expected)
    assert_same_bits(FakeQuantize.apply(X, 0.1, z, -8, 7), expected)
    wide = torch.full((5, 1, 1), 0.1)
    one = torch.tensor([2], dtype=torch.int32)
    assert_same_bits(FakeQuantize.apply(X, wide, one, -8, 7), FakeQuantize.apply(X, 0.1, 2, -8, 7))


def test_groups_along_the_last_axis():
    x = floats(6, 70).requires_grad_()
    s = torch.rand(6, 3, generator=generator(1)) * 0.1 + 0.01
    y = FakeQuantize.apply(x, s, None, -8, 7, 32)
    kwargs = {"qmin": -8, "qmax": 7, "granularity": PerGroup(32)}
    assert_same_bits(y.detach(), functional.fake_quantize(x.detach(), s, **kwargs))
    y.sum().backward()
    assert torch.equal(x.grad, functional.in_range(x.detach(), s, **kwargs).float())


def test_empty_and_scalar_tensors():
    for shape in ((), (0,), (3, 0), (0, 4)):
        x = torch.ones(shape, requires_grad=True)
        y = FakeQuantize.apply(x, 0.3, 0, -8, 7)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad.shape == shape
    assert FakeQuantize.apply(torch.ones(3, 0), torch.ones(3, 1), 0, -8, 7).shape == (3, 0)


@pytest.mark.parametrize("shape", [(1,), (5, 1), (6, 1, 1)], ids=str)
def test_compiled_without_graph_breaks(shape):
    x = floats(6, 5, 8).requires_grad_()
    s = torch.rand(shape, generator=generator(0)) * 0.1 + 0.05

    def model(x):
        return FakeQuantize.apply(x, s, 1, -8, 7) * 2

    expected, grad = model(x), torch.autograd.grad(model(x).sum(), x)[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(x).detach(), expected.detach())
    assert_same_bits(torch.autograd.grad(compiled(x).sum(), x)[0], grad)


def test_learned_steps_compiled():
    leaves = [floats(6, 40), torch.full((6,), 0.1), torch.full((6,), 0.02)]
    leaves = [t.requires_grad_() for t in leaves]

    def model(x, s, offset):
        return ops.fake_quantize_learned(
            x, s, offset, qmin=-8, qmax=7, grad_factor=0.1, granularity=PerAxis(0)
        ).sin()

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(*leaves).detach(), model(*leaves).detach())
    grads = (torch.autograd.grad(call(*leaves).sum(), leaves) for call in (model, compiled))
    for want, got in zip(*grads, strict=True):
        assert_same_bits(got, want)


def test_under_autocast_the_input_keeps_its_type():
    x = floats(3, 8).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = FakeQuantize.apply(x, 0.1, 0, -8, 7)
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: FakeQuantize.apply(x.long(), 0.1, 0, -8, 7),
            TypeError,
            "FakeQuantize: x must be float32, bfloat16 or float16, got int64 [2, 3]; "
            "convert it with .to()",
        ),
        (
            lambda x: FakeQuantize.apply(x, 0.0, 0, -8, 7),
            ValueError,
            "FakeQuantize: scale must be finite and at least 2^-126, got 0.0",
        ),
        (
            lambda x: FakeQuantize.apply(x, torch.tensor([NAN]), 0, -8, 7),
            ValueError,
            "FakeQuantize: scale must be finite and at least 2^-126, got nan",
        ),
        (
            lambda x: FakeQuantize.apply(x, torch.tensor([[0.1], [-0.1]]), 0, -8, 7),
            ValueError,
            "fake_quantize: scale must be finite and at least 2^-126, got -0.1",
        ),
        (
            lambda x: FakeQuantize.apply(x, torch.tensor([INF]), 0, -8, 7),
            ValueError,
            "fake_quantize: scale must be finite and at least 2^-126, got inf",
        ),
        (
            lambda x: FakeQuantize.apply(x, torch.ones(1).double(), 0, -8, 7),
            TypeError,
            "FakeQuantize: scale must be float32, got float64 [1]; convert it with .to()",
        ),
        (
            lambda x: FakeQuantize.apply(x, torch.ones(2), 0, -8, 7),
            ValueError,
            "FakeQuantize: scale must be a number or broadcast against x [2, 3], "
            "got float32 [2]; pass group_size for groups along the last axis",
        ),
        (
            lambda x: FakeQuantize.apply(x, torch.ones(2, 1, 1), 0, -8, 7),
            ValueError,
            "FakeQuantize: scale must be a number or broadcast against x [2, 3], "
            "got float32 [2, 1, 1]; pass group_size for groups along the last axis",
        ),
        (
            lambda x: FakeQuantize.apply(x, torch.ones(1, device="meta"), 0, -8, 7),
            ValueError,
            "FakeQuantize: scale must be on the input's device cpu, got meta; "
            "move it with .to(device)",
        ),
        (
            lambda x: FakeQuantize.apply(x, 0.1, 0, 7, 7),
            ValueError,
            "FakeQuantize: qmin must be less than qmax, both within [-2^22, 2^22], "
            "got qmin = 7, qmax = 7",
        ),
        (
            lambda x: FakeQuantize.apply(x, 0.1, 8, -8, 7),
            ValueError,
            "FakeQuantize: zero_point must be from -8 to 7, got 8",
        ),
        (
            lambda x: FakeQuantize.apply(x, 0.1, 0.5, -8, 7),
            TypeError,
            "FakeQuantize: zero_point must be None, an int or an int32 tensor of shape [1], "
            "got float 0.5; pass a float32 tensor for a real-valued zero point",
        ),
        (
            lambda x: FakeQuantize.apply(x, torch.ones(2, 1), torch.zeros(3, 1).int(), -8, 7),
            ValueError,
            "FakeQuantize: zero_point must broadcast against scale [2, 1], got int32 [3, 1]",
        ),
        (
            lambda x: FakeQuantize.apply(x, torch.ones(2, 2), 0, -8, 7, 32),
            ValueError,
            "fake_quantize: scale must have shape [2, 1] (one value per group of 32), "
            "got float32 [2, 2]",
        ),
        (
            lambda x: ops.fake_quantize(x.double(), 0.1),
            TypeError,
            "fake_quantize: input must be float32, bfloat16 or float16, got float64 [2, 3]; "
            "convert it with .to(torch.float32)",
        ),
        (
            lambda x: torch.ops.torchquant.in_range(x, torch.ones(1), None, 0, 2**23),
            ValueError,
            "in_range: qmin must be less than qmax, both within [-2^22, 2^22], "
            "got qmin = 0, qmax = 8388608",
        ),
        (
            lambda x: ops.mask_gradient(x, torch.zeros(2, dtype=torch.uint8)),
            ValueError,
            "mask_gradient: bits must be uint8 [1], one bit per element of grad, got uint8 [2]",
        ),
        (
            lambda x: ops.mask_gradient(x, torch.zeros(1, dtype=torch.bool)),
            TypeError,
            "mask_gradient: bits must be uint8, got bool [1]; convert it with .to(torch.uint8)",
        ),
        (
            lambda x: ops.fake_quantize_learned(x, torch.ones(1), torch.ones(2)),
            ValueError,
            "fake_quantize_learned: offset must have scale's shape [1], got float32 [2]",
        ),
        (
            lambda x: ops.fake_quantize_learned_backward(x.half(), x, torch.ones(1)),
            TypeError,
            "fake_quantize_learned_backward: grad must be float32, got float16 [2, 3]; "
            "convert it with .to(torch.float32)",
        ),
        (
            lambda x: ops.fake_quantize_learned_backward(x[:1], x, torch.ones(1)),
            ValueError,
            "fake_quantize_learned_backward: grad must have input's shape [2, 3], "
            "got float32 [1, 3]",
        ),
        (
            lambda x: ops.fake_quantize_learned_backward(
                x, x, torch.ones(1), torch.tensor([8]).int(), qmin=-8, qmax=7
            ),
            ValueError,
            "fake_quantize_learned_backward: zero_point must be from -8 to 7, got 8",
        ),
        (
            lambda x: torch.ops.torchquant.minmax(x, 2),
            ValueError,
            "minmax: axis must be within the 2 dimensions of input, got 2",
        ),
        (
            lambda x: torch.ops.torchquant.minmax(x, None, 0),
            ValueError,
            "minmax: group_size must be at least 1, got 0",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(torch.ones(2, 3))
