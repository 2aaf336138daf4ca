"""torchquant.functional.linear and quantized_linear: linear layers in plain torch."""

import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import REFERENCE

from torchquant.functional import (
    ACTIVATIONS,
    choose_qparams,
    fmaf,
    linear_dynamic,
    linear_static,
    quantize,
    quantize_bias,
    quantize_per_token,
    quantized_linear,
    shift_bias,
)
from torchquant.scheme import PerAxis

NAN, INF = math.nan, math.inf


def integers(shape, seed=0, dtype=torch.int8):
    limits = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(limits.min, limits.max + 1, shape, generator=generator).to(dtype)


def positive(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.1 + 1e-3


def fp32(value: Fraction | float) -> float:
    """Round a rational number to fp32 by going through torch's exact int and float64 types."""
    if isinstance(value, float):
        return float(torch.tensor(value, dtype=torch.float64).float())
    value = Fraction(value)
    if value == 0:
        return 0.0
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    step = Fraction(2) ** (exponent - 23)
    if abs(value) / step >= 2**24:
        step *= 2
    elif abs(value) / step < 2**23:
        step /= 2
    return float(round(value / step) * step)


def by_hand(x, w, bias, sx, zx, sw, zw):
    """The definition in Python integers and rationals, one output at a time."""
    result = []
    for m, row in enumerate(x.tolist()):
        outputs = []
        for n, column in enumerate(w.tolist()):
            acc = sum((a - zx[m]) * (b - zw[n]) for a, b in zip(row, column, strict=True))
            scale = Fraction(fp32(Fraction(sx[m]) * Fraction(sw[n])))
            if bias is None:
                y = fp32(Fraction(fp32(Fraction(acc))) * scale)
            elif bias.dtype == torch.int32:
                y = fp32(Fraction(fp32(Fraction(acc + int(bias[n])))) * scale)
            else:
                y = fp32(Fraction(fp32(Fraction(acc))) * scale + Fraction(float(bias[n])))
            outputs.append(y)
        result.append(outputs)
    return torch.tensor(result).reshape(x.shape[0], w.shape[0])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    inner=st.integers(1, 70),
    outputs=st.integers(1, 5),
    seed=st.integers(0, 2**16),
    unsigned=st.booleans(),
    per_row=st.booleans(),
    per_channel=st.booleans(),
    bias=st.sampled_from(["none", "float", "int32"]),
)
def test_equals_the_definition(rows, inner, outputs, seed, unsigned, per_row, per_channel, bias):
    dtype = torch.uint8 if unsigned else torch.int8
    x = integers((rows, inner), seed, dtype)
    w = integers((outputs, inner), seed + 1)
    sx = positive(rows, 1, seed=seed) if per_row else positive(1, seed=seed)
    zx = integers((rows, 1) if per_row else (1,), seed + 2, dtype).to(torch.int32)
    sw = positive(outputs, seed=seed + 3) if per_channel else positive(1, seed=seed + 3)
    zw = integers((outputs,) if per_channel else (1,), seed + 4).to(torch.int32)
    b = {
        "none": None,
        "float": torch.randn(outputs),
        "int32": integers((outputs,), seed + 5, torch.int32),
    }[bias]
    got = quantized_linear(
        x,
        w,
        b,
        input_scale=sx,
        input_zero_point=zx,
        weight_scale=sw,
        weight_zero_point=zw,
    )
    wide = [p.flatten().expand(rows).tolist() for p in (sx, zx)]
    wide += [p.expand(outputs).tolist() for p in (sw, zw)]
    assert torch.equal(got, by_hand(x, w, b, *wide))


@pytest.mark.parametrize("inner", [33_025, 33_026, 65_793, 65_794, 200_000])
@pytest.mark.parametrize("zero_points", [False, True], ids=["plain", "both_zero_points"])
def test_extreme_sums_are_exact(inner, zero_points):
    x = torch.full((1, inner), 255, dtype=torch.uint8)
    w = torch.full((2, inner), -128, dtype=torch.int8)
    w[1] = 127
    zx, zw = (0, torch.tensor([127, -128], dtype=torch.int32)) if zero_points else (0, None)
    bias = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32)
    y = quantized_linear(
        x, w, bias, input_scale=1.0, input_zero_point=zx, weight_scale=1.0, weight_zero_point=zw
    )
    low, high = (-255, 255) if zero_points else (-128, 127)
    sums = [255 * low * inner - 2**31, 255 * high * inner + 2**31 - 1]
    assert y.tolist() == [torch.tensor(sums, dtype=torch.int64).float().tolist()]


def test_float_bias_is_fused():
    # acc * scale is half a step from a multiple: only a single rounding gives the right side
    x = torch.full((1, 1), 1, dtype=torch.int8)
    w = torch.full((1, 1), 3, dtype=torch.int8)
    scale = torch.tensor([1 + 2.0**-23])
    bias = torch.tensor([2.0**24 - 2.0])
    y = quantized_linear(x, w, bias, input_scale=scale, weight_scale=1.0)
    assert torch.equal(y[0], fmaf(torch.tensor([3.0]), scale, bias))


def test_accumulator_of_zero_is_positive_zero():
    x = torch.tensor([[0]], dtype=torch.int8)
    w = torch.tensor([[-5]], dtype=torch.int8)
    y = quantized_linear(x, w, input_scale=1.0, weight_scale=1.0)
    assert not y.signbit().any()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,), (2, 0, 3), (1, 1)])
def test_leading_shapes(leading):
    x, w = integers((*leading, 16)), integers((5, 16), 1)
    rows = math.prod(leading)
    for scale in (0.1, torch.tensor(0.1), positive(*leading, 1), positive(*leading)):
        y = quantized_linear(x, w, input_scale=scale, weight_scale=0.01)
        assert y.shape == (*leading, 5)
        flat = scale.reshape(-1, 1) if isinstance(scale, torch.Tensor) else scale
        if isinstance(flat, torch.Tensor) and flat.numel() == 1:
            flat = flat.reshape(1)
        again = quantized_linear(x.reshape(rows, 16), w, input_scale=flat, weight_scale=0.01)
        assert torch.equal(y.reshape(rows, 5), again)


def test_no_inputs_and_no_outputs():
    y = quantized_linear(
        integers((3, 0)),
        integers((2, 0)),
        torch.tensor([1.0, 2.0]),
        input_scale=1.0,
        weight_scale=1.0,
    )
    assert y.tolist() == [[1.0, 2.0]] * 3
    assert quantized_linear(
        integers((3, 4)), integers((0, 4)), input_scale=1.0, weight_scale=1.0
    ).shape == (3, 0)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("output", ["float32", "bfloat16", "float16", "int8", "uint8", "int4"])
def test_fused_equals_unfused(activation, output):
    x, w, bias = integers((7, 40)), integers((9, 40), 1), torch.randn(9)
    arguments = {"input_scale": positive(7, 1), "weight_scale": positive(9, seed=1)}
    y = ACTIVATIONS[activation](quantized_linear(x, w, bias, **arguments))
    if output.startswith(("float", "bfloat")):
        dtype = getattr(torch, output)
        got = quantized_linear(x, w, bias, **arguments, output_dtype=dtype, activation=activation)
        assert torch.equal(got, y.to(dtype))
        return
    qmin, qmax, dtype, bits = {
        "int8": (-128, 127, torch.int8, 8),
        "uint8": (0, 255, torch.uint8, 8),
        "int4": (-8, 7, torch.int8, 4),
    }[output]
    scale, zero_point = torch.tensor([3.1]), 5
    got = quantized_linear(
        x,
        w,
        bias,
        **arguments,
        output_scale=scale,
        output_zero_point=zero_point,
        output_bits=bits,
        output_dtype=dtype,
        activation=activation,
    )
    assert got.dtype == dtype
    assert torch.equal(got, quantize(y, scale, zero_point, qmin=qmin, qmax=qmax, dtype=dtype))


def test_output_scale_means_int8_by_default():
    y = quantized_linear(
        integers((2, 3)), integers((2, 3)), input_scale=1.0, weight_scale=1.0, output_scale=9.0
    )
    assert y.dtype == torch.int8


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_dynamic_is_its_two_steps(symmetric, dtype):
    x = torch.randn(2, 5, 24).to(dtype)
    w, bias, sw = integers((6, 24)), torch.randn(6), positive(6)
    q, scale, zero_point = quantize_per_token(x, symmetric=symmetric)
    expected = quantized_linear(
        q, w, bias, input_scale=scale, input_zero_point=zero_point, weight_scale=sw
    )
    got = linear_dynamic(x, w, sw, bias=bias, symmetric=symmetric)
    assert got.dtype == dtype
    assert torch.equal(got, expected.to(dtype))
    wide = linear_dynamic(x, w, sw, bias=bias, symmetric=symmetric, output_dtype=torch.float32)
    assert torch.equal(wide, expected)


def test_linear_dynamic_approximates_the_float_layer():
    x, weight, bias = torch.randn(32, 256), torch.randn(64, 256), torch.randn(64)
    scale, _ = choose_qparams(weight, granularity=PerAxis(0))
    qweight = quantize(weight, scale, qmin=-127, granularity=PerAxis(0))
    exact = torch.nn.functional.linear(x, weight, bias)
    for symmetric in (True, False):
        got = linear_dynamic(x, qweight, scale, bias=bias, symmetric=symmetric)
        assert torch.nn.functional.cosine_similarity(got, exact).min() > 0.9995
    asymmetric_scale, zero_point = choose_qparams(weight, symmetric=False, granularity=PerAxis(0))
    qweight = quantize(weight, asymmetric_scale, zero_point, granularity=PerAxis(0))
    got = linear_dynamic(x, qweight, asymmetric_scale, zero_point, bias)
    assert torch.nn.functional.cosine_similarity(got, exact).min() > 0.9995


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_dynamic_rows_that_are_not_finite_give_nan(bad, activation):
    x, w = torch.randn(4, 12), integers((3, 12))
    clean = linear_dynamic(x, w, 0.01, bias=torch.ones(3), activation=activation)
    x[2, 5] = bad
    y = linear_dynamic(x, w, 0.01, bias=torch.ones(3), activation=activation)
    assert y[2].isnan().all()
    rest = [0, 1, 3]
    assert torch.equal(y[rest], clean[rest])


def test_linear_static_marks_nan_and_saturates_infinity():
    x, w = torch.randn(5, 12), integers((3, 12))
    x[1, 5], x[2, 0], x[3, 0] = NAN, INF, -INF
    arguments = {"input_scale": 0.05, "input_zero_point": 7, "weight_scale": positive(3)}
    y = linear_static(x, weight=w, bias=torch.ones(3), **arguments)
    expected = quantized_linear(quantize(x, 0.05, 7), w, torch.ones(3), **arguments)
    assert y[1].isnan().all()
    rest = [0, 2, 3, 4]
    assert torch.equal(y[rest], expected[rest])
    q = linear_static(
        x,
        weight=w,
        bias=integers((3,), 3, torch.int32),
        **arguments,
        output_dtype=torch.int8,
        output_scale=0.5,
        output_zero_point=-9,
    )
    assert q.dtype == torch.int8
    assert q[1].tolist() == [-9, -9, -9]
    assert linear_static(x.bfloat16(), weight=w, **arguments).dtype == torch.float32


def test_reference_fully_connected_layer():
    reference = json.loads((REFERENCE / "linear_quantization.json").read_text())["quantized_fc"]
    bits, x = reference["bits"], torch.tensor(reference["input"])
    weight, bias = torch.tensor(reference["weight"]), torch.tensor(reference["bias"])
    observed = {"bits": bits, "symmetric": False, "preserve_range": True}

    input_scale, input_zero_point = choose_qparams(x, **observed)
    # The reference computes this scale in float64; test_compat.py reproduces it to the last bit.
    assert input_scale.item() == pytest.approx(reference["input_scale"], rel=2e-7)
    assert input_zero_point == reference["input_zero_point"]
    weight_scale, _ = choose_qparams(weight, bits=bits, granularity=PerAxis(0))
    assert weight_scale.tolist() == reference["weight_scale"]
    output = torch.nn.functional.linear(x, weight, bias)
    output_scale, output_zero_point = choose_qparams(output, **observed)
    assert output_scale.item() == pytest.approx(reference["output_scale"], rel=1e-6)
    assert output_zero_point == reference["output_zero_point"]

    qweight = quantize(weight, weight_scale, qmin=-2, qmax=1, granularity=PerAxis(0))
    qbias = quantize_bias(bias, input_scale, weight_scale)
    assert qbias.tolist() == reference["quantized_bias"]
    shifted = shift_bias(qbias, qweight, input_zero_point)
    assert shifted.tolist() == reference["shifted_quantized_bias"]

    qx = quantize(x, input_scale, input_zero_point, qmin=-2, qmax=1)
    arguments = {
        "input_scale": input_scale,
        "weight_scale": weight_scale,
        "output_scale": output_scale,
        "output_zero_point": output_zero_point,
        "output_bits": bits,
    }
    y = quantized_linear(qx, qweight, qbias, **arguments, input_zero_point=input_zero_point)
    assert y.tolist() == reference["expected_output"]
    # The shifted bias is for a layer without an input zero point.
    assert torch.equal(quantized_linear(qx, qweight, shifted, **arguments), y)


def test_quantize_bias_saturates():
    bias = torch.tensor([1e30, -1e30, INF, -INF, NAN, 2.0**31, 3.0])
    q = quantize_bias(bias, 1.0, 1.0)
    top, bottom = 2**31 - 1, -(2**31)
    assert q.tolist() == [top, bottom, top, bottom, 0, top, 3]
