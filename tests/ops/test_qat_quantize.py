"""quantize_rows and quantize_pack: the integers that a layer in training computes with."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    DENORMAL,
    FLOATS,
    FLT_MAX,
    INF,
    LAYOUTS,
    NAN,
    NOT_FINITE,
    SHAPES,
    assert_same_bits,
    check_everywhere,
    floats,
    in_layout,
    positive,
    sprinkle,
)
from support.qat_linear import (
    BITS,
    SIZES,
    packed_channels,
    ranges,
)

from torchquant import functional, ops, quant_range


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_rows_with_their_own_range(bits: int, dtype: torch.dtype) -> None:
    for rows, _, inputs in SIZES:
        x = sprinkle(floats(rows, inputs, seed=bits, dtype=dtype), NOT_FINITE, seed=1)
        for (qmin, qmax), symmetric in itertools.product(ranges(bits), (True, False)):
            options: dict[str, Any] = {"qmin": qmin, "qmax": qmax, "symmetric": symmetric}
            check_everywhere(
                lambda x=x, o=options: ops.quantize_rows(x, **o),
                tuple(functional.quantize_rows(x, **options)),
                what=(x.shape, options),
            )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_rows_with_one_scale(bits: int, dtype: torch.dtype) -> None:
    for rows, _, inputs in SIZES:
        x = sprinkle(floats(rows, inputs, seed=bits, dtype=dtype), NOT_FINITE, seed=2)
        for qmin, qmax in ranges(bits):
            for scale, zero in ((0.02, None), (0.5, qmin), (3.0, qmax), (1e-44, 0)):
                point = None if zero is None else torch.tensor([zero], dtype=torch.int32)
                arguments = (x, torch.tensor([scale]), point)
                check_everywhere(
                    lambda a=arguments, low=qmin, high=qmax: ops.quantize_rows(
                        *a, qmin=low, qmax=high
                    ),
                    tuple(functional.quantize_rows(*arguments, qmin=qmin, qmax=qmax)),
                    what=(x.shape, qmin, qmax, scale, zero),
                )


def test_eight_bits_are_quantize_per_token() -> None:
    x = sprinkle(floats(20, 100), NOT_FINITE, seed=0)
    for symmetric in (True, False):
        qmin = -127 if symmetric else -128
        own = ops.quantize_rows(x, qmin=qmin, symmetric=symmetric)
        for got, want in zip(own, ops.quantize_per_token(x, symmetric=symmetric), strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_in_any_layout(layout: str) -> None:
    x = floats(6, 70)
    for got, want in zip(
        ops.quantize_rows(in_layout(x, layout)), ops.quantize_rows(x), strict=True
    ):
        assert_same_bits(got, want)


def test_rows_without_elements() -> None:
    for shape in ((0, 8), (3, 0), (2, 0, 5)):
        q, scale, zero = ops.quantize_rows(torch.empty(shape))
        assert q.shape == shape
        assert scale.shape == zero.shape == (*shape[:-1], 1)
    assert torch.equal(ops.quantize_rows(torch.empty(3, 0))[1], torch.ones(3, 1))


@pytest.mark.parametrize(
    "call",
    [
        ops.quantize_rows,
        ops.quantize_pack,
        functional.quantize_rows,
        functional.quantize_pack,
        lambda x, **o: torch.ops.torchquant_aten.quantize_rows(x, None, None, *o.values()),
        lambda x, **o: torch.ops.torchquant_aten.quantize_pack(x, None, *o.values()),
    ],
)
def test_a_symmetric_range_of_its_own_reaches_below_zero(call: Callable[..., Any]) -> None:
    x = torch.tensor([[-1.0, 1.0]])
    for qmin, qmax in ((0, 127), (-126, 127), (-1, 7)):
        with pytest.raises(ValueError, match=f"qmin must be at most -qmax = -{qmax} .* got {qmin}"):
            call(x, qmin=qmin, qmax=qmax, symmetric=True)
        call(x, qmin=qmin, qmax=qmax, symmetric=False)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_weights_with_their_own_range(bits: int, dtype: torch.dtype) -> None:
    for _, outputs, inputs in SIZES:
        w = sprinkle(floats(outputs, inputs, seed=bits, dtype=dtype), NOT_FINITE, seed=3)
        for (qmin, qmax), symmetric in itertools.product(ranges(bits), (True, False)):
            options: dict[str, Any] = {"qmin": qmin, "qmax": qmax, "symmetric": symmetric}
            check_everywhere(
                lambda w=w, o=options: ops.quantize_pack(w, **o),
                packed_channels(functional.quantize_pack(w, **options)),
                counts=(1, 2),
                what=(w.shape, options),
            )


@pytest.mark.parametrize("bits", BITS)
def test_weights_with_given_scales(bits: int) -> None:
    for _, outputs, inputs in SIZES:
        w = sprinkle(floats(outputs, inputs, seed=bits), NOT_FINITE, seed=4, share=0.1)
        scale = positive(outputs, seed=bits)
        scale[0] = 1e-44
        for qmin, qmax in ranges(bits):
            for given_scale in (scale, scale[-1:]):
                check_everywhere(
                    lambda w=w, s=given_scale, low=qmin, high=qmax: ops.quantize_pack(
                        w, s, qmin=low, qmax=high
                    ),
                    packed_channels(functional.quantize_pack(w, given_scale, qmin=qmin, qmax=qmax)),
                    what=(w.shape, qmin, qmax),
                )


@pytest.mark.parametrize("kind", SHAPES)
def test_weights_of_every_shape(kind: str) -> None:
    for _, outputs, inputs in SHAPES[kind]:
        w = floats(outputs, inputs, seed=outputs)
        want = packed_channels(functional.quantize_pack(w, qmin=-128, symmetric=False))
        check_everywhere(
            lambda w=w: ops.quantize_pack(w, qmin=-128, symmetric=False), want, what=w.shape
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_any_layout(layout: str) -> None:
    w = floats(20, 70)
    for got, want in zip(
        ops.quantize_pack(in_layout(w, layout)), ops.quantize_pack(w), strict=True
    ):
        assert_same_bits(got, want)


def test_weights_of_any_magnitude() -> None:
    rows = [[0.0, 0.0], [-0.0, 0.0], [DENORMAL, 0.0], [FLT_MAX, -FLT_MAX], [FLT_MAX, 1.0]]
    rows += [[1.0, 1.0], [-1.0, -2.0], [2.0**-126, -(2.0**-140)], [NAN, 1.0], [1.0, -INF]]
    w = torch.tensor(rows)
    for bits, symmetric in itertools.product(BITS, (True, False)):
        qmin, qmax = quant_range(bits)
        want = functional.quantize_pack(w, qmin=qmin, qmax=qmax, symmetric=symmetric)
        check_everywhere(
            lambda low=qmin, high=qmax, s=symmetric: ops.quantize_pack(
                w, qmin=low, qmax=high, symmetric=s
            ),
            packed_channels(want),
        )
