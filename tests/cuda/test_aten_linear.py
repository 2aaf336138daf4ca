"""The linear operators composed of torch's operations (csrc/aten): the CPU kernels' bits."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ACTIVATIONS,
    EXTREME,
    FLOATS,
    FLT_MAX,
    INF,
    LAYOUTS,
    NAN,
    NOT_FINITE,
    SHAPES,
    SPICES,
    Shape,
    assert_same_bits,
    floats,
    generator,
    in_layout,
    integers,
    positive,
    sprinkle,
)
from support.aten import (
    ATEN,
    DEVICES,
    KERNELS,
    check_same,
    moved,
    packed,
    zeros_of,
)
from torch import Tensor

from torchquant.scheme import quant_range

ROWS = st.one_of(st.integers(0, 40), st.sampled_from([16, 17, 31, 32, 33, 64, 65]))

SIZES = st.one_of(
    st.integers(1, 10),
    st.sampled_from([2**power + step for power in range(4, 8) for step in (-1, 0, 1)]),
)

BIASES = ("none", "float", "extreme")

shape_classes = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())

FAR = 33_025  # beyond, sums with zero points on both sides may leave int32


def bias_of(kind: str, n: int, seed: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "int32":
        return integers(n, seed=seed, dtype=torch.int32)
    bias = floats(n, seed=seed)
    return bias if kind == "float" else sprinkle(bias, EXTREME + NOT_FINITE, seed, 0.6)


# ---------------------------------------------------------------- packing


@given(
    n=SIZES,
    k=SIZES,
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 10**6),
)
def test_pack_and_unpack(n, k, layout, seed):
    weight = in_layout(integers(n, k, seed=seed), layout)
    for device in DEVICES:
        w = moved(weight, device)
        rows = ATEN.pack_weight(w)
        assert_same_bits(ATEN.unpack_weight(rows, n, k), w.contiguous())
        check_layout(rows.cpu(), weight)


def check_layout(rows: Tensor, weight: Tensor) -> None:
    """csrc/formats/int8_rows.h: weights, zeros around them, sums, zeros behind those."""
    n, k = weight.shape
    n16, k64 = -(-n // 16) * 16, -(-k // 64) * 64
    assert rows.shape == (n16 + -(-4 * n16 // k64), k64)
    assert torch.equal(rows[:n, :k], weight)
    assert not rows[:n, k:].any() and not rows[n:n16].any()
    tail = rows[n16:].flatten()
    assert torch.equal(tail[: 4 * n].view(torch.int32), weight.sum(1, dtype=torch.int32))
    assert not tail[4 * n :].any()


@given(
    n=SIZES,
    k=SIZES,
    dtype=st.sampled_from(FLOATS),
    spice=st.sampled_from(sorted(SPICES)),
    layout=st.sampled_from(LAYOUTS),
    symmetric=st.booleans(),
    bits=st.integers(2, 8),
    scales=st.sampled_from(["own", "one", "each", "odd"]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=200)
def test_quantize_pack(n, k, dtype, spice, layout, symmetric, bits, scales, seed):
    weight = in_layout(sprinkle(floats(n, k, seed=seed), SPICES[spice], seed).to(dtype), layout)
    scale = {
        "own": None,
        "one": positive(1, seed=seed),
        "each": positive(n, seed=seed),
        "odd": sprinkle(positive(n, 1, seed=seed), (NAN, 0.0, -1.0, 1e-44, INF), seed).view(n),
    }[scales]
    qmin, qmax = quant_range(bits, narrow_range=symmetric)
    args = (scale, qmin, qmax, symmetric)
    tiles, *expected = KERNELS.quantize_pack(weight, *args)
    canonical = KERNELS.unpack_weight(tiles, n, k)
    for device in DEVICES:
        on_device = [moved(a, device) if isinstance(a, Tensor) else a for a in args]
        rows, *got = ATEN.quantize_pack(moved(weight, device), *on_device)
        check_layout(rows.cpu(), canonical)
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a.cpu(), b)


def test_the_largest_inputs():
    """Sums of a weight's row at their bounds, and K at its own."""
    weight = torch.full((1, 2**23), -128, dtype=torch.int8)
    check_layout(ATEN.pack_weight(weight), weight)


# ---------------------------------------------------------------- dynamic


@given(
    shape=st.builds(Shape, ROWS, SIZES, SIZES),
    dtype=st.sampled_from(FLOATS),
    output_dtype=st.sampled_from((None, *FLOATS)),
    spice=st.sampled_from(sorted(SPICES)),
    layout=st.sampled_from(LAYOUTS),
    symmetric=st.booleans(),
    bits=st.sampled_from([8, 8, 8, 7, 4, 2]),
    one_scale=st.booleans(),
    zero_points=st.booleans(),
    bias=st.sampled_from(BIASES),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=300)
def test_dynamic(
    shape,
    dtype,
    output_dtype,
    spice,
    layout,
    symmetric,
    bits,
    one_scale,
    zero_points,
    bias,
    activation,
    seed,
):
    m, n, k = shape
    x = in_layout(sprinkle(floats(m, k, seed=seed), SPICES[spice], seed).to(dtype), layout)
    channels = 1 if one_scale else n
    check_same(
        "linear_dynamic",
        x,
        packed(integers(n, k, seed=seed + 1)),
        positive(channels, seed=seed + 2),
        zeros_of(channels, seed + 3) if zero_points else None,
        bias_of(bias, n, seed + 4),
        n,
        symmetric,
        activation,
        output_dtype,
        bits,
    )


@shape_classes
def test_dynamic_shape_classes(shapes):
    for i, (m, n, k) in enumerate(shapes):
        check_same(
            "linear_dynamic",
            floats(m, k, seed=i, dtype=FLOATS[i % 3]),
            packed(integers(n, k, seed=i + 1)),
            positive(n, seed=i + 2),
            zeros_of(n, i + 3) if i % 2 else None,
            floats(n, seed=i + 4) if i % 3 else None,
            n,
            i % 5 > 0,
            ACTIVATIONS[i % len(ACTIVATIONS)],
        )


@pytest.mark.parametrize(
    "shape", [(70,), (1, 70), (2, 3, 70), (2, 1, 0, 70), (3, 2, 2, 70)], ids=str
)
def test_leading_dimensions(shape):
    side = (packed(integers(20, 70, seed=1)), positive(20, seed=2), zeros_of(20, 3), floats(20))
    (y,) = check_same("linear_dynamic", floats(*shape), *side, 20, False)
    assert y.shape == (*shape[:-1], 20)
    for dtype in (torch.int8, torch.uint8):
        q = integers(*shape, dtype=dtype)
        check_same("int8_mm", q, side[0], 20)
        for sizes in ([1], [], [*shape[:-1], 1], shape[:-1]):
            scale, zero = positive(*sizes), integers(*sizes, dtype=dtype).to(torch.int32)
            check_same("linear_static", q, scale, zero, *side, 20)


@given(
    m=ROWS,
    k=SIZES,
    features=st.lists(SIZES, min_size=1, max_size=4),
    dtype=st.sampled_from(FLOATS),
    output_dtype=st.sampled_from((None, *FLOATS)),
    symmetric=st.booleans(),
    zero_points=st.booleans(),
    bias=st.booleans(),
    activated=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_split(m, k, features, dtype, output_dtype, symmetric, zero_points, bias, activated, seed):
    total = sum(features)
    names = [ACTIVATIONS[(seed + i) % len(ACTIVATIONS)] for i in range(len(features))]
    outputs = check_same(
        "linear_dynamic_split",
        sprinkle(floats(m, k, seed=seed), SPICES["not_finite"], seed, 0.05).to(dtype),
        packed(*(integers(n, k, seed=seed + i) for i, n in enumerate(features))),
        positive(total, seed=seed),
        zeros_of(total, seed) if zero_points else None,
        floats(total, seed=seed) if bias else None,
        features,
        symmetric,
        names if activated else [],
        output_dtype,
    )
    assert [y.shape for y in outputs] == [(m, n) for n in features]


# ---------------------------------------------------------------- static


@given(
    shape=st.builds(Shape, ROWS, SIZES, SIZES),
    dtype=st.sampled_from((*FLOATS, torch.int8, torch.uint8)),
    spice=st.sampled_from(sorted(SPICES)),
    layout=st.sampled_from(LAYOUTS),
    per_row=st.booleans(),
    input_zero=st.booleans(),
    input_bits=st.integers(2, 8),
    one_scale=st.booleans(),
    zero_points=st.booleans(),
    bias=st.sampled_from((*BIASES, "int32")),
    activation=st.sampled_from(ACTIVATIONS),
    output=st.sampled_from((*FLOATS, torch.int8, torch.uint8)),
    output_bits=st.integers(2, 8),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=400)
def test_static(
    shape,
    dtype,
    spice,
    layout,
    per_row,
    input_zero,
    input_bits,
    one_scale,
    zero_points,
    bias,
    activation,
    output,
    output_bits,
    seed,
):
    m, n, k = shape
    options: dict[str, Any] = {"output_dtype": output}
    if dtype.is_floating_point:
        x = sprinkle(floats(m, k, seed=seed), SPICES[spice], seed).to(dtype)
        scale = positive(1, seed=seed + 5)
        low, high = quant_range(input_bits)
        zero = torch.randint(low, high + 1, (1,), generator=generator(seed)).to(torch.int32)
        options |= {"input_qmin": low, "input_qmax": high}
    else:
        x = integers(m, k, seed=seed, dtype=dtype)
        rows = m if per_row else 1
        scale = positive(rows, 1, seed=seed + 5) if per_row else positive(1, seed=seed + 5)
        scale = sprinkle(scale, (NAN, FLT_MAX, 2.0**-126), seed, 0.1) if per_row else scale
        zero = zeros_of(rows, seed + 6, dtype)
    if not output.is_floating_point:
        low, high = quant_range(output_bits, signed=output == torch.int8)
        options |= {"output_qmin": low, "output_qmax": high, "output_scale": torch.tensor([0.7])}
        options["output_zero_point"] = low + seed % (high - low + 1)
    channels = 1 if one_scale else n
    check_same(
        "linear_static",
        in_layout(x, layout),
        scale,
        zero if input_zero else None,
        packed(integers(n, k, seed=seed + 1)),
        positive(channels, seed=seed + 2),
        zeros_of(channels, seed + 3) if zero_points else None,
        bias_of(bias, n, seed + 4),
        n,
        activation,
        **options,
    )


@given(
    shape=st.builds(Shape, ROWS, SIZES, SIZES),
    dtype=st.sampled_from((torch.int8, torch.uint8)),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 10**6),
)
def test_int8_mm(shape, dtype, layout, seed):
    m, n, k = shape
    x = in_layout(integers(m, k, seed=seed, dtype=dtype), layout)
    check_same("int8_mm", x, packed(integers(n, k, seed=seed + 1)), n)


def test_integer_input_as_it_is_or_copied():
    """Rows that CUDA's product reads in place: aligned ones, in memory of any width."""
    weight = packed(integers(20, 128, seed=1))
    memory = integers(80, 256, seed=2)
    views = (
        memory[:64, :128],
        memory[:40, :128],
        memory[:64, 16:144],
        memory[:64, 1:129],
        memory.view(-1)[: 64 * 136].view(64, 136)[:, :128],
        memory[:1, :128].expand(64, 128),
        memory.view(-1)[: 66 * 64].as_strided((64, 128), (64, 1)),
    )
    for x in views:
        check_same("int8_mm", x, weight, 20)
        check_same(
            "linear_static", x, torch.tensor([0.5]), None, weight, positive(20), None, None, 20
        )


# ---------------------------------------------------------------- sums at their bounds


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_the_largest_raw_sums(dtype):
    """K = 65,793, all integers at the ends of their ranges: the sums just fit int32."""
    k, limits = 65_793, torch.iinfo(dtype)
    ends = torch.tensor([limits.min, limits.max], dtype=dtype)
    weight = torch.tensor([-128, 127], dtype=torch.int8).view(2, 1).expand(2, k)
    for rows in (2, 20):
        x = ends.repeat(rows // 2).view(rows, 1).expand(rows, k)
        check_same("int8_mm", x, packed(weight), 2)


def deep_cases() -> list[tuple[int, int, int]]:
    deep = (FAR - 1, FAR, FAR + 1, 65_793, 65_794, 131_008, 131_009, 131_072, 262_016, 300_001)
    return [(1 + i % 3 * 9, 1 + i % 4 * 5, k) for i, k in enumerate(deep)]


@pytest.mark.parametrize(("m", "n", "k"), deep_cases())
def test_deep(m, n, k):
    """Around the bounds of int32, with zero points at the ends: the sums are the largest there."""
    weight = integers(n, k, seed=k)
    weight[0] = -128
    side = (packed(weight), positive(n, seed=1), torch.full((n,), 127, dtype=torch.int32))
    bias = floats(n, seed=2)
    for low, high, dtype in ((-128, 127, torch.int8), (0, 255, torch.uint8)):
        x = integers(m, k, seed=k + 1, dtype=dtype)
        x[0], x[-1] = high, low
        for zero in (None, low, high):
            point = None if zero is None else torch.tensor([zero], dtype=torch.int32)
            check_same("linear_static", x, torch.tensor([0.5]), point, *side, bias, n)
    q = torch.full((m, k), 127, dtype=torch.int8)
    int_bias = torch.full((n,), 2**31 - 1, dtype=torch.int32)
    lowest = torch.tensor([-128], dtype=torch.int32)
    check_same("linear_static", q, torch.tensor([1.0]), lowest, *side, int_bias, n)
    check_same("linear_dynamic", floats(m, k, dtype=torch.bfloat16), *side, bias, n, False, "gelu")


@pytest.mark.parametrize(
    ("m", "n", "bias"),
    [
        (2050, 4100, "float"),  # the epilogue in parts of columns
        (4500, 1900, "none"),  # and of rows
        (9, 950_000, "float"),  # few and long rows
        (2050, 8200, "int32"),  # two products in int64
        (65, 700_000, "none"),  # and in int32, the last of one row
    ],
)
def test_more_outputs_than_a_block(m, n, bias):
    check_same(
        "linear_static",
        integers(m, 3),
        positive(m, 1),
        zeros_of(m, 3).view(m, 1),
        packed(integers(n, 3, seed=1)),
        positive(n, seed=2),
        zeros_of(n, 4),
        bias_of(bias, n, 5),
        n,
        output_dtype=torch.bfloat16,
    )
    check_same("int8_mm", integers(m, 3, dtype=torch.uint8), packed(integers(n, 3, seed=1)), n)
