"""fmaf in plain torch against exact rational arithmetic."""

import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torchquant.functional import fmaf
from torchquant.functional._arithmetic import divide, reciprocal

LARGEST = float(torch.finfo(torch.float32).max)
DENORMAL = 2.0**-149
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def round_to_fp32(value: Fraction) -> float:
    """The nearest fp32 number, ties to even, overflow to infinity."""
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    step = Fraction(2) ** max(exponent - 23, -149)
    rounded = round(magnitude / step) * step  # round() of a Fraction goes to even
    result = math.inf if rounded >= Fraction(2) ** 128 else float(rounded)
    return math.copysign(result, value)


def exact(a: float, b: float, c: float) -> float:
    return round_to_fp32(Fraction(a) * Fraction(b) + Fraction(c))


def check(triples: list[tuple[float, float, float]]) -> None:
    a, b, c = (torch.tensor(column, dtype=torch.float32) for column in zip(*triples, strict=True))
    assert torch.equal(fmaf(a, b, c), torch.tensor([exact(*t) for t in triples]))


def near_halfway_triples() -> list[tuple[float, float, float]]:
    """a*b is half a unit of c's last place, exactly or off by one part in 2^46."""
    triples = []
    for mantissa in (2**23, 2**23 + 1, 2**24 - 2, 2**24 - 1):
        for exponent in (-149, -140, -60, 0, 77, 104):
            c = float(mantissa) * 2.0**exponent
            half = 2.0 ** ((exponent - 1) // 2), 2.0 ** (exponent - 1 - (exponent - 1) // 2)
            for wobble in ((1.0, 1.0), (1 + 2.0**-23, 1 - 2.0**-23), (1 + 2.0**-23, 1.0)):
                for sign in (1.0, -1.0):
                    triples.append((sign * half[0] * wobble[0], half[1] * wobble[1], c))
                    triples.append((sign * half[0] * wobble[0], half[1] * wobble[1], -c))
    return [t for t in triples if all(math.isfinite(v) and is_fp32(v) for v in t)]


def is_fp32(value: float) -> bool:
    return float(torch.tensor(value, dtype=torch.float32)) == value


def test_near_halfway_cases_round_once():
    triples = near_halfway_triples()
    assert len(triples) > 200
    check(triples)
    # The cases are hard enough: float64 arithmetic rounded to fp32 gets many of them wrong.
    naive = torch.tensor([a * b + c for a, b, c in triples], dtype=torch.float64).float()
    right = torch.tensor([exact(*t) for t in triples])
    assert (naive != right).sum() > 20


def test_random_bit_patterns():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (3, 4000), generator=generator)
    values = bits.to(torch.int32).view(torch.float32)
    values = torch.where(values.isfinite(), values, 1.0)
    check([tuple(row) for row in values.t().tolist()])


def test_cancellation():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4000, generator=generator)
    c = -(a * b) * (1 + torch.randint(-2, 3, (4000,), generator=generator) * 2.0**-23)
    check(list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True)))


@settings(deadline=None)
@given(finite, finite, finite)
@example(DENORMAL, 0.5, 0.0)
@example(DENORMAL, 0.5, DENORMAL)
@example(DENORMAL, -0.5, DENORMAL)
@example(DENORMAL, DENORMAL, DENORMAL)
@example(2.0**-75, 2.0**-75, 0.0)
@example(3 * 2.0**-76, 2.0**-75, 0.0)
@example(LARGEST, 1.0, 2.0**103)
@example(LARGEST, 1.0, 2.0**102)
@example(LARGEST, LARGEST, -LARGEST)
@example(LARGEST, -2.0, LARGEST)
def test_any_numbers(a, b, c):
    check([(a, b, c)])


@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        (math.inf, 1.0, 1.0, math.inf),
        (math.inf, -1.0, 1.0, -math.inf),
        (1.0, 1.0, -math.inf, -math.inf),
        (LARGEST, LARGEST, -math.inf, -math.inf),
        (0.0, -1.0, 0.0, 0.0),
        (0.0, -1.0, -0.0, -0.0),
        (1.0, 1.0, -1.0, 0.0),
    ],
)
def test_infinities_and_zeros(a, b, c, expected):
    result = fmaf(torch.tensor(a), b, c)
    assert torch.equal(result, torch.tensor(expected))
    assert result.signbit().item() == (math.copysign(1.0, expected) < 0)


@pytest.mark.parametrize(
    "triple",
    [
        (math.inf, 0.0, 1.0),
        (math.inf, 1.0, -math.inf),
        (math.nan, 0.0, 0.0),
        (0.0, 0.0, math.nan),
    ],
)
def test_invalid_gives_nan(triple):
    assert fmaf(torch.tensor(triple[0]), triple[1], triple[2]).isnan()


def test_broadcasting_strides_and_empty():
    a, b = torch.randn(3, 1), torch.randn(4, 5).t()[:, :1].t()
    assert fmaf(a, b, 1.0).shape == (3, 5)
    assert fmaf(a.expand(3, 5), b, 1.0).equal(fmaf(a, b, torch.ones(3, 5)))
    assert fmaf(torch.empty(0, 3), 1.0, 2.0).shape == (0, 3)


def test_other_dtypes_raise():
    message = "fmaf: b must be float32, got float64 [2]; convert it with .to()"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        fmaf(torch.zeros(2), torch.zeros(2, dtype=torch.float64), 0.0)


@settings(deadline=None)
@given(finite.filter(lambda v: abs(v) >= 2.0**-126))
def test_divisions_round_once(value):
    x = torch.tensor(value)
    assert reciprocal(x).item() == round_to_fp32(1 / Fraction(value))
    assert divide(x, 255.0).item() == round_to_fp32(Fraction(value) / 255)
