"""functional.linear_intx against rational numbers: every rounding where it is written."""

from fractions import Fraction

import pytest
import torch
from support import FLOATS, INF, NAN, assert_same_bits, floats, positive
from support.intx_cases import few_bits
from torch import Tensor

from torchquant.functional import ACTIVATIONS, linear_intx

INPUTS, OUTPUTS = 11, 3


def fp32(value: Fraction) -> Fraction:
    """The nearest number of 24 bits, ties to even; the tests stay clear of the smallest ones."""
    if value == 0:
        return value
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    if Fraction(2) ** exponent > abs(value):
        exponent -= 1
    step = Fraction(2) ** (exponent - 23)
    return round(value / step) * step


def by_hand(
    x: Tensor, w: Tensor, sw: Tensor, zw: Tensor | None, bias: Tensor | None, size: int
) -> Tensor:
    """The module's docstring, one output at a time."""
    result = []
    for row in x.tolist():
        for n, column in enumerate(w.tolist()):
            t = Fraction(0)
            for g in range(sw.shape[1]):
                zero = 0 if zw is None else int(zw[n, g])
                s = Fraction(0)
                for k in range(g * size, min((g + 1) * size, len(row))):
                    s = fp32(Fraction(row[k]) * (column[k] - zero) + s)
                t = fp32(s * Fraction(float(sw[n, g])) + t)
            result.append(float(t if bias is None else fp32(t + Fraction(float(bias[n])))))
    return torch.tensor(result).reshape(len(x), len(w))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [1, 4, 5, INPUTS])
@pytest.mark.parametrize("everything", [False, True])
def test_by_hand(bits, size, everything):
    x = floats(4, INPUTS, seed=bits)
    w, groups = few_bits(OUTPUTS, INPUTS, bits=bits, seed=size), -(-INPUTS // size)
    sw = positive(OUTPUTS, groups, seed=3)
    zw = few_bits(OUTPUTS, groups, bits=bits, seed=4) if everything else None
    bias = floats(OUTPUTS, seed=5) if everything else None
    got = linear_intx(x, w, sw, zw, bias, bits=bits, group_size=size)
    assert_same_bits(got, by_hand(x, w, sw, zw, bias, size))
    if groups == 1:  # one scale per channel is one group
        zero = None if zw is None else zw[:, 0]
        assert_same_bits(linear_intx(x, w, sw[:, 0], zero, bias, bits=bits), got)


def test_the_order_of_a_group_shows():
    """2^24 + 1 + 1 rounds to 2^24 twice in this order, and is 2^24 + 2 in the other."""
    w, scale = torch.ones(1, 3, dtype=torch.int8), torch.ones(1)
    large = 2.0**24
    assert linear_intx(torch.tensor([large, 1.0, 1.0]), w, scale, bits=2).item() == large
    assert linear_intx(torch.tensor([1.0, 1.0, large]), w, scale, bits=2).item() == large + 2
    two = torch.ones(1, 2)  # and so does that of the groups
    first = linear_intx(torch.tensor([1.0, 1.0, large]), w, two, bits=2, group_size=2)
    assert first.item() == large + 2
    other = linear_intx(torch.tensor([large, 1.0, 1.0]), w, two, bits=2, group_size=2)
    assert other.item() == large


def test_a_product_is_not_rounded():
    x = torch.tensor([1.0 + 2.0**-23, -3.0])  # 3 (1 + 2^-23) needs 25 bits
    w, scale = torch.tensor([[3, 1]], dtype=torch.int8), torch.ones(1)
    assert linear_intx(x.flip(0), w.flip(1), scale, bits=4).item() == 3 * 2.0**-23


def test_half_precision_is_widened_and_rounded_once():
    w, sw = few_bits(OUTPUTS, INPUTS, bits=4), positive(OUTPUTS, seed=3)
    for dtype in FLOATS:
        x = floats(4, INPUTS).to(dtype)
        for output in (None, *FLOATS):
            got = linear_intx(x, w, sw, bits=4, output_dtype=output)
            wide = linear_intx(x.float(), w, sw, bits=4)
            assert_same_bits(got, wide.to(dtype if output is None else output))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_activation_comes_before_the_last_rounding(activation):
    x, w, sw = floats(4, INPUTS), few_bits(OUTPUTS, INPUTS, bits=4), positive(OUTPUTS, seed=3)
    bias = floats(OUTPUTS, seed=5)
    got = linear_intx(
        x, w, sw, None, bias, bits=4, activation=activation, output_dtype=torch.bfloat16
    )
    pre = linear_intx(x, w, sw, None, bias, bits=4)
    assert_same_bits(got, ACTIVATIONS[activation](pre).bfloat16())


def test_values_that_are_not_finite_follow_ieee():
    w, scale = torch.tensor([[1, 1], [0, 1], [-1, 1]], dtype=torch.int8), torch.ones(3)
    x = torch.tensor([[INF, 1.0], [NAN, 1.0], [2.0, 1.0]])
    got = linear_intx(x, w, scale, bits=2)
    assert_same_bits(got, torch.tensor([[INF, NAN, -INF], [NAN, NAN, NAN], [3.0, 1.0, -1.0]]))
