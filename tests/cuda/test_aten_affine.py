"""quantize, dequantize, quantize_per_token and quantize_rows in plain ATen: the CPU's bits."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    DENORMAL,
    FLOATS,
    FLT_MAX,
    LAYOUTS,
    NAN,
    NOT_FINITE,
    SPICES,
    floats,
    generator,
    in_layout,
    integers,
    positive,
)
from support.aten import ATEN, KERNELS, check_same
from torch import Tensor

from torchquant.scheme import quant_range

KINDS = ("tensor", "axis", "groups", "tokens")
ZEROS = ("none", "one", "each", "real", "each real")
ODD_SCALES = (2.0**-126, FLT_MAX, NAN, 1.0)
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 17, 64, 65]), max_size=4).filter(
    lambda sizes: torch.Size(sizes).numel() <= 20_000
)


def layout_of(x: Tensor, layout: str) -> Tensor:
    return in_layout(x, layout) if x.dim() > 0 else x


def spiced(shape: list[int], spice: str, seed: int, share: float = 0.3) -> Tensor:
    """Numbers, a share of them from the spice."""
    values = SPICES[spice]
    x, g = floats(*shape, seed=seed), generator(seed)
    if not values:
        return x
    picked = torch.tensor(values)[torch.randint(len(values), shape, generator=g)]
    return torch.where(torch.rand(shape, generator=g) < share, picked, x)


def scale_shape(data: Tensor, kind: str, axis: int, group_size: int) -> tuple[list[int], Any]:
    """Shape of the scales and the operators' arguments for it."""
    if kind == "tensor" or data.dim() == 0:
        return [1], {}
    if kind == "axis":
        return [data.shape[axis % data.dim()]], {
            "axis": axis % data.dim() - data.dim() * (axis % 2)
        }
    last = data.shape[-1]
    if kind == "tokens":
        return [*data.shape[:-1], 1], {"group_size": max(1, last)}
    size = max(1, min(group_size, last))
    return [*data.shape[:-1], -(-last // size)], {"group_size": group_size}


def parameters(shape: list[int], zero: str, seed: int, odd: bool) -> tuple[Tensor, Tensor | None]:
    scale = positive(*shape, seed=seed)
    if odd:
        pick = torch.randint(0, 8, shape, generator=generator(seed))
        for i, value in enumerate(ODD_SCALES):
            scale[pick == i] = value
    if zero == "none":
        return scale, None
    zero_shape = shape if zero.startswith("each") else [1]
    if zero.endswith("real"):
        return scale, torch.randn(zero_shape, generator=generator(seed + 1)) * 100
    far = 2**22 if odd else 300
    values = torch.randint(-far, far + 1, zero_shape, generator=generator(seed + 1))
    return scale, values.to(torch.int32)


options = {
    "kind": st.sampled_from(KINDS),
    "zero": st.sampled_from(ZEROS),
    "axis": st.integers(0, 7),
    "group_size": st.sampled_from([1, 2, 3, 16, 32, 100]),
    "dtype": st.sampled_from(FLOATS),
    "unsigned": st.booleans(),
    "layout": st.sampled_from(LAYOUTS),
    "odd": st.booleans(),
    "seed": st.integers(0, 10**6),
}


@given(
    shape=shapes,
    spice=st.sampled_from(sorted(SPICES)),
    bits=st.integers(2, 8),
    **options,
)
@settings(max_examples=300)
def test_quantize(
    shape, spice, bits, kind, zero, axis, group_size, dtype, unsigned, layout, odd, seed
):
    x = layout_of(spiced(shape, spice, seed).to(dtype), layout)
    sizes, granularity = scale_shape(x, kind, axis, group_size)
    scale, zero_point = parameters(sizes, zero, seed, odd)
    qmin, qmax = quant_range(bits, signed=not unsigned)
    target = torch.uint8 if unsigned else torch.int8
    check_same("quantize", x, scale, zero_point, qmin, qmax, dtype=target, **granularity)


@given(shape=shapes, **options)
@settings(max_examples=200)
def test_dequantize(shape, kind, zero, axis, group_size, dtype, unsigned, layout, odd, seed):
    q = layout_of(
        integers(*shape, seed=seed, dtype=torch.uint8 if unsigned else torch.int8), layout
    )
    sizes, granularity = scale_shape(q, kind, axis, group_size)
    check_same("dequantize", q, *parameters(sizes, zero, seed, odd), dtype=dtype, **granularity)


@given(
    shape=shapes.filter(len),
    spice=st.sampled_from(sorted(SPICES)),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(LAYOUTS),
    symmetric=st.booleans(),
    bits=st.integers(2, 8),
    scale=st.sampled_from([None, 0.02, 3.0, 1e-44, -1.0, 0.0, FLT_MAX, NAN]),
    share=st.sampled_from([0.01, 0.1, 0.5]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=300)
def test_rows(shape, spice, dtype, layout, symmetric, bits, scale, share, seed):
    x = layout_of(spiced(shape, spice, seed, share).to(dtype), layout)
    check_same("quantize_per_token", x, symmetric)
    qmin, qmax = quant_range(bits, narrow_range=symmetric)
    if scale is None:
        check_same("quantize_rows", x, None, None, qmin, qmax, symmetric)
        return
    for zero_point in (None, torch.tensor([qmin], dtype=torch.int32), torch.tensor(qmax).int()):
        check_same("quantize_rows", x, torch.tensor([scale]), zero_point, qmin, qmax, symmetric)


def test_rows_at_the_ends_of_float32():
    """Ranges of zero, denormal, one-sided, so wide that their difference overflows, not finite."""
    ends = (
        0.0,
        -0.0,
        DENORMAL,
        -DENORMAL,
        2.0**-126,
        1e-30,
        -1.0,
        1.0,
        FLT_MAX,
        -FLT_MAX,
        *NOT_FINITE,
    )
    x = torch.cartesian_prod(torch.tensor(ends), torch.tensor(ends))
    for symmetric in (True, False):
        check_same("quantize_per_token", x, symmetric)
        for bits in range(2, 9):
            check_same("quantize_rows", x, None, None, *quant_range(bits), symmetric)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_near_ties(dtype):
    """Half to even, in fp32 and after widening."""
    x = (torch.arange(-600, 601) / 4).to(dtype)
    for zero in (None, 3, -128):
        zero_point = None if zero is None else torch.tensor([zero], dtype=torch.int32)
        for scale in (0.5, 1.0, 0.1):
            check_same("quantize", x, torch.tensor([scale]), zero_point, -128, 127)


def test_more_elements_than_a_block():
    """Cut along the longest dimension, scales with it."""
    x = torch.randn(3, 1500, 2100, generator=generator(0)).bfloat16()
    zero = integers(1500).to(torch.int32)
    for sizes, granularity in (
        ([1], {}),
        ([1500], {"axis": 1}),
        ([2100], {"axis": 2}),
        ([3, 1500, 66], {"group_size": 32}),
    ):
        scale = positive(*sizes)
        zero_point = zero if granularity == {"axis": 1} else None
        (q,) = check_same("quantize", x, scale, zero_point, -128, 127, **granularity)
        check_same("dequantize", q, scale, zero_point, **granularity, dtype=torch.bfloat16)
    check_same("quantize_per_token", x[0], False)
    check_same("quantize_per_token", x.view(-1))


X, Q = floats(6, 70, seed=6), integers(6, 70, seed=7)
ONE, ZERO = torch.tensor([0.02]), torch.tensor([3], dtype=torch.int32)


# ---------------------------------------------------------------- refusals: the CPU's, and devices

META = X.to("meta")
BOTH: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "integer input": ("quantize", (Q, ONE, None, -128, 127), {}),
    "result type": ("quantize", (X, ONE, None, -128, 127), {"dtype": torch.int16}),
    "range": ("quantize", (X, ONE, None, 0, 255), {}),
    "axis and groups": ("quantize", (X, ONE, None, -128, 127), {"axis": 0, "group_size": 2}),
    "scale of an axis": ("quantize", (X, positive(5), None, -128, 127), {"axis": 0}),
    "scale of groups": ("quantize", (X, positive(6, 2), None, -128, 127), {"group_size": 32}),
    "scale's type": ("quantize", (X, ONE.double(), None, -128, 127), {}),
    "zero point's type": ("quantize", (X, ONE, torch.tensor([1]), -128, 127), {}),
    "zero point's shape": ("quantize", (X, ONE, ZERO.expand(6), -128, 127), {}),
    "float input": ("dequantize", (X, ONE, None), {}),
    "float result": ("dequantize", (Q, ONE, None), {"dtype": torch.int8}),
    "tokens: type": ("quantize_per_token", (Q,), {}),
    "tokens: no dimension": ("quantize_per_token", (X[0, 0],), {}),
    "rows: range": ("quantize_rows", (X, None, None, 1, 127, True), {}),
    "rows: zero point alone": ("quantize_rows", (X, None, ZERO, -128, 127, True), {}),
    "rows: scales": ("quantize_rows", (X, positive(6), None, -128, 127, True), {}),
    "rows: scale's type": ("quantize_rows", (X, ONE.half(), None, -128, 127, True), {}),
    "rows: zero points": ("quantize_rows", (X, ONE, ZERO.expand(2), -128, 127, True), {}),
}


@pytest.mark.parametrize(("name", "args", "kwargs"), BOTH.values(), ids=BOTH.keys())
def test_refuses_what_the_kernels_refuse(name, args, kwargs):
    with pytest.raises((TypeError, ValueError)) as expected:
        getattr(KERNELS, name)(*args, **kwargs)
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        getattr(ATEN, name)(*args, **kwargs)


DEVICE_REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "scale": (lambda: ATEN.quantize(META, ONE, None, -128, 127), "quantize: scale"),
    "zero point": (
        lambda: ATEN.quantize(META, ONE.to("meta"), ZERO, -128, 127),
        "quantize: zero_point",
    ),
    "dequantize": (lambda: ATEN.dequantize(Q.to("meta"), ONE, None), "dequantize: scale"),
    "rows": (lambda: ATEN.quantize_rows(META, ONE, None, -128, 127, True), "quantize_rows: scale"),
}


@pytest.mark.parametrize(("call", "argument"), DEVICE_REFUSALS.values(), ids=DEVICE_REFUSALS.keys())
def test_refuses_tensors_elsewhere(call, argument):
    wanted = f"{argument} must be on the input's device meta, got cpu; move it with .to(device)"
    with pytest.raises(ValueError, match=re.escape(wanted)):
        call()


def test_reads_no_values():
    """Tensors without values give shapes: nothing waits for a device."""
    q, scale, zero = ATEN.quantize_per_token(META, False)
    assert (q.shape, scale.shape, zero.shape) == ((6, 70), (6, 1), (6, 1))
    assert ATEN.quantize(META, ONE.to("meta"), ZERO.to("meta"), -128, 127).shape == (6, 70)
    x = ATEN.dequantize(q, scale, zero, group_size=70, dtype=torch.float16)
    assert x.shape == (6, 70) and x.dtype == torch.float16
    rows = ATEN.quantize_rows(META, ONE.to("meta"), ZERO.to("meta"), -128, 127, False)
    assert [t.shape for t in rows] == [(6, 70), (6, 1), (6, 1)]
