"""Activations on Triton's kernels, and their fp32 arithmetic: the specification's bits."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ACTIVATIONS,
    EXTREME,
    FLOATS,
    LAYOUTS,
    NOT_FINITE,
    SPECIAL,
    assert_same_bits,
    generator,
    in_layout,
)
from support import triton as support_triton
from support.triton_operators import (
    awkward,
    check,
    run,
    seeds,
    shapes,
    small_tiles_and_poisoned_memory,  # noqa: F401  (a fixture)
)

from torchquant import functional as F
from torchquant.functional._arithmetic import fmaf

language, activation, launch = (
    support_triton.module(name) for name in ("kernels.language", "kernels.activations", "launch")
)

# numpy, with which the interpreter computes, warns of overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

apply_activation = activation.apply_activation
fma, rint, quantize, reciprocal, divide = (
    getattr(language, name) for name in ("fma", "rint", "quantize", "reciprocal", "divide")
)


@triton.jit
def _activation_kernel(x_ptr, out_ptr, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(out_ptr + at, apply_activation(x, ACTIVATION), mask=at < n)


@triton.jit
def _operation_kernel(
    x_ptr, y_ptr, z_ptr, out_ptr, n, OPERATION: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    y = tl.load(y_ptr + at, mask=at < n, other=0.0)
    z = tl.load(z_ptr + at, mask=at < n, other=0.0)
    if OPERATION == "fma":
        out = fma(x, y, z)
    elif OPERATION == "rint":
        out = rint(x)
    elif OPERATION == "quantize":
        out = quantize(x, y, -131.0, 124.0, 3).to(tl.float32)
    elif OPERATION == "divide":
        out = divide(x, y)
    elif OPERATION == "reciprocal":
        out = reciprocal(y)
    else:
        out = x.to(tl.bfloat16).to(tl.float32)
    tl.store(out_ptr + at, out, mask=at < n)


def _numbers(seed: int = 0) -> torch.Tensor:
    """Every magnitude, halves and their neighbours, and what is special."""
    g = generator(seed)
    random = torch.randint(-(2**31), 2**31, (6000,), generator=g).to(torch.int32)
    near = torch.randn(6000, generator=g) * torch.logspace(-3, 2, 6000)
    halves = (torch.arange(-300, 300) + 0.5).float()
    large = torch.arange(2**22 - 50, 2**22 + 50).float() * 2 + 0.5
    special = torch.tensor(SPECIAL + EXTREME + NOT_FINITE)
    parts = (random.view(torch.float32), near, halves, halves.nextafter(special[:1]), large)
    return torch.cat([*parts, -large, special])


def _run(kernel, *inputs: torch.Tensor, **options) -> torch.Tensor:
    n = inputs[0].numel()
    args = support_triton.to_device(*inputs)
    out = support_triton.poisoned(n, dtype=torch.float32)
    launch.launch(kernel, (triton.cdiv(n, 1024),), out.device, *args, out, n, **options, BLOCK=1024)
    return out.cpu()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_have_the_bits_of_the_specification(name: str) -> None:
    x = _numbers()
    got = _run(_activation_kernel, x, ACTIVATION=name)
    assert_same_bits(got, F.ACTIVATIONS[name](x), name)


def test_operations_have_the_bits_of_torch() -> None:
    x = _numbers()
    g = generator(1)
    y = x[torch.randperm(x.numel(), generator=g)]
    z = torch.where(torch.rand(x.shape, generator=g) < 0.5, -(x * y), x.flip(0))
    inverse = torch.exp2(torch.randint(-8, 8, x.shape, generator=g).float())
    steps = torch.round(x * inverse).clamp(-131, 124)
    expected = {
        "fma": (y, fmaf(x, y, z)),
        "rint": (y, torch.round(x)),
        "quantize": (inverse, torch.nan_to_num(steps, nan=0.0) + 3),
        "divide": (y, x / y),
        "reciprocal": (y, torch.ones(()) / y),
        "bf16": (y, x.to(torch.bfloat16).float()),
    }
    for operation, (second, want) in expected.items():
        got = _run(_operation_kernel, x, second, z, OPERATION=operation)
        assert_same_bits(got, want, operation)


# ---------------------------------------------------------------- operators


@pytest.mark.usefixtures("small_tiles_and_poisoned_memory")
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


@pytest.mark.usefixtures("small_tiles_and_poisoned_memory")
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
