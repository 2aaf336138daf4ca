"""Fake quantization: values and masks are those of the specification."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    FLOATS,
    INF,
    LAYOUTS,
    NAN,
    assert_same_bits,
    check_everywhere,
    floats,
    generator,
    in_layout,
    sprinkle,
    threads,
)
from support.fake_quantize import (
    LEARNED,
    RANGES,
    ZERO_POINTS,
    awkward,
    check_learned_gradients,
    granularities,
    scales,
    zero_points,
)

from torchquant import FakeQuantize, functional, ops
from torchquant.scheme import PerAxis, PerGroup, PerTensor, PerToken


@pytest.mark.triton_path
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


@pytest.mark.triton_path
def test_in_range_looks_at_the_rounded_value():
    s = torch.tensor([0.5])
    x = torch.tensor([-2.25, -2.26, 1.75, 1.76, 0.0, NAN, INF, -INF])
    expected = [True, False, False, False, True, False, False, False]
    assert functional.in_range(x, s, qmin=-4, qmax=3).tolist() == expected  # 3.5 rounds to 4
    assert functional.in_range(x, s, 4, qmin=0, qmax=7).tolist() == expected


@pytest.mark.triton_path
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


@pytest.mark.triton_path
@pytest.mark.parametrize("value", [0.0, -1.0, 1e-45, -INF, 2.0**-127])
def test_a_step_at_or_below_zero_is_used_as_the_least(value):
    x, least = floats(3, 20), torch.tensor([2.0**-126])
    expected = functional.fake_quantize(x, least)
    check_everywhere(lambda: ops.fake_quantize_learned(x, torch.tensor([value])), expected)
    assert_same_bits(functional.fake_quantize_learned(x, torch.tensor([value])), expected)
    grads = ops.fake_quantize_learned_backward(x, x, torch.tensor([value]))
    for got, want in zip(grads, ops.fake_quantize_learned_backward(x, x, least), strict=True):
        assert_same_bits(got, want)


@pytest.mark.triton_path
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


@pytest.mark.triton_path
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
