"""Choosing scale and zero point."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.affine import INF, LARGEST, NAN, finite, same_bits, spread

from torchquant.functional import (
    choose_qparams,
    fake_quantize,
    qparams_from_range,
    quantize,
)
from torchquant.scheme import PerAxis


def test_symmetric_scale_is_one_division():
    x = spread(1000)
    for bits in range(2, 9):
        scale, zero_point = choose_qparams(x, bits=bits)
        assert zero_point is None
        assert same_bits(scale, x.abs().max().reshape(1) / torch.tensor(2.0 ** (bits - 1) - 1))
    assert choose_qparams(x, signed=False)[0] == x.abs().max() / torch.tensor(255.0)


def test_narrow_range_is_the_default_for_8_bits_symmetric_only():
    x = torch.tensor([-1.0, 3.0])
    for bits in range(2, 9):
        steps = 2.0**bits - 1
        scale, _ = choose_qparams(x, bits=bits, symmetric=False)
        assert scale == torch.tensor(4.0) / torch.tensor(steps)
    narrow, zero_point = choose_qparams(x, symmetric=False, narrow_range=True)
    assert narrow == torch.tensor(4.0) / torch.tensor(254.0)
    assert zero_point == -127 + 64 - 1 + 0  # rint(-127 + 63.5) = rint(-63.5) = -64


@settings(deadline=None)
@given(finite, finite, st.sampled_from([(-128, 127), (-127, 127), (0, 255), (-2, 1), (0, 15)]))
def test_asymmetric_range_holds_zero_and_both_ends(a, b, integers):
    qmin, qmax = integers
    least, greatest = min(a, b, 0.0), max(a, b, 0.0)
    low, high = torch.tensor([min(a, b)]), torch.tensor([max(a, b)])
    scale, zero_point = qparams_from_range(low, high, qmin=qmin, qmax=qmax, symmetric=False)
    assert scale.isfinite().all()
    assert scale >= 2.0**-126
    assert qmin <= zero_point.item() <= qmax
    assert quantize(torch.zeros(1), scale, zero_point, qmin=qmin, qmax=qmax) == zero_point
    # Real 0 maps to an integer exactly; the ends are within one step of theirs.
    step = float(scale) * (1 + 1e-5)
    assert float(zero_point - qmin) * float(scale) >= -least - step
    assert float(qmax - zero_point) * float(scale) >= greatest - step


# Within half a step of the largest fp32 number, 127 * scale may round to infinity.
@settings(deadline=None)
@given(*[st.floats(-(2.0**126), 2.0**126, width=32)] * 2)
def test_symmetric_never_saturates(a, b):
    x = torch.tensor([a, b])
    scale, _ = choose_qparams(x)
    assert scale.isfinite().all()
    error = (fake_quantize(x, scale, qmin=-127).double() - x.double()).abs()
    assert (error <= 0.5001 * float(scale)).all()


def test_tiny_ranges_keep_a_normal_scale():
    for symmetric in (True, False):
        scale, zero_point = qparams_from_range(
            -1e-45, 1e-45, qmin=-128, qmax=127, symmetric=symmetric
        )
        assert scale == 2.0**-126
        assert (1 / scale).isfinite()
        assert zero_point == 0 if symmetric else zero_point == -128


def test_a_range_of_zero_gives_scale_1():
    for symmetric in (True, False):
        scale, zero_point = qparams_from_range(0.0, 0.0, qmin=-128, qmax=127, symmetric=symmetric)
        assert (scale, zero_point) == (1, 0)
    kept = qparams_from_range(5.0, 5.0, qmin=3, qmax=7, symmetric=False, preserve_range=True)
    assert kept == (1, 3)  # 3 is the nearest to 0 that is allowed
    scale, zero_point = choose_qparams(torch.full((4,), 2.5), real_zero_point="midpoint")
    assert (scale, zero_point) == (1, 2.5)


def test_a_range_that_overflows_is_halved():
    scale, zero_point = qparams_from_range(-LARGEST, LARGEST, qmin=-128, qmax=127, symmetric=False)
    assert scale == torch.tensor(LARGEST) / torch.tensor(255.0) * 2
    assert zero_point == 0
    scale, _ = qparams_from_range(-LARGEST, LARGEST, qmin=-2, qmax=1, symmetric=False)
    assert scale.isfinite().all()
    scale, middle = choose_qparams(torch.tensor([LARGEST / 2, LARGEST]), real_zero_point="midpoint")
    assert middle == LARGEST * 0.75
    assert scale.isfinite().all()


@pytest.mark.parametrize("bad", [[NAN, 1.0], [INF, 1.0], [-INF, 1.0], [-INF, INF], [INF, INF]])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": False},
        {"symmetric": False, "preserve_range": True},
        {"real_zero_point": "midpoint"},
        {"real_zero_point": "minimum"},
    ],
    ids=["symmetric", "asymmetric", "preserved", "midpoint", "minimum"],
)
def test_a_range_that_is_not_finite_gives_scale_nan(bad, options):
    x = torch.tensor([bad, [1.0, 2.0]])
    scale, zero_point = choose_qparams(x, granularity=PerAxis(0), **options)
    assert scale.isnan().tolist() == [True, False]
    if zero_point is not None and zero_point.dtype == torch.int32:
        assert zero_point[0] == 0
    q = quantize(x, scale, zero_point, granularity=PerAxis(0))
    assert q[0].tolist() == [0, 0]


def test_preserved_range_maps_its_ends_to_the_ends():
    scale, zero_point = choose_qparams(
        torch.tensor([-0.25, 0.1, 0.75]), bits=2, symmetric=False, preserve_range=True
    )
    assert scale == torch.tensor(1.0) / torch.tensor(3.0)
    assert zero_point == -1
    scale, zero_point = qparams_from_range(
        2.0, 3.0, qmin=-128, qmax=127, symmetric=False, preserve_range=True
    )
    assert zero_point == -128  # clamped: 0 lies outside
    assert scale == torch.tensor(1.0) / torch.tensor(255.0)
