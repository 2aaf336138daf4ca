"""torchquant.compat: the functions of earlier libraries, against their reference numbers."""

import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import REFERENCE

from torchquant import compat
from torchquant.functional import quantized_linear


def load(name):
    return json.loads((REFERENCE / f"{name}.json").read_text())


# ---------------------------------------------------------------- textbook affine round trip


def test_affine_round_trip_reference():
    r = load("affine_round_trip")
    assert r["scale"] == (r["beta"] - r["alpha"]) / (r["beta_q"] - r["alpha_q"])
    for dtype in (torch.float32, torch.float64):
        q = compat.quantize_func(torch.tensor(r["x"], dtype=dtype), r["scale"], r["zero_point"])
        assert q.dtype == torch.int8
        assert q.tolist() == r["quantized"]
    scale = torch.tensor(r["scale"], dtype=torch.float64)
    assert compat.dequantize_func(q, scale, r["zero_point"]).tolist() == r["dequantized"]
    single = compat.dequantize_func(q, r["scale"], r["zero_point"])
    assert torch.equal(single, torch.tensor(r["dequantized"]))


def test_affine_adds_the_zero_point_before_rounding():
    x = torch.tensor([0.5, 1.5, 2.5])
    assert compat.quantize_func(x, 1.0, 1).tolist() == [2, 2, 4]  # 1.5, 2.5, 3.5
    assert compat.linear_quantize(x, 8, 1.0, 1).tolist() == [1, 3, 3]  # 0, 2, 2, plus 1


def test_affine_clamps_and_replaces_nan():
    x = torch.tensor([1e9, -1e9, math.inf, math.nan])
    assert compat.quantize_func(x, 1.0, 3, n_bits=4).tolist() == [7, -8, 7, 3]
    assert compat.quantize_func(
        torch.ones(2, 2).half(), torch.tensor([[1.0], [0.5]]), 0
    ).tolist() == [
        [1, 1],
        [2, 2],
    ]


# ---------------------------------------------------------------- real-valued zero point


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("signed_midpoint", compat.quantize_midpoint),
        ("unsigned_minimum", compat.quantize_minimum),
    ],
)
def test_real_zero_point_reference(name, function):
    r = load("real_zero_point")
    expected, x = r[name], torch.tensor(r["x"], dtype=torch.float64)
    q, scale, zero_point = function(x)
    assert (scale, zero_point) == (expected["scale"], expected["zero_point"])
    assert q.tolist() == expected["quantized"]
    assert torch.iinfo(q.dtype).min == expected["qmin"]
    back = compat.dequantize_real(q, scale, zero_point, dtype=torch.float64)
    torch.testing.assert_close(
        back, torch.tensor(expected["dequantized"], dtype=torch.float64), rtol=1e-15, atol=0
    )
    torch.testing.assert_close(back, x, **r["tolerance"])
    assert compat.dequantize_real(q, scale, zero_point).dtype == torch.float32


@settings(deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20))
def test_real_zero_point_round_trip(values):
    x = torch.tensor(values)
    for function in (compat.quantize_midpoint, compat.quantize_minimum):
        q, scale, zero_point = function(x)
        back = compat.dequantize_real(q, scale, zero_point, dtype=torch.float64)
        slack = 1e-6 * max(abs(v) for v in values)
        assert ((back - x.double()).abs() <= 0.5001 * scale + slack).all()


# ---------------------------------------------------------------- linear quantization blocks


def test_linear_quantize_reference():
    r = load("linear_quantization")["linear_quantize"]
    scale, zero_point = compat.scale_and_zero_point(
        min=r["real_min"], max=r["real_max"], bitwidth=r["bits"]
    )
    assert (scale, zero_point) == (r["scale"], r["zero_point"])
    x = torch.tensor(r["input"])
    assert compat.scale_and_zero_point(x, r["bits"]) == (scale, zero_point)
    q = compat.linear_quantize(x, r["bits"], scale, zero_point)
    assert q.tolist() == r["expected"]
    back = compat.linear_dequantize(q, scale, zero_point)
    # The range is kept as observed, so its ends may be up to one step outside the integers.
    assert (back - x).abs().max() <= scale


def test_fully_connected_reference():
    r = load("linear_quantization")["quantized_fc"]
    bits, x = r["bits"], torch.tensor(r["input"])
    weight, bias = torch.tensor(r["weight"]), torch.tensor(r["bias"])
    input_scale, input_zero_point = compat.scale_and_zero_point(x, bits)
    assert (input_scale, input_zero_point) == (r["input_scale"], r["input_zero_point"])
    output = torch.nn.functional.linear(x, weight, bias)
    output_scale, output_zero_point = compat.scale_and_zero_point(output, bits)
    assert output_scale == pytest.approx(r["output_scale"], rel=1e-6)
    assert output_zero_point == r["output_zero_point"]

    qweight, weight_scale, weight_zero_point = compat.linear_quantize_weight_per_channel(
        weight, bits
    )
    assert weight_scale.shape == (8, 1)
    assert weight_scale.flatten().tolist() == r["weight_scale"]
    assert weight_zero_point == 0
    qbias, bias_scale, bias_zero_point = compat.linear_quantize_bias(
        bias, weight_scale, input_scale
    )
    assert qbias.tolist() == r["quantized_bias"]
    assert bias_scale.shape == (8,)
    assert bias_zero_point == 0
    shifted = compat.shift_quantized_linear_bias(qbias, qweight, input_zero_point)
    assert shifted.tolist() == r["shifted_quantized_bias"]

    y = quantized_linear(
        compat.linear_quantize(x, bits, input_scale, input_zero_point),
        qweight,
        qbias,
        input_scale=input_scale,
        input_zero_point=input_zero_point,
        weight_scale=weight_scale.flatten(),
        output_scale=output_scale,
        output_zero_point=output_zero_point,
        output_bits=bits,
    )
    assert y.tolist() == r["expected_output"]


@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_per_channel(bits):
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(bits))
    weight[3] = 0
    q, scale, _ = compat.linear_quantize_weight_per_channel(weight, bits)
    qmin, qmax = compat.get_quantized_range(bits)
    assert scale.shape == (5, 1, 1, 1)
    assert scale[3] == 1
    assert qmin < q.min()
    assert q.max() <= qmax
    assert q.flatten(1).abs().amax(1).tolist() == [qmax, qmax, qmax, 0, qmax]
    assert ((compat.linear_dequantize(q, scale, 0) - weight).abs() <= 0.5001 * scale).all()
    assert compat.linear_quantize_weight_per_channel(weight[:, 0, 0, 0], bits)[1].shape == (5,)


def test_scale_and_zero_point_of_odd_ranges():
    assert compat.scale_and_zero_point(torch.full((3,), 4.0)) == (1.0, 0)
    assert compat.scale_and_zero_point(min=1.0, max=2.0, bitwidth=2) == (1 / 3, -2)
    assert compat.scale_and_zero_point(min=-2.0, max=-1.0, bitwidth=2) == (1 / 3, 1)


def test_bias_saturates_and_accepts_numbers():
    q, scale, _ = compat.linear_quantize_bias(torch.tensor([1e30, -1e30, math.nan]), 1.0, 1.0)
    assert q.tolist() == [2**31 - 1, -(2**31), 0]
    assert scale.tolist() == [1.0]


# ---------------------------------------------------------------- int4 for arrays

float_lists = st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=30)


@settings(deadline=None)
@given(float_lists)
def test_int4_minmax_maps_the_ends_to_the_ends(values):
    q, scale, zero_point = compat.quantize_to_int4(values)
    assert q.dtype == np.int8
    assert isinstance(zero_point, int)
    assert scale > 0
    assert -8 <= q.min() <= q.max() <= 7
    if min(values) != max(values):
        assert q[np.argmin(values)] == -8
        assert q[np.argmax(values)] == 7


@settings(deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30))
def test_int4_round_trip_error(values):
    for method, steps in (("minmax", 1.001), ("absmax", 0.501)):
        q, scale, zero_point = compat.quantize_to_int4(values, method)
        back = compat.dequantize_from_int4(q, scale, zero_point)
        largest = max(abs(v) for v in values)
        assert np.abs(back - np.array(values)).max() <= steps * scale + 1e-6 * largest
        if method == "absmax":
            assert zero_point == 0
            assert largest < 1e-300 or np.abs(q).max() == 7


def test_int4_takes_arrays_lists_and_tensors():
    values = [[-1.0, 0.5], [0.25, 2.0]]
    from_list = compat.quantize_to_int4(values)
    from_array = compat.quantize_to_int4(np.array(values, dtype=np.float32))
    from_tensor = compat.quantize_to_int4(torch.tensor(values))
    assert isinstance(from_list.q, np.ndarray)
    assert isinstance(from_array.q, np.ndarray)
    assert isinstance(from_tensor.q, torch.Tensor)
    assert from_list.q.tolist() == from_array.q.tolist() == from_tensor.q.tolist()
    assert from_list.q.shape == (2, 2)
    assert isinstance(compat.dequantize_from_int4(from_tensor.q, 1.0), torch.Tensor)
    assert compat.dequantize_from_int4([1, -2], 0.5).tolist() == [0.5, -1.0]
    assert compat.quantize_to_int4([]).q.shape == (0,)
    assert compat.quantize_to_int4([0.0, 0.0])[1:] == (1.0, 0)
    q, scale, zero_point = compat.quantize_to_int4([3.0, 3.0])
    assert compat.dequantize_from_int4(q, scale, zero_point).tolist() == [3.0, 3.0]


int4_lists = st.lists(st.integers(-8, 7), max_size=40)


@settings(deadline=None)
@given(int4_lists)
def test_int4_packing_comes_back(values):
    packed = compat.pack_int4_to_int8(values)
    assert packed.dtype == np.int8
    assert len(packed) == (len(values) + 1) // 2
    assert compat.unpack_int8_to_int4(packed, length=len(values)).tolist() == values
    if len(values) % 2 == 0:
        assert compat.unpack_int8_to_int4(packed).tolist() == values


def test_int4_packing_order_and_shapes():
    assert compat.pack_int4_to_int8([1, 2]).tolist() == [0x21]  # first value low
    assert compat.pack_int4_to_int8([-1, -8, 7]).tolist() == [0x8F - 256, 7]
    q = torch.arange(-8, 7, dtype=torch.int8).reshape(3, 5)
    packed = compat.pack_int4_to_int8(q)
    assert packed.shape == (3, 3)
    assert torch.equal(compat.unpack_int8_to_int4(packed, 5), q)
    assert compat.pack_int4_to_int8(torch.empty(0, 4, dtype=torch.int8)).shape == (0, 2)
    every_byte = np.arange(-128, 128).astype(np.int8)
    unpacked = compat.unpack_int8_to_int4(every_byte)
    assert (compat.pack_int4_to_int8(unpacked) == every_byte).all()


def test_int4_example():
    original, quantized, dequantized = compat.example()
    assert original.shape == quantized.shape == dequantized.shape
    assert quantized.dtype == np.int8
    assert (quantized.min(), quantized.max()) == (-8, 7)
    assert np.abs(original - dequantized).max() <= 0.2


# ---------------------------------------------------------------- errors

X, Q = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: compat.quantize_func(Q, 1.0, 0),
            TypeError,
            "quantize_func: x must be a float tensor, got torch.int8",
        ),
        (
            lambda: compat.quantize_func([1.0], 1.0, 0),
            TypeError,
            "quantize_func: x must be a float tensor, got list",
        ),
        (
            lambda: compat.quantize_func(X, 1.0, 0, n_bits=16),
            ValueError,
            "quant_range: bits must be an integer from 2 to 8, got 16",
        ),
        (
            lambda: compat.dequantize_func(X, 1.0, 0),
            TypeError,
            "dequantize_func: x_q must be an integer tensor, got torch.float32",
        ),
        (
            lambda: compat.quantize_midpoint(torch.empty(0)),
            ValueError,
            "quantize_midpoint: x must not be empty, got shape [0]",
        ),
        (
            lambda: compat.quantize_minimum(torch.tensor([math.nan])),
            ValueError,
            "quantize_minimum: x must be finite, got a range of nan to nan",
        ),
        (
            lambda: compat.dequantize_real(X, 1.0, 0.0),
            TypeError,
            "dequantize_real: q must be an integer tensor, got torch.float32",
        ),
        (
            lambda: compat.linear_quantize(Q, 8, 1.0, 0),
            TypeError,
            "linear_quantize: tensor must be a float tensor, got torch.int8",
        ),
        (
            lambda: compat.linear_dequantize(X, 1.0, 0),
            TypeError,
            "linear_dequantize: q must be an integer tensor, got torch.float32",
        ),
        (
            lambda: compat.scale_and_zero_point(),
            ValueError,
            "scale_and_zero_point: pass either tensor, or min and max",
        ),
        (
            lambda: compat.scale_and_zero_point(X, min=0.0, max=1.0),
            ValueError,
            "scale_and_zero_point: pass either tensor, or min and max",
        ),
        (
            lambda: compat.scale_and_zero_point(min=1.0, max=-1.0),
            ValueError,
            "scale_and_zero_point: min and max must be finite with min <= max, "
            "got min = 1.0, max = -1.0",
        ),
        (
            lambda: compat.linear_quantize_weight_per_channel(torch.tensor(1.0), 8),
            ValueError,
            "linear_quantize_weight_per_channel: weight must have shape [N, ...], "
            "got a 0-dimensional tensor",
        ),
        (
            lambda: compat.linear_quantize_bias(X, 1.0, 1.0),
            ValueError,
            "linear_quantize_bias: bias must have shape [N], got [2, 2]",
        ),
        (
            lambda: compat.quantize_to_int4([1.0], "percentile"),
            ValueError,
            "quantize_to_int4: scale_method must be 'minmax' or 'absmax', got 'percentile'",
        ),
        (
            lambda: compat.quantize_to_int4([math.nan]),
            ValueError,
            "quantize_to_int4: values must be finite, got NaN or infinity; remove them first",
        ),
        (
            lambda: compat.dequantize_from_int4([0.5], 1.0),
            TypeError,
            "dequantize_from_int4: q must hold integers, got torch.float64",
        ),
        (
            lambda: compat.pack_int4_to_int8([8, 0]),
            ValueError,
            "pack_int4_to_int8: q must be in -8..7, got 0..8",
        ),
        (
            lambda: compat.pack_int4_to_int8(3),
            ValueError,
            "pack_int4_to_int8: q must have shape [..., L], got a single value",
        ),
        (
            lambda: compat.unpack_int8_to_int4([300]),
            ValueError,
            "unpack_int8_to_int4: packed must be in -128..127, got 300..300",
        ),
        (
            lambda: compat.unpack_int8_to_int4(3),
            ValueError,
            "unpack_int8_to_int4: packed must have shape [..., B], got a single value",
        ),
        (
            lambda: compat.unpack_int8_to_int4([1, 2], length=5),
            ValueError,
            "unpack_int8_to_int4: length must be 4 or 3 for 2 bytes, got 5",
        ),
    ],
)
def test_wrong_arguments_raise(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
