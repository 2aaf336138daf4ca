"""Fake quantization: gradients, and the tensors that are saved for them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    EXTREME,
    FLOATS,
    LAYOUTS,
    NOT_FINITE,
    SPECIAL,
    assert_same_bits,
    check_everywhere,
    floats,
    generator,
    in_layout,
    sprinkle,
)
from support.fake_quantize import (
    LEARNED,
    check_learned_gradients,
    granularities,
    scales,
    zero_points,
)
from torch.autograd import gradcheck, gradgradcheck

from torchquant import FakeQuantize, functional, ops


@pytest.mark.triton_path
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


@pytest.mark.triton_path
@pytest.mark.parametrize("value", NOT_FINITE)
def test_what_is_not_finite_gets_no_gradient(value):
    x = torch.tensor([0.1, value, 0.3], requires_grad=True)
    ops.fake_quantize(x, 0.1).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 1.0]
    step = torch.tensor([0.1], requires_grad=True)
    (grad,) = torch.autograd.grad(ops.fake_quantize_learned(x, step).sum(), x)
    assert grad.tolist() == [1.0, 0.0, 1.0]


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


@pytest.mark.triton_path
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


@pytest.mark.triton_path
def test_mask_gradient_is_linear_and_has_gradients_of_gradients():
    bits = functional.pack_bits(torch.rand(3, 7, generator=generator(0)) < 0.5)
    grad = torch.randn(3, 7, generator=generator(1)).requires_grad_()
    loose = {"eps": 0.5, "atol": 1e-3}
    assert gradcheck(lambda g: ops.mask_gradient(g, bits), (grad,), **loose)
    assert gradgradcheck(lambda g: ops.mask_gradient(g, bits) * g, (grad,), **loose)


@pytest.mark.triton_path
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


@pytest.mark.triton_path
def test_gradients_of_learned_gradients_are_refused():
    x, step = torch.ones(3, requires_grad=True), torch.tensor([0.5], requires_grad=True)
    y = ops.fake_quantize_learned(x, step).sum()
    with pytest.raises(RuntimeError, match="backward without create_graph=True"):
        torch.autograd.grad(y, (x, step), create_graph=True)


@pytest.mark.triton_path
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
    """The bytes of the tensors that autograd saves for backward."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(sizes)


@pytest.mark.triton_path
def test_one_bit_an_element_is_kept():
    x = torch.randn(100, 33, requires_grad=True)
    expected = (3300 + 7) // 8
    assert saved_bytes(lambda: ops.fake_quantize(x, 0.1)) == expected
    assert saved_bytes(lambda: FakeQuantize.apply(x, 0.1, 0, -8, 7)) == expected
    assert saved_bytes(lambda: ops.fake_quantize(x.detach(), 0.1)) == 0
