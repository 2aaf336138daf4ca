"""torchquant.scheme: integer ranges and granularities."""

import dataclasses
import re

import pytest

from torchquant.scheme import PerAxis, PerGroup, PerTensor, PerToken, quant_range


@pytest.mark.parametrize("bits", range(2, 9))
def test_range_has_all_levels_of_its_bits(bits):
    for signed in (True, False):
        qmin, qmax = quant_range(bits, signed=signed)
        assert qmax - qmin + 1 == 2**bits
        assert (qmin < 0) == signed
    assert quant_range(bits) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize("bits", range(2, 9))
def test_narrow_range_is_symmetric(bits):
    qmin, qmax = quant_range(bits, narrow_range=True)
    assert qmin == -qmax == 1 - 2 ** (bits - 1)


@pytest.mark.parametrize("bits", [1, 9, 0, -8, 8.0, True, None, "8"])
def test_bits_outside_2_to_8_raise(bits):
    message = f"quant_range: bits must be an integer from 2 to 8, got {bits!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        quant_range(bits)


def test_narrow_range_of_an_unsigned_range_raises():
    with pytest.raises(ValueError, match="narrow_range must be False for an unsigned range"):
        quant_range(8, signed=False, narrow_range=True)


@pytest.mark.parametrize(
    ("granularity", "shape", "expected"),
    [
        pytest.param(PerTensor(), (3, 4), (1,), id="per_tensor"),
        pytest.param(PerTensor(), (), (1,), id="per_tensor_0d"),
        pytest.param(PerAxis(0), (3, 4), (3,), id="first_axis"),
        pytest.param(PerAxis(-1), (3, 4, 5), (5,), id="last_axis"),
        pytest.param(PerGroup(4), (3, 8), (3, 2), id="whole_groups"),
        pytest.param(PerGroup(4), (2, 3, 9), (2, 3, 3), id="tail_group"),
        pytest.param(PerGroup(128), (5,), (1,), id="group_longer_than_the_row"),
        pytest.param(PerToken(), (2, 3, 9), (2, 3, 1), id="per_token"),
        pytest.param(PerToken(), (0, 9), (0, 1), id="no_rows"),
    ],
)
def test_scale_shape(granularity, shape, expected):
    assert granularity.scale_shape(shape) == expected


def test_group_size_is_128_by_default():
    assert PerGroup() == PerGroup(128)


@pytest.mark.parametrize(
    ("granularity", "shape", "expected"),
    [
        (PerTensor(), (), (None, None)),
        (PerTensor(), (3, 4), (None, None)),
        (PerAxis(0), (3, 4), (0, None)),
        (PerAxis(-1), (3, 4), (1, None)),
        (PerGroup(32), (3, 80), (None, 32)),
        (PerToken(), (3, 80), (None, 80)),
        (PerToken(), (3, 0), (None, 1)),
    ],
)
def test_operators_take_a_granularity_as_axis_and_group_size(granularity, shape, expected):
    assert granularity.axis_and_group_size(shape) == expected


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(1), PerGroup(32), PerToken()])
def test_granularities_are_values(granularity):
    assert dataclasses.replace(granularity) == granularity
    assert len({granularity, dataclasses.replace(granularity)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        granularity.axis = 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PerAxis(1.0), "PerAxis: axis must be an integer, got 1.0"),
        (lambda: PerGroup(0), "PerGroup: group_size must be a positive integer, got 0"),
        (lambda: PerGroup(True), "PerGroup: group_size must be a positive integer, got True"),
        (
            lambda: PerAxis(2).scale_shape((3, 4)),
            "PerAxis: axis must be from -2 to 1 for an input of shape [3, 4], got 2",
        ),
        (
            lambda: PerToken().scale_shape(()),
            "PerToken: input must have at least 1 dimension, got a 0-dimensional tensor",
        ),
        (
            lambda: PerGroup(4).scale_shape(()),
            "PerGroup: input must have at least 1 dimension, got a 0-dimensional tensor",
        ),
    ],
)
def test_wrong_granularities_raise(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
