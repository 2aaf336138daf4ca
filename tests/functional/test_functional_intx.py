"""torchquant.functional.intx: weights of 2 to 8 bits in plain torch, against Python's integers."""

import math
import re
from fractions import Fraction

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FLOATS, INF, NAN, assert_same_bits, floats, integers, positive
from support.intx_cases import few_bits
from support.intx_layers import BITS
from torch import Tensor

from torchquant.functional import (
    ACTIVATIONS,
    linear_dynamic,
    linear_dynamic_intx,
    linear_static,
    linear_static_intx,
    pack_integers,
    quantize,
    quantize_per_token,
    unpack_integers,
)

# ---------------------------------------------------------------- integers without gaps


def packed_by_numpy(rows: Tensor, bits: int) -> Tensor:
    """Strings of bits, made by numpy's packbits instead of our code."""
    unsigned = rows.numpy().astype(numpy.int64) % 2**bits
    places = (unsigned[..., None] >> numpy.arange(bits)) & 1
    string = places.reshape(*rows.shape[:-1], rows.shape[-1] * bits).astype(numpy.uint8)
    return torch.from_numpy(numpy.packbits(string, axis=-1, bitorder="little"))


@settings(max_examples=60)
@given(
    st.sampled_from(BITS),
    st.lists(st.integers(0, 6), max_size=2),
    st.integers(0, 70),
    st.integers(0, 10**6),
)
def test_pack_integers_is_numpys_packbits(bits, leading, length, seed):
    rows = few_bits(*leading, length, bits=bits, seed=seed)
    packed = pack_integers(rows, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*leading, -(-length * bits // 8))
    assert torch.equal(packed, packed_by_numpy(rows, bits))
    assert torch.equal(unpack_integers(packed, bits, length), rows)


def test_the_picture_of_pack_integers():
    """Each row of the picture in the docstring: which integer has bit i of byte b."""
    held = "00011122 23334445 55666777"
    for k in range(8):
        one = torch.zeros(8, dtype=torch.int8)
        one[k] = -1  # all bits of integer k
        got = "".join(
            "1" if int(byte) >> i & 1 else "0" for byte in pack_integers(one, 3) for i in range(8)
        )
        assert got == "".join("1" if digit == str(k) else "0" for digit in held.replace(" ", ""))


def test_two_of_four_bits_are_a_byte_the_first_below():
    assert pack_integers(torch.tensor([[1, 2], [-8, 7]], dtype=torch.int8), 4).tolist() == [
        [0x21],
        [0x78],
    ]


@pytest.mark.parametrize("bits", BITS)
def test_every_integer_survives(bits):
    every = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(torch.int8)
    apart = torch.stack([every, every.flip(0)]).t().contiguous().t()
    for rows in (every, apart, every[:0], every.reshape(2, -1)[:, ::2]):
        packed = pack_integers(rows, bits)
        assert torch.equal(unpack_integers(packed, bits, rows.shape[-1]), rows)


def test_bits_behind_the_last_integer_are_zero_and_ignored():
    packed = pack_integers(torch.full((3,), -1, dtype=torch.int8), 3)
    assert packed.tolist() == [0xFF, 0x01]
    dirty = packed | torch.tensor([0, 0xFE], dtype=torch.uint8)
    assert torch.equal(unpack_integers(dirty, 3, 3), unpack_integers(packed, 3, 3))


# ---------------------------------------------------------------- the layers by hand


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
    q: Tensor,
    zx: list[int],
    sx: list[float],
    w: Tensor,
    sw: Tensor,
    zw: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """The module's docstring in rational numbers, one output at a time."""
    result = []
    for m, row in enumerate(q.tolist()):
        for n, column in enumerate(w.tolist()):
            t = Fraction(0)
            for g in range(sw.shape[1]):
                z = 0 if zw is None else int(zw[n, g])
                inputs = range(g * group_size, min(len(row), (g + 1) * group_size))
                acc = sum((row[k] - zx[m]) * (column[k] - z) for k in inputs)
                t = fp32(fp32(Fraction(acc)) * Fraction(float(sw[n, g])) + t)
            y = t * Fraction(sx[m]) + (0 if bias is None else Fraction(float(bias[n])))
            result.append(float(fp32(y)))
    return torch.tensor(result).reshape(len(q), len(w))


@settings(max_examples=40)
@given(
    bits=st.sampled_from(BITS),
    inputs=st.integers(1, 40),
    group_size=st.integers(1, 40),
    zero_points=st.booleans(),
    bias=st.booleans(),
    symmetric=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_groups_are_their_definition(bits, inputs, group_size, zero_points, bias, symmetric, seed):
    size = min(group_size, inputs)
    x, w = floats(3, inputs, seed=seed), few_bits(5, inputs, bits=bits, seed=seed)
    sw = positive(5, -(-inputs // size), seed=seed)
    zw = few_bits(*sw.shape, bits=bits, seed=seed + 1) if zero_points else None
    b = floats(5, seed=seed + 2) if bias else None
    how = {"bits": bits, "group_size": size}
    q, sx, zx = quantize_per_token(x, symmetric=symmetric)
    expected = by_hand(q, zx.flatten().tolist(), sx.flatten().tolist(), w, sw, zw, b, size)
    got = linear_dynamic_intx(x, w, sw, zw, b, symmetric=symmetric, **how)
    assert torch.equal(got, expected)
    limits = {"qmin": -100, "qmax": 90}
    q = quantize(x, 0.05, -3, **limits)
    expected = by_hand(q, [-3] * 3, [float(torch.tensor(0.05))] * 3, w, sw, zw, b, size)
    got = linear_static_intx(x, 0.05, -3, w, sw, zw, b, input_qmin=-100, input_qmax=90, **how)
    assert torch.equal(got, expected)


def test_the_examples_by_hand():
    """bits=4 in groups of two: (1 * 127) 0.5 + (3 + 4) 2 = 77.5; a shorter last group."""
    w = torch.tensor([[1, -2, 3, 4, 5]], dtype=torch.int8)
    scale = torch.tensor([[0.5, 2.0, 10.0]])
    x = torch.tensor([[127.0, 0.0, 1.0, 1.0, 2.0]])
    y = linear_dynamic_intx(x, w, scale, bits=4, group_size=2)
    assert y.tolist() == [[63.5 + 14.0 + 100.0]]
    zero = torch.tensor([[1, 0, -5]], dtype=torch.int8)
    y = linear_dynamic_intx(x, w, scale, zero, bits=4, group_size=2)
    assert y.tolist() == [[14.0 + 200.0]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_points", [False, True])
def test_one_scale_per_channel_is_the_int8_layer(bits, zero_points):
    x, w, sw, b = floats(4, 30), few_bits(6, 30, bits=bits), positive(6), floats(6)
    zw = few_bits(6, bits=bits, seed=1) if zero_points else None
    zero = None if zw is None else zw.int()
    for activation in ACTIVATIONS:
        options = {"symmetric": False, "activation": activation, "activation_bits": 5}
        got = linear_dynamic_intx(x, w, sw, zw, b, bits=bits, **options)
        assert_same_bits(got, linear_dynamic(x, w, sw, zero, b, **options))
        options = {"activation": activation, "input_qmin": -9, "input_qmax": 90}
        options["output_dtype"] = torch.bfloat16
        got = linear_static_intx(x, 0.1, 4, w, sw, zw, b, bits=bits, **options)
        assert_same_bits(got, linear_static(x, 0.1, 4, w, sw, zero, b, **options))


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_rows_that_are_not_finite(bad, activation, group_size):
    x, w = floats(4, 12), few_bits(3, 12, bits=4)
    sw = positive(3) if group_size is None else positive(3, 3)
    rest, how = [0, 1, 3], {"bits": 4, "group_size": group_size, "activation": activation}

    def static(x: Tensor) -> Tensor:
        return linear_static_intx(x, 0.05, 7, w, sw, None, torch.ones(3), **how)

    dynamic, clean = linear_dynamic_intx(x, w, sw, None, torch.ones(3), **how), static(x)
    x[2, 5] = bad
    y = linear_dynamic_intx(x, w, sw, None, torch.ones(3), **how)
    assert y[2].isnan().all()
    assert torch.equal(y[rest], dynamic[rest])
    y = static(x)
    assert torch.equal(y[rest], clean[rest])
    if math.isnan(bad):
        assert y[2].isnan().all()
    else:
        x[2, 5] = math.copysign(1e9, bad)
        assert torch.equal(y, static(x))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,), (2, 0, 3), (1, 1)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_leading_shapes_and_dtypes(leading, dtype):
    x, w, sw = torch.randn(*leading, 16).to(dtype), few_bits(5, 16, bits=3), positive(5, 2)
    how = {"bits": 3, "group_size": 10}
    y = linear_dynamic_intx(x, w, sw, **how)
    assert y.shape == (*leading, 5) and y.dtype == dtype
    flat = linear_dynamic_intx(x.reshape(-1, 16).float(), w, sw, **how, output_dtype=dtype)
    assert torch.equal(y.reshape(-1, 5), flat)
    y = linear_static_intx(x, 0.1, None, w, sw, **how)
    assert y.shape == (*leading, 5) and y.dtype == torch.float32
    scale, zero = torch.tensor([0.1]), torch.zeros(1, dtype=torch.int32)
    again = linear_static_intx(x.float(), scale, zero, w, sw, **how)
    assert torch.equal(y, again)


def test_a_bias_of_another_float_type_is_widened():
    x, w, sw, bias = floats(4, 12), few_bits(3, 12, bits=4), positive(3, 3), floats(3)
    for dtype in FLOATS:
        b, how = bias.to(dtype), {"bits": 4, "group_size": 4}
        wide = linear_dynamic_intx(x, w, sw, None, b.float(), **how)
        assert torch.equal(linear_dynamic_intx(x, w, sw, None, b, **how), wide)


# ---------------------------------------------------------------- refusals

X, W = floats(2, 6), few_bits(4, 6, bits=4)
SCALE, ZERO = positive(4, 2), few_bits(4, 2, bits=4)
GROUPS = {"bits": 4, "group_size": 3}
REFUSALS = {
    "pack: float": (
        lambda: pack_integers(X, 4),
        TypeError,
        "pack_integers: input must be int8, got float32 [2, 6]; convert it with .to()",
    ),
    "pack: bits": (
        lambda: pack_integers(W, 9),
        ValueError,
        "pack_integers: bits must be an integer from 2 to 8, got 9",
    ),
    "pack: no integer": (
        lambda: pack_integers(W, 4.0),
        ValueError,
        "pack_integers: bits must be an integer from 2 to 8, got 4.0",
    ),
    "pack: a bool": (
        lambda: pack_integers(W, True),
        ValueError,
        "pack_integers: bits must be an integer from 2 to 8, got True",
    ),
    "pack: scalar": (
        lambda: pack_integers(W[0, 0], 4),
        ValueError,
        "pack_integers: input must have shape [..., K], got a 0-dimensional tensor",
    ),
    "pack: range": (
        lambda: pack_integers(torch.tensor([-9, 8], dtype=torch.int8), 4),
        ValueError,
        "pack_integers: input must be from -8 to 7 for bits = 4, got integers from -9 to 8",
    ),
    "unpack: int8": (
        lambda: unpack_integers(W, 4, 6),
        TypeError,
        "unpack_integers: input must be uint8, got int8 [4, 6]; convert it with .to()",
    ),
    "unpack: bytes": (
        lambda: unpack_integers(pack_integers(W, 4), 4, 7),
        ValueError,
        "unpack_integers: input must have 4 bytes in its last dimension for length = 7 and "
        "bits = 4, got uint8 [4, 3]",
    ),
    "dynamic: integers": (
        lambda: linear_dynamic_intx(W, W, SCALE, **GROUPS),
        TypeError,
        "linear_dynamic_intx: input must be float32, bfloat16 or float16, got int8 [4, 6]; "
        "convert it with .to()",
    ),
    "dynamic: scalar": (
        lambda: linear_dynamic_intx(X[0, 0], W, SCALE, **GROUPS),
        ValueError,
        "linear_dynamic_intx: input must have shape [..., K], got a 0-dimensional tensor",
    ),
    "dynamic: K": (
        lambda: linear_dynamic_intx(X[:, :5], W, SCALE, **GROUPS),
        ValueError,
        "linear_dynamic_intx: weight must be int8 [N, K] with K = 5, got int8 [4, 6]",
    ),
    "dynamic: no group": (
        lambda: linear_dynamic_intx(X, W, SCALE, bits=4, group_size=0),
        ValueError,
        "linear_dynamic_intx: group_size must be None (one scale per output channel) or between "
        "1 and in_features = 6, got 0",
    ),
    "dynamic: a group too long": (
        lambda: linear_dynamic_intx(X, W, SCALE, bits=4, group_size=7),
        ValueError,
        "linear_dynamic_intx: group_size must be None (one scale per output channel) or between "
        "1 and in_features = 6, got 7",
    ),
    "dynamic: scales": (
        lambda: linear_dynamic_intx(X, W, SCALE, bits=4),
        ValueError,
        "linear_dynamic_intx: weight_scale must be float32 [4], got float32 [4, 2]",
    ),
    "dynamic: zero points": (
        lambda: linear_dynamic_intx(X, W, SCALE, ZERO[:, :1], **GROUPS),
        ValueError,
        "linear_dynamic_intx: weight_zero_point must be int8 [4, 2], got int8 [4, 1]",
    ),
    "dynamic: int32 zero points": (
        lambda: linear_dynamic_intx(X, W, SCALE, ZERO.int(), **GROUPS),
        TypeError,
        "linear_dynamic_intx: weight_zero_point must be int8, got int32 [4, 2]; "
        "convert it with .to()",
    ),
    "dynamic: integers of more bits": (
        lambda: linear_dynamic_intx(X, integers(4, 6).clamp(-100, 50), SCALE, **GROUPS),
        ValueError,
        "linear_dynamic_intx: weight must be from -8 to 7 for bits = 4, got -100",
    ),
    "dynamic: a zero point of more bits": (
        lambda: linear_dynamic_intx(X, W, SCALE, ZERO.clone().fill_(8), **GROUPS),
        ValueError,
        "linear_dynamic_intx: weight_zero_point must be from -8 to 7 for bits = 4, got 8",
    ),
    "dynamic: another device": (
        lambda: linear_dynamic_intx(X, W, SCALE.to("meta"), **GROUPS),
        ValueError,
        "linear_dynamic_intx: weight_scale must be on the input's device cpu, got meta; "
        "move it with .to(device)",
    ),
    "dynamic: bias": (
        lambda: linear_dynamic_intx(X, W, SCALE, None, torch.zeros(3), **GROUPS),
        ValueError,
        "linear_dynamic_intx: bias must have shape [N] with N = 4, got [3]",
    ),
    "dynamic: activation": (
        lambda: linear_dynamic_intx(X, W, SCALE, **GROUPS, activation="swish"),
        ValueError,
        "linear_dynamic_intx: activation must be one of none, relu, gelu, gelu_tanh, silu, tanh, "
        "sigmoid, relu6, hardswish, hardsigmoid, leaky_relu, got 'swish'",
    ),
    "dynamic: output": (
        lambda: linear_dynamic_intx(X, W, SCALE, **GROUPS, output_dtype=torch.int8),
        TypeError,
        "linear_dynamic_intx: output_dtype must be float32, bfloat16 or float16, got int8",
    ),
    "static: scales": (
        lambda: linear_static_intx(X, torch.ones(2), None, W, SCALE, **GROUPS),
        ValueError,
        "linear_static_intx: input_scale must have shape [1], got [2]",
    ),
    "static: a scale of zero": (
        lambda: linear_static_intx(X, 0.0, None, W, SCALE, **GROUPS),
        ValueError,
        "linear_static_intx: input_scale must be finite and at least 2^-126, got 0.0",
    ),
    "static: zero point": (
        lambda: linear_static_intx(X, 1.0, 9, W, SCALE, **GROUPS, input_qmax=8),
        ValueError,
        "linear_static_intx: input_zero_point must be from -128 to 8, got 9",
    ),
    "static: range": (
        lambda: linear_static_intx(X, 1.0, 9, W, SCALE, **GROUPS, input_qmin=0, input_qmax=255),
        ValueError,
        "linear_static_intx: input_qmin < input_qmax must lie within -128 .. 127, got 0 and 255",
    ),
    "static: integer output": (
        lambda: linear_static_intx(X, 1.0, 0, W, positive(4), bits=4, output_dtype=torch.int8),
        TypeError,
        "linear_static_intx: output_dtype must be float32, bfloat16 or float16, got int8",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_wrong_arguments_raise(name):
    call, error, message = REFUSALS[name]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
