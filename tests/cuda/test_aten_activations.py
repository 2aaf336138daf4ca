"""activation and gated_activation in plain ATen: the CPU kernels' bits."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    ACTIVATIONS,
    EXTREME,
    FLOATS,
    LAYOUTS,
    NOT_FINITE,
    SPECIAL,
    assert_same_bits,
    floats,
    generator,
    in_layout,
    sprinkle,
)
from support.aten import ATEN, DEVICES, KERNELS, moved
from torch import Tensor

activations = pytest.mark.parametrize("activation", ACTIVATIONS)
SIZES = st.lists(st.integers(0, 20), max_size=4)


def check_same(name: str, *args: Any) -> None:
    """The CPU kernel's bits, and its strides."""
    expected = getattr(KERNELS, name)(*args)
    for device in DEVICES:
        there = [moved(a, device) if isinstance(a, Tensor) else a for a in args]
        got = getattr(ATEN, name)(*there)
        assert_same_bits(got.cpu(), expected, (name, device))
        assert got.stride() == expected.stride() or got.numel() == 0


def numbers_of_every_kind(seed: int) -> Tensor:
    """Any bits at all, numbers around the functions' bends, and the special ones."""
    g = generator(seed)
    any_bits = torch.randint(-(2**31), 2**31, (60_000,), generator=g).to(torch.int32)
    ranges = [torch.randn(20_000, generator=g) * scale for scale in (0.01, 1.0, 10.0, 90.0)]
    rare = torch.tensor(SPECIAL + EXTREME + NOT_FINITE)
    return torch.cat([any_bits.view(torch.float32), *ranges, rare])


@activations
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numbers_of_every_kind(activation: str, dtype: torch.dtype) -> None:
    x = numbers_of_every_kind(1).to(dtype)
    for output in (None, *FLOATS):
        check_same("activation", x, activation, output)
    check_same("gated_activation", x, x.flip(0), activation)


@given(
    sizes=SIZES,
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from(FLOATS),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    seed=st.integers(0, 10**6),
)
def test_any_tensor(sizes, activation, dtype, layouts, seed):
    x, up = (
        sprinkle(floats(*sizes, seed=seed + i, dtype=dtype), SPECIAL + NOT_FINITE, seed, 0.5)
        if sizes
        else floats(seed=seed + i, dtype=dtype)
        for i in range(2)
    )
    if sizes:
        x, up = (in_layout(t, layout) for t, layout in zip((x, up), layouts, strict=True))
    check_same("activation", x, activation, None)
    assert_same_bits(
        ATEN.gated_activation(x, up, activation), KERNELS.gated_activation(x, up, activation)
    )


def test_more_elements_than_a_block():
    """Large tensors are worked on in parts."""
    x = torch.randn(3, 2**22 + 5, generator=generator(4))[:, 1:-1].t()
    check_same("activation", x, "relu", None)


def test_the_result_is_a_tensor_of_its_own():
    x = floats(3, 5)
    y = ATEN.activation(x, "none", None)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: ATEN.activation(x, "softmax", None),
            ValueError,
            "activation: activation must be one of none, relu, gelu, gelu_tanh, silu, tanh, "
            "sigmoid, relu6, hardswish, hardsigmoid, leaky_relu, got 'softmax'",
        ),
        (
            lambda x: ATEN.activation(x.to(torch.int8), "relu", None),
            TypeError,
            "activation: input must be float32, bfloat16 or float16, got int8 [2, 3]; convert it "
            "with .to(torch.float32)",
        ),
        (
            lambda x: ATEN.activation(x, "relu", torch.float64),
            TypeError,
            "activation: dtype must be float32, bfloat16 or float16, got float64",
        ),
        (
            lambda x: ATEN.gated_activation(x, x[:1], "relu"),
            ValueError,
            "gated_activation: up must have gate's shape [2, 3], got float32 [1, 3]",
        ),
        (
            lambda x: ATEN.gated_activation(x, x.to("meta"), "relu"),
            ValueError,
            "gated_activation: up must be on the gate's device cpu, got meta; move it with "
            ".to(device)",
        ),
    ],
)
def test_refusals(call: Callable[[Tensor], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(floats(2, 3))
