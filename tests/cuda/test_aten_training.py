"""Fake quantization, ranges and the quantized layer of training in plain ATen: the CPU's bits.

A learned step's sums and the product with a fake-quantized weight are floating-point sums without
a promised order: bounded here, and the same on every run.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    DENORMAL,
    EXTREME,
    FLOATS,
    INF,
    LAYOUTS,
    NAN,
    NOT_FINITE,
    SPECIAL,
    assert_same_bits,
    floats,
    generator,
    in_layout,
    integers,
    positive,
    sprinkle,
)
from support.aten import ATEN, DEVICES, KERNELS, check_same, moved
from torch import Tensor

SPICES: dict[str, tuple[float, ...]] = {
    "plain": (),
    "extreme": SPECIAL + EXTREME,
    "not_finite": SPECIAL + NOT_FINITE,
}
RANGES = ((-128, 127), (-8, 7), (0, 15), (-4, 3), (-2, 1), (0, 255), (-(2**22), 2**22))
KINDS = ("tensor", "axis", "groups", "tokens")
LARGE = 2**23 + 11  # more than a block: large tensors are worked on in parts
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 17, 64, 65]), max_size=4).filter(
    lambda sizes: torch.Size(sizes).numel() <= 20_000
)
tensors = st.fixed_dictionaries(
    {
        "sizes": shapes,
        "dtype": st.sampled_from(FLOATS),
        "layout": st.sampled_from(LAYOUTS),
        "spice": st.sampled_from(list(SPICES)),
        "seed": st.integers(0, 10**6),
    }
)
granularities = st.tuples(st.sampled_from(KINDS), st.integers(0, 3), st.integers(1, 70))


def tensor_of(sizes: list[int], dtype: torch.dtype, layout: str, spice: str, seed: int) -> Tensor:
    if not sizes:
        return floats(seed=seed, dtype=dtype)
    x = sprinkle(floats(*sizes, seed=seed), SPICES[spice], seed, 0.3)
    return in_layout(x.to(dtype), layout)


def granularity_of(x: Tensor, granularity: tuple[str, int, int]) -> tuple[list[int], Any, Any]:
    """Shape of the scales, ``axis`` and ``group_size``."""
    kind, axis, group_size = granularity
    if kind == "tensor" or x.dim() == 0:
        return [1], None, None
    if kind == "axis":
        return [x.shape[axis % x.dim()]], axis % x.dim(), None
    if kind == "tokens":
        return [*x.shape[:-1], 1], None, max(1, x.shape[-1])
    return [*x.shape[:-1], -(-x.shape[-1] // group_size)], None, group_size


def scales_of(shape: list[int], seed: int, odd: bool) -> Tensor:
    scale = positive(*shape, seed=seed)
    if odd and scale.numel():
        scale.view(-1)[seed % scale.numel()] = (NAN, 2.0**-126, 3e38, 1.0)[seed % 4]
    return scale


# ---------------------------------------------------------------- fake quantization


@given(
    x=tensors,
    granularity=granularities,
    limits=st.sampled_from(RANGES),
    zero=st.sampled_from(("none", "one", "each", "real")),
    odd=st.booleans(),
)
@settings(max_examples=200)
def test_fake_quantize(x, granularity, limits, zero, odd):
    seed, x = x["seed"], tensor_of(**x)
    shape, axis, group = granularity_of(x, granularity)
    scale = scales_of(shape, seed, odd)
    point = None
    if zero == "one":
        point = torch.tensor(seed % 7, dtype=torch.int32)
    elif zero == "each":
        point = integers(*shape, seed=seed, dtype=torch.int8).to(torch.int32)
    elif zero == "real":
        point = floats(*shape, seed=seed + 1)
    arguments = (x, scale, point, *limits, axis, group)
    check_same("fake_quantize", *arguments)
    check_same("fake_quantize_mask", *arguments)
    check_same("in_range", *arguments)


@given(x=tensors, seed=st.integers(0, 10**6))
def test_masks(x, seed):
    x = tensor_of(**x)
    bits = check_same("positive", x)[0]
    check_same("mask_gradient", x, bits)
    check_same("mask_gradient", x, integers(bits.numel(), seed=seed, dtype=torch.uint8))


@given(x=tensors, granularity=granularities)
@settings(max_examples=150)
def test_minmax(x, granularity):
    x = tensor_of(**x)
    _, axis, group = granularity_of(x, granularity)
    check_same("minmax", x, axis, group)


@given(
    x=tensors,
    granularity=granularities,
    limits=st.sampled_from(RANGES[:-1]),
    offsets=st.sampled_from((None, 1.0, 1e30, NAN)),
    step=st.sampled_from((None, 0.0, -1.0, DENORMAL, NAN, INF)),
)
@settings(max_examples=150)
def test_learned_steps(x, granularity, limits, offsets, step):
    seed, x = x["seed"], tensor_of(**x)
    shape, axis, group = granularity_of(x, granularity)
    scale = positive(*shape, seed=seed)
    if step is not None and scale.numel():
        scale.view(-1)[seed % scale.numel()] = step
    offset = None if offsets is None else floats(*shape, seed=seed + 1) * offsets
    check_same("fake_quantize_learned", x, scale, offset, *limits, 0.5, axis, group)


@given(
    x=tensors,
    granularity=granularities,
    limits=st.sampled_from(RANGES[:-1]),
    zero=st.booleans(),
)
@settings(max_examples=150)
def test_gradients_of_learned_steps(x, granularity, limits, zero):
    """The input's gradient has the kernel's bits, the sums differ by rounding."""
    seed = x["seed"]
    grad, x = tensor_of(**x | {"seed": seed + 1, "spice": "plain"}), tensor_of(**x)
    shape, axis, group = granularity_of(x, granularity)
    scale = positive(*shape, seed=seed)
    point = torch.full_like(scale, limits[1], dtype=torch.int32) if zero else None
    arguments = (grad, x, scale, point, *limits, axis, group)
    expected = KERNELS.fake_quantize_learned_backward(*arguments)
    # of every term's magnitude: grad times at most the range's ends
    terms = KERNELS.fake_quantize_learned_backward(
        grad.abs() * 300, torch.full_like(x, INF), scale, None, -1, 1, axis, group
    )[1]
    for device in DEVICES:
        there = [moved(a, device) if isinstance(a, Tensor) else a for a in arguments]
        got = [t.cpu() for t in ATEN.fake_quantize_learned_backward(*there)]
        assert_same_bits(got[0], expected[0], device)
        for sums, wanted in zip(got[1:], expected[1:], strict=True):
            assert sums.dtype == torch.float32 and sums.shape == wanted.shape
            assert torch.equal(sums.isnan(), wanted.isnan())
            close = (sums - wanted).abs() <= terms.abs() * 2.0**-18
            assert bool((close | sums.isnan()).all())
        again = ATEN.fake_quantize_learned_backward(*there)
        for a, b in zip(got, again, strict=True):
            assert_same_bits(a, b.cpu(), "again")


@pytest.mark.parametrize("sizes", [(LARGE,), (3, LARGE // 3), (LARGE // 40, 41)], ids=str)
def test_large_tensors(sizes: tuple[int, ...]) -> None:
    x = torch.randn(sizes, generator=generator(1)).to(torch.bfloat16)
    scale = positive(sizes[-1], seed=2)
    check_same("fake_quantize_mask", x, scale, None, -8, 7, -1, None)
    check_same("minmax", x, None, 40)
    grad, one = x.flip(0), torch.tensor([0.25])
    got = ATEN.fake_quantize_learned_backward(grad, x, one, None, -8, 7)
    expected = KERNELS.fake_quantize_learned_backward(grad, x, one, None, -8, 7)
    assert_same_bits(got[0], expected[0])
    torch.testing.assert_close(got[1:], expected[1:], rtol=1e-3, atol=1.0)


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("sizes", [(3, 5, 7), (1, 1, 1), (20, 33, 64), (9, 2, 2**22 + 1)], ids=str)
@pytest.mark.parametrize("zero", [False, True])
def test_mm_fake_quantized(sizes: tuple[int, int, int], zero: bool) -> None:
    rows, outputs, inputs = sizes
    grad, weight = floats(rows, outputs, seed=1), floats(outputs, inputs, seed=2)
    scale = positive(outputs, seed=3)
    point = torch.arange(outputs, dtype=torch.int32) % 8 if zero else None
    quantized = KERNELS.fake_quantize(weight, scale, point, -8, 7, 0)
    expected = grad.double() @ quantized.double()
    bound = grad.double().abs() @ quantized.double().abs() * 2.0**-22 + 2.0**-140
    for device in DEVICES:
        there = [None if t is None else moved(t, device) for t in (grad, weight, scale, point)]
        got = ATEN.mm_fake_quantized(*there, -8, 7).cpu()
        assert bool(((got.double() - expected).abs() <= bound).all())
    assert ATEN.mm_fake_quantized(grad[:0], weight, scale, point, -8, 7).shape == (0, inputs)


@given(
    rows=st.integers(0, 20),
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 70),
    activations=st.sampled_from(("dynamic", "symmetric", "static", "zero", "offset", "unsigned")),
    weight=st.sampled_from(("own", "asymmetric", "given")),
    bits=st.integers(2, 8),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from((None, *FLOATS))),
    relu=st.booleans(),
    spice=st.sampled_from(list(SPICES)),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150)
def test_qat_linear(rows, outputs, inputs, activations, weight, bits, dtypes, relu, spice, seed):
    x = sprinkle(floats(rows, inputs, seed=seed, dtype=dtypes[0]), SPICES[spice], seed)
    w = floats(outputs, inputs, seed=seed + 1)
    bias = floats(outputs, seed=seed + 2, dtype=dtypes[0]) if seed % 2 else None
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = None if activations in ("dynamic", "symmetric") else positive(1, seed=seed)
    point = torch.tensor([seed % 2], dtype=torch.int32) if activations == "zero" else None
    offset = floats(1, seed=seed) if activations == "offset" else None
    input_range = (0, 255) if activations == "unsigned" else (qmin, qmax)
    check_same(
        "qat_linear",
        *(x, w, bias, scale, point, offset, *input_range, activations == "symmetric"),
        positive(outputs, seed=seed) if weight == "given" else None,
        *(qmin, qmax, weight != "asymmetric", "relu" if relu else "none", 0.0, 0.0, dtypes[1]),
    )


# ---------------------------------------------------------------- what holds for all


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: ATEN.fake_quantize(x, torch.ones(2), None, 7, -8),
            ValueError,
            "fake_quantize: qmin must be less than qmax, both within [-2^22, 2^22], got "
            "qmin = 7, qmax = -8",
        ),
        (
            lambda x: ATEN.in_range(x, torch.ones(2), None, -8, 7),
            ValueError,
            "in_range: scale must hold one value without axis or group_size, got float32 [2]; "
            "pass axis=... or group_size=...",
        ),
        (
            lambda x: ATEN.fake_quantize(x, torch.ones(1, device="meta"), None, -8, 7),
            ValueError,
            "fake_quantize: scale must be on the input's device cpu, got meta; move it with "
            ".to(device)",
        ),
        (
            lambda x: ATEN.mask_gradient(x, torch.zeros(2, dtype=torch.uint8)),
            ValueError,
            "mask_gradient: bits must be uint8 [1], one bit per element of grad, got uint8 [2]",
        ),
        (
            lambda x: ATEN.fake_quantize_learned_backward(x.double(), x, torch.ones(1), None, 0, 7),
            TypeError,
            "fake_quantize_learned_backward: grad must be float32, got float64 [2, 3]; convert it "
            "with .to(torch.float32)",
        ),
        (
            lambda x: ATEN.mm_fake_quantized(x, x, torch.ones(2), None, -8, 7),
            ValueError,
            "mm_fake_quantized: grad must have shape [M, N] and weight [N, K], got float32 [2, 3] "
            "and float32 [2, 3]",
        ),
        (
            lambda x: ATEN.qat_linear(
                *(x, x.to("meta"), None, None, None, None, -128, 127, False, None, -127, 127, True)
            ),
            ValueError,
            "qat_linear: weight must be on the input's device cpu, got meta; move it with "
            ".to(device)",
        ),
    ],
)
def test_refusals(call: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(floats(2, 3))
