"""Fake quantization: shapes that broadcast, compilation, autocast, refusals."""

import re

import pytest
import torch
from support import (
    INF,
    NAN,
    assert_same_bits,
    floats,
    generator,
    in_layout,
)
from support.fake_quantize import ZERO_POINTS, zero_points

from torchquant import FakeQuantize, functional, ops
from torchquant.scheme import PerAxis, PerGroup

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


reads_values = pytest.mark.cpu_only("only the CPU's kernels read these values and refuse them")


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


@pytest.mark.triton_path
def test_zero_point_and_scale_broadcast_against_each_other():
    s, z = torch.tensor([0.1]), torch.arange(-2, 3, dtype=torch.int32).reshape(5, 1, 1)
    expected = FakeQuantize.apply(X, s.expand(5, 1, 1), z, -8, 7)
    assert_same_bits(FakeQuantize.apply(X, s, z, -8, 7), expected)
    assert_same_bits(FakeQuantize.apply(X, 0.1, z, -8, 7), expected)
    wide = torch.full((5, 1, 1), 0.1)
    one = torch.tensor([2], dtype=torch.int32)
    assert_same_bits(FakeQuantize.apply(X, wide, one, -8, 7), FakeQuantize.apply(X, 0.1, 2, -8, 7))


@pytest.mark.triton_path
def test_groups_along_the_last_axis():
    x = floats(6, 70).requires_grad_()
    s = torch.rand(6, 3, generator=generator(1)) * 0.1 + 0.01
    y = FakeQuantize.apply(x, s, None, -8, 7, 32)
    kwargs = {"qmin": -8, "qmax": 7, "granularity": PerGroup(32)}
    assert_same_bits(y.detach(), functional.fake_quantize(x.detach(), s, **kwargs))
    y.sum().backward()
    assert torch.equal(x.grad, functional.in_range(x.detach(), s, **kwargs).float())


@pytest.mark.triton_path
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
        pytest.param(
            lambda x: FakeQuantize.apply(x, torch.tensor([[0.1], [-0.1]]), 0, -8, 7),
            ValueError,
            "fake_quantize: scale must be finite and at least 2^-126, got -0.1",
            marks=reads_values,
        ),
        pytest.param(
            lambda x: FakeQuantize.apply(x, torch.tensor([INF]), 0, -8, 7),
            ValueError,
            "fake_quantize: scale must be finite and at least 2^-126, got inf",
            marks=reads_values,
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
        pytest.param(
            lambda x: ops.fake_quantize_learned_backward(
                x, x, torch.ones(1), torch.tensor([8]).int(), qmin=-8, qmax=7
            ),
            ValueError,
            "fake_quantize_learned_backward: zero_point must be from -8 to 7, got 8",
            marks=reads_values,
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
