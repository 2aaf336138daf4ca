"""quantize, dequantize and quantize_per_token give the bits of their specification."""

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
    in_layout,
    integers,
    sprinkle,
)
from support.linear_layers import (
    FLOAT_DTYPES,
    SIZES,
    SPICES,
)
from torch import Tensor

from torchquant import PackedWeight, functional, ops, quantized_linear
from torchquant.scheme import PerAxis, PerGroup, PerTensor, PerToken, quant_range

GRANULARITIES = ("tensor", "axis", "group", "token")


def granularity_of(name: str, dims: int, axis: int, size: int):
    if name == "axis":
        return PerAxis(axis % (2 * dims) - dims)
    return {"tensor": PerTensor(), "group": PerGroup(size), "token": PerToken()}[name]


def parameters(
    granularity, shape: tuple[int, ...], kind: str, seed: int, limits: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    sizes = granularity.scale_shape(shape)
    g = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-8, 3, sizes, generator=g).float())
    scale = scale * (1 + torch.rand(sizes, generator=g))
    if kind == "none":
        return scale, None
    if kind == "real":
        return scale, torch.randn(sizes, generator=g) * 3
    return scale, torch.randint(limits[0], limits[1] + 1, sizes, generator=g).to(torch.int32)


@settings(max_examples=120)
@given(
    shape=st.lists(st.one_of(st.integers(0, 5), st.integers(15, 34)), min_size=1, max_size=3),
    name=st.sampled_from(GRANULARITIES),
    axis=st.integers(0, 5),
    group=st.integers(1, 40),
    dtype=FLOAT_DTYPES,
    bits=st.integers(2, 8),
    signed=st.booleans(),
    kind=st.sampled_from(["none", "integer", "real"]),
    layout=st.sampled_from(LAYOUTS),
    spice=st.sampled_from(list(SPICES)),
    seed=st.integers(0, 10**6),
)
def test_quantize_and_dequantize_are_their_specification(
    shape, name, axis, group, dtype, bits, signed, kind, layout, spice, seed
):
    granularity = granularity_of(name, len(shape), axis, group)
    qmin, qmax = quant_range(bits, signed=signed)
    scale, zero_point = parameters(granularity, tuple(shape), kind, seed, (qmin, qmax))
    x = sprinkle(floats(*shape, seed=seed), SPICES[spice], seed).to(dtype)
    x = in_layout(x, layout) if x.numel() else x
    integer = torch.int8 if signed else torch.uint8
    options = {"granularity": granularity, "qmin": qmin, "qmax": qmax, "dtype": integer}
    expected = functional.quantize(x, scale, zero_point, **options)
    check_everywhere(lambda: ops.quantize(x, scale, zero_point, **options), expected)

    q = integers(*shape, seed=seed, dtype=integer)
    q = in_layout(q, layout) if q.numel() else q
    options = {"granularity": granularity, "dtype": dtype}
    expected = functional.dequantize(q, scale, zero_point, **options)
    check_everywhere(lambda: ops.dequantize(q, scale, zero_point, **options), expected)


@pytest.mark.parametrize("size", [40_000, 65_537])
@pytest.mark.parametrize("name", GRANULARITIES)
def test_large_tensors_and_threads(name, size):
    """Large enough that threads share them: one long span, long rows, many rows, odd lengths."""
    for shape in ((size,), (3, size // 3), (size // 7, 7), (size // 100, 10, 10), (1, size)):
        for axis in range(len(shape) if name == "axis" else 1):
            granularity = granularity_of(name, len(shape), axis, 128)
            scale, zero_point = parameters(granularity, shape, "integer", 1, (-128, 127))
            x = floats(*shape)
            options = {"granularity": granularity}
            q = functional.quantize(x, scale, zero_point, **options)
            check_everywhere(
                lambda: ops.quantize(x, scale, zero_point, **options),  # noqa: B023
                q,
                (1, 2),
            )
            check_everywhere(
                lambda: ops.dequantize(q, scale, zero_point, **options),  # noqa: B023
                functional.dequantize(q, scale, zero_point, **options),
                (1, 2),
            )


@settings(max_examples=60)
@given(
    shape=st.lists(SIZES, min_size=1, max_size=3),
    dtype=FLOAT_DTYPES,
    symmetric=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    spice=st.sampled_from(list(SPICES)),
    seed=st.integers(0, 10**6),
)
def test_quantize_per_token_is_its_specification(shape, dtype, symmetric, layout, spice, seed):
    shape = [min(size, 20) for size in shape[:-1]] + shape[-1:]
    x = sprinkle(floats(*shape, seed=seed), SPICES[spice], seed).to(dtype)
    x = in_layout(x, layout)
    expected = functional.quantize_per_token(x, symmetric=symmetric)
    check_everywhere(lambda: ops.quantize_per_token(x, symmetric=symmetric), expected)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantize_per_token_of_odd_rows(symmetric, dtype):
    """One extreme each: only zeros, denormals, the largest numbers of both signs, infinity."""
    top = float(torch.finfo(dtype).max)
    small = float(torch.finfo(dtype).smallest_normal) / 4
    rows = [
        [0.0, -0.0],
        [-0.0, -0.0],
        [small, 0.0],
        [-small, small],
        [top, -top],
        [top, 0.0],
        [-top, top / 2],
        [INF, 1.0],
        [-INF, 1.0],
        [NAN, 1.0],
        [INF, -INF],
        [-1.0, -3.0],
        [3.0, 1.0],
        [2.0**-126, 1.0],
    ]
    for width in (2, 8, 31, 32, 33, 70):
        x = torch.tensor(rows, dtype=torch.float64).to(dtype)
        x = torch.cat([x, x[:, :1].expand(-1, width - 2)], dim=1)
        expected = functional.quantize_per_token(x, symmetric=symmetric)
        check_everywhere(lambda: ops.quantize_per_token(x, symmetric=symmetric), expected)  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_number(dtype):
    """All 65,536 bit patterns through quantize; all results that an 8-bit number can have back."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for scale, zero in ((0.37, 5), (2.0**-20, -128), (300.0, 0)):
        expected = functional.quantize(x, scale, zero)
        check_everywhere(lambda: ops.quantize(x, scale, zero), expected)  # noqa: B023
    q = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8)
    for exponent in range(-126, 121, 3):
        scale = torch.tensor([1.37 * 2.0**exponent])
        expected = functional.dequantize(q, scale, 3, dtype=dtype)
        check_everywhere(lambda: ops.dequantize(q, scale, 3, dtype=dtype), expected)  # noqa: B023


def test_dequantize_with_a_real_zero_point_rounds_twice():
    """fl(fl(q * s) + z): a fused multiply-add, which compilers like to make of it, differs."""
    q = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8).repeat(8)
    scale, zero = torch.tensor([0.1]), torch.tensor([0.7])
    expected = q.float() * scale + zero
    assert not torch.equal(functional.fmaf(q.float(), scale, zero), expected)
    assert_same_bits(functional.dequantize(q, scale, zero), expected)
    check_everywhere(lambda: ops.dequantize(q, scale, zero), expected)


def test_rounding_to_half_types():
    """Ties, overflow and denormals of the output types, through the epilogue of a linear layer."""
    steps = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8).reshape(-1, 1)
    weight = PackedWeight.pack(torch.ones(40, 1, dtype=torch.int8))
    scales = torch.exp2(torch.arange(-140, 130, 7).float())[:40]
    scales = torch.cat([scales, torch.ones(40 - len(scales))]) * (1 + 2.0**-11)
    for dtype in FLOATS:
        options = {"input_scale": 1.0, "weight_scale": scales, "output_dtype": dtype}
        expected = (steps.float() * scales).to(dtype)
        check_everywhere(lambda: quantized_linear(steps, weight, **options), expected)  # noqa: B023
