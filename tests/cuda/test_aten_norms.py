"""rms_norm, layer_norm and attention in plain ATen: the CPU kernels' bits."""

import re
from collections.abc import Callable
from typing import Any

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
    floats,
    generator,
    in_layout,
    sprinkle,
)
from support.aten import ATEN, DEVICES, KERNELS, moved
from torch import Tensor

MASKS = ("none", "bool", "float", "one for all keys", "for all heads", "for all queries")


def check_same(name: str, *args: Any) -> Tensor:
    """The CPU kernel's bits, and its strides."""
    expected = getattr(KERNELS, name)(*args)
    for device in DEVICES:
        there = [moved(a, device) if isinstance(a, Tensor) else a for a in args]
        got = getattr(ATEN, name)(*there)
        assert_same_bits(got.cpu(), expected, (name, device))
        assert got.stride() == expected.stride() or got.numel() == 0
    return expected


def spiced(*shape: int, seed: int, dtype: torch.dtype, spice: str) -> Tensor:
    x = floats(*shape, seed=seed, dtype=dtype)
    values = {"plain": (), "extreme": SPECIAL + EXTREME, "not_finite": SPECIAL + NOT_FINITE}
    return sprinkle(x, values[spice], seed, 0.2) if x.numel() else x


# ---------------------------------------------------------------- norms


@given(
    sizes=st.lists(st.integers(0, 4), max_size=2),
    last=st.one_of(st.integers(0, 70), st.sampled_from([127, 256, 384])),
    dtype=st.sampled_from(FLOATS),
    channels=st.sampled_from(FLOATS),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    spice=st.sampled_from(["plain", "plain", "extreme", "not_finite"]),
    eps=st.sampled_from([0.0, 1e-6, 1e-5, 1.0]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 10**6),
)
def test_norms(sizes, last, dtype, channels, layouts, spice, eps, flags, seed):
    x, residual = (
        in_layout(spiced(*sizes, last, seed=seed + i, dtype=dtype, spice=spice), layout)
        for i, layout in enumerate(layouts)
    )
    weight = floats(last, seed=seed + 2, dtype=channels) if flags[0] else None
    bias = floats(last, seed=seed + 3, dtype=channels) if flags[0] and flags[1] else None
    check_same("rms_norm", x, weight, eps, flags[1])
    check_same("layer_norm", x, weight, bias, eps, residual if flags[2] else None)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_wide_rows(dtype: torch.dtype) -> None:
    x, weight = floats(20, 4096, seed=1, dtype=dtype), floats(4096, seed=2, dtype=dtype)
    check_same("rms_norm", x, weight, 1e-6, True)
    check_same("layer_norm", x, weight, weight, 1e-5, x.flip(0))


def test_more_rows_than_a_block() -> None:
    """Large tensors are worked on in parts."""
    x = torch.randn(2**19 + 3, 16, generator=generator(7))
    assert x.numel() > 2**23
    check_same("layer_norm", x, None, None, 1e-5, None)


# ---------------------------------------------------------------- attention


def mask_of(kind: str, shape: tuple[int, int, int, int], seed: int) -> Tensor | None:
    g = generator(seed)
    if kind == "none":
        return None
    if kind == "bool":
        return torch.rand(shape, generator=g) < 0.7
    if kind == "float":
        mask = torch.randn(shape, generator=g)
        return torch.where(torch.rand(shape, generator=g) < 0.2, float("-inf"), mask)
    if kind == "one for all keys":
        return torch.rand((*shape[:3], 1), generator=g) < 0.7
    if kind == "for all heads":
        return torch.randn((shape[0], 1, *shape[2:]), generator=g).to(torch.bfloat16)
    return torch.rand((1, 1, 1, shape[3]), generator=g) < 0.7


@given(
    batch=st.integers(0, 2),
    key_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    queries=st.integers(0, 20),
    keys=st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 65])),
    d=st.one_of(st.integers(1, 10), st.sampled_from([31, 32, 33, 64])),
    e=st.integers(0, 18),
    kind=st.sampled_from(MASKS),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.5, 0.0, -2.0]),
    dtype=st.sampled_from(FLOATS),
    size=st.sampled_from([1.0, 30.0, 2.0**-70]),
    layout=st.sampled_from(("contiguous", "transposed", "strided")),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60)
def test_attention(
    batch, key_heads, group, queries, keys, d, e, kind, causal, scale, dtype, size, layout, seed
):
    heads = key_heads * group
    shapes = ((batch, heads, queries, d), (batch, key_heads, keys, d), (batch, key_heads, keys, e))
    q, k, v = (
        in_layout((floats(*shape, seed=seed + i) * size).to(dtype), layout)
        for i, shape in enumerate(shapes)
    )
    mask = mask_of(kind, (batch, heads, queries, keys), seed)
    check_same("attention", q, k, v, mask, scale, causal)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_query_that_is_not_finite_stays_alone(value: float) -> None:
    q, k, v = (floats(1, 2, 9, 8, seed=i) for i in range(3))
    q[0, 1, 4, 3] = value
    check_same("attention", q, k, v, None, None, False)
    check_same("attention", q, k, v, None, None, True)


@pytest.mark.parametrize("shape", [(1, 1, 2100, 8), (1, 2, 1500, 8), (3, 1, 1300, 8)], ids=str)
def test_more_sums_than_a_block(shape: tuple[int, int, int, int]) -> None:
    """Queries, heads and entries of the batch are taken apart where all at once were too many."""
    q, k, v = (torch.randn(shape, generator=generator(i)) for i in range(3))
    check_same("attention", q, k, v[..., :3], None, None, True)


# ---------------------------------------------------------------- what holds for all


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: ATEN.rms_norm(x, x[0, 0, 0].to("meta"), 1e-6),
            "rms_norm: weight must be on the input's device cpu, got meta; move it with "
            ".to(device)",
        ),
        (
            lambda x: ATEN.layer_norm(x, None, x[0, 0, 0], 1e-6),
            "layer_norm: bias must come with a weight, got bias alone",
        ),
        (
            lambda x: ATEN.layer_norm(x, None, None, -1.0),
            "layer_norm: eps must be finite and not negative, got -1",
        ),
        (
            lambda x: ATEN.attention(x, x, x.to("meta")),
            "attention: value must be on the query's device cpu, got meta; move it with "
            ".to(device)",
        ),
        (
            lambda x: ATEN.attention(x, x[:, :, :, :4], x),
            "attention: key must be [batch, key heads, keys, d] with batch = 2 and d = 8, got "
            "float32 [2, 3, 4, 4]",
        ),
    ],
)
def test_refusals(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(floats(2, 3, 4, 8))
