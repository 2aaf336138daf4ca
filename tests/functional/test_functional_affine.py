"""quantize, dequantize, fake_quantize and quantize_per_token in plain torch."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import REFERENCE
from support.affine import (
    INF,
    LARGEST,
    NAN,
    any_float,
    finite,
    same_bits,
    scales,
    spread,
)

from torchquant.functional import (
    choose_qparams,
    dequantize,
    fake_quantize,
    quantize,
    quantize_per_token,
)
from torchquant.scheme import PerAxis, PerGroup, PerTensor, PerToken, quant_range


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_fake_quantize_equals_torch_per_tensor(bits, signed):
    qmin, qmax = quant_range(bits, signed=signed)
    x = spread(20_000)
    for scale in (1.0, 0.5, 0.1, 1 / 3, 7e-3, 2.0**-30, 123.456):
        inside = x[(x / scale).abs() < 2.0**31]
        for zero_point in (qmin, 0, qmax, (qmin + qmax) // 2):
            expected = torch.fake_quantize_per_tensor_affine(inside, scale, zero_point, qmin, qmax)
            got = fake_quantize(inside, scale, zero_point, qmin=qmin, qmax=qmax)
            assert same_bits(got, expected)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_fake_quantize_equals_torch_per_channel(axis):
    x = spread(13, 11, 17)
    channels = x.shape[axis]
    generator = torch.Generator().manual_seed(1)
    scale = torch.exp2(torch.randn(channels, generator=generator) * 4)
    zero_point = torch.randint(-128, 128, (channels,), generator=generator, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(
        x, scale, zero_point, axis % x.dim(), -128, 127
    )
    assert same_bits(fake_quantize(x, scale, zero_point, granularity=PerAxis(axis)), expected)


@settings(deadline=None)
@given(finite, scales, st.integers(-128, 127))
def test_fake_quantize_equals_torch_for_any_number(value, scale, zero_point):
    x, s = torch.tensor([value]), torch.tensor([scale])
    if (x * (1 / s)).abs() < 2.0**31:
        expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -128, 127)
        assert same_bits(fake_quantize(x, s, zero_point), expected)


@settings(deadline=None)
@given(any_float, scales, st.integers(-128, 127))
def test_fake_quantize_is_quantize_then_dequantize(value, scale, zero_point):
    x = torch.tensor([value])
    q = quantize(x, scale, zero_point)
    fake = fake_quantize(x, scale, zero_point)
    if math.isnan(value):
        assert q.item() == zero_point
        assert fake.isnan()
    else:
        assert same_bits(fake, dequantize(q, scale, zero_point))


def test_rounds_half_to_even_and_multiplies_by_the_reciprocal():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5])
    assert quantize(x, 1.0).tolist() == [0, 2, 2, 0, -2, 126, 127]


def test_multiplies_by_the_reciprocal():
    """Near ties, dividing would round otherwise: the contract is the multiplication."""
    scale = torch.tensor([0.3])
    x = (torch.arange(-120, 120) + 0.5) * scale
    product = (x * (1 / scale)).round()
    assert (product != (x / scale).round()).any()
    assert torch.equal(quantize(x, scale).float(), product)


def test_saturates_far_outside_the_range():
    x = torch.tensor([INF, LARGEST, 2.0**31, 2.0**62, -INF, -LARGEST, -(2.0**31)])
    q = quantize(x, 2.0**-126, 5)
    assert q.tolist() == [127, 127, 127, 127, -128, -128, -128]
    assert torch.equal(fake_quantize(x, 1.0, 5), dequantize(quantize(x, 1.0, 5), 1.0, 5))


def test_nan_becomes_the_zero_point():
    x = torch.tensor([NAN, -NAN, 1.0])
    assert quantize(x, 1.0, -7).tolist() == [-7, -7, -6]
    assert quantize(x, torch.tensor([NAN]), -7).tolist() == [-7, -7, -7]
    assert fake_quantize(x, 1.0, -7).isnan().tolist() == [True, True, False]
    real = torch.tensor([2.0])
    assert quantize(x, 1.0, real, qmin=3, qmax=9).tolist() == [3, 3, 3]
    assert fake_quantize(x, 1.0, real).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_widen_exactly_and_round_once(dtype):
    x = spread(5000).clamp(-60_000, 60_000).to(dtype)
    scale, zero_point = torch.tensor([0.37]), 11
    q = quantize(x, scale, zero_point)
    assert torch.equal(q, quantize(x.float(), scale, zero_point))
    back = dequantize(q, scale, zero_point, dtype=dtype)
    assert same_bits(back, dequantize(q, scale, zero_point).to(dtype))
    assert same_bits(fake_quantize(x, scale, zero_point), back)


@pytest.mark.parametrize(
    ("qmin", "qmax", "dtype"),
    [
        (-128, 127, torch.int8),
        (0, 15, torch.int8),
        (0, 255, torch.uint8),
        (-200, 200, torch.int32),
        (-32768, 32767, torch.int32),
    ],
)
def test_result_type_follows_the_range(qmin, qmax, dtype):
    q = quantize(torch.tensor([-1e9, 1e9]), 1.0, qmin=qmin, qmax=qmax)
    assert q.dtype == dtype
    assert q.tolist() == [qmin, qmax]


def test_result_type_on_request():
    assert quantize(torch.ones(1), 1.0, qmin=0, qmax=100, dtype=torch.uint8).dtype == torch.uint8
    assert quantize(torch.ones(1), 1.0, dtype=torch.int16).dtype == torch.int16


def test_dequantize_of_int32_neither_wraps_nor_rounds_twice():
    q = torch.tensor([2**31 - 1, -(2**31), 2**24 + 1, 2**25 + 3], dtype=torch.int32)
    zero_point = torch.tensor([-(2**31)], dtype=torch.int32)
    expected = torch.tensor([int(v) + 2**31 for v in q.tolist()], dtype=torch.int64).float()
    assert torch.equal(dequantize(q, 1.0, zero_point), expected)


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [
        pytest.param(PerTensor(), (3, 4, 7), id="per_tensor"),
        pytest.param(PerAxis(0), (3, 4, 7), id="first_axis"),
        pytest.param(PerAxis(1), (3, 4, 7), id="middle_axis"),
        pytest.param(PerAxis(-1), (3, 4, 7), id="last_axis"),
        pytest.param(PerGroup(4), (3, 4, 8), id="groups"),
        pytest.param(PerGroup(3), (3, 4, 7), id="tail_group"),
        pytest.param(PerGroup(100), (3, 7), id="one_short_group"),
        pytest.param(PerGroup(1), (3, 7), id="groups_of_one"),
        pytest.param(PerToken(), (3, 4, 7), id="per_token"),
        pytest.param(PerToken(), (7,), id="one_token"),
        pytest.param(PerAxis(0), (5,), id="vector_per_axis"),
        pytest.param(PerAxis(0), (1, 5), id="one_channel"),
    ],
)
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "midpoint", "minimum"])
def test_every_granularity_equals_its_slices(granularity, shape, kind):
    """Each group must come out as if it were a tensor of its own."""
    x = spread(*shape)
    options = {
        "symmetric": {},
        "asymmetric": {"symmetric": False},
        "midpoint": {"real_zero_point": "midpoint"},
        "minimum": {"real_zero_point": "minimum"},
    }[kind]
    qmin, qmax = (0, 255) if kind == "minimum" else (-128, 127)
    scale, zero_point = choose_qparams(x, granularity=granularity, **options)
    assert tuple(scale.shape) == granularity.scale_shape(shape)
    assert zero_point is None or zero_point.shape == scale.shape
    arguments = {"qmin": qmin, "qmax": qmax, "granularity": granularity}
    q = quantize(x, scale, zero_point, **arguments)
    back = dequantize(q, scale, zero_point, granularity=granularity)
    assert same_bits(fake_quantize(x, scale, zero_point, **arguments), back)

    group_of = torch.arange(scale.numel(), dtype=torch.int32).reshape(scale.shape)
    groups = (
        dequantize(
            torch.ones(shape, dtype=torch.int8), group_of.float() + 1, None, granularity=granularity
        )
        - 1
    )
    for index in range(scale.numel()):
        mine = groups == index
        s, z = choose_qparams(x[mine], **options)
        assert s.item() == scale.flatten()[index]
        assert z is None or z.item() == zero_point.flatten()[index]
        alone = quantize(x[mine], s, z, qmin=qmin, qmax=qmax)
        assert torch.equal(alone, q[mine])


def test_empty_tensors():
    x = torch.empty(0, 8)
    for granularity in (PerTensor(), PerAxis(0), PerAxis(1), PerGroup(4), PerToken()):
        scale, zero_point = choose_qparams(x, symmetric=False, granularity=granularity)
        assert (scale == 1).all()
        assert quantize(x, scale, zero_point, granularity=granularity).shape == (0, 8)
    assert quantize_per_token(x)[1].shape == (0, 1)
    q, scale, _ = quantize_per_token(torch.empty(3, 0))
    assert q.shape == (3, 0)
    assert scale.tolist() == [[1.0]] * 3


def test_0_dimensional_and_non_contiguous_input():
    assert quantize(torch.tensor(2.0), 0.5, 1).shape == ()
    assert (
        fake_quantize(torch.tensor(2.2), torch.tensor(0.5), torch.tensor(1, dtype=torch.int32)) == 2
    )
    x = spread(8, 6).t()[::2]
    assert torch.equal(quantize(x, 0.1), quantize(x.contiguous(), 0.1))


def test_per_token_by_hand():
    x = torch.tensor([[1.0, -2.54, 0.0], [0.0, 0.0, 0.0], [3.0, 1.0, 2.0]])
    q, scale, zero_point = quantize_per_token(x)
    assert q.tolist() == [[50, -127, 0], [0, 0, 0], [127, 42, 85]]
    assert same_bits(scale[:, 0], torch.tensor([2.54, 127.0, 3.0]) / torch.tensor(127.0))
    assert zero_point.tolist() == [[0], [0], [0]]
    q, scale, zero_point = quantize_per_token(x, symmetric=False)
    assert zero_point.tolist() == [[55], [0], [-128]]
    assert q.tolist() == [[127, -128, 55], [0, 0, 0], [127, -43, 42]]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_per_token_rows_stand_alone(symmetric, dtype):
    x = spread(4, 3, 33).clamp(-60_000, 60_000).to(dtype)
    q, scale, zero_point = quantize_per_token(x, symmetric=symmetric)
    assert (q.dtype, scale.dtype, zero_point.dtype) == (torch.int8, torch.float32, torch.int32)
    assert scale.shape == zero_point.shape == (4, 3, 1)
    expected_scale, expected_zero_point = choose_qparams(
        x, symmetric=symmetric, granularity=PerToken()
    )
    assert torch.equal(scale, expected_scale)
    assert symmetric or torch.equal(zero_point, expected_zero_point)
    assert not symmetric or q.min() >= -127
    for i in range(4):
        for part, whole in zip(
            quantize_per_token(x[i, 1], symmetric=symmetric), (q, scale, zero_point), strict=True
        ):
            assert torch.equal(part, whole[i, 1])


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_per_token_marks_rows_that_are_not_finite(symmetric, bad):
    x = spread(3, 8)
    clean = quantize_per_token(x, symmetric=symmetric)
    x[1, 3] = bad
    q, scale, zero_point = quantize_per_token(x, symmetric=symmetric)
    assert scale.isnan().flatten().tolist() == [False, True, False]
    assert q[1].tolist() == [0] * 8
    assert zero_point[1] == 0
    for i in (0, 2):
        assert all(
            torch.equal(part[i], whole[i])
            for part, whole in zip((q, scale, zero_point), clean, strict=True)
        )


@pytest.mark.parametrize("kind", ["signed_midpoint", "unsigned_minimum"])
def test_real_zero_point_reference(kind):
    reference = json.loads((REFERENCE / "real_zero_point.json").read_text())
    expected = reference[kind]
    x = torch.tensor(reference["x"])
    scale, zero_point = choose_qparams(x, real_zero_point=kind.split("_")[1])
    assert scale.item() == pytest.approx(expected["scale"], rel=2e-7)
    assert zero_point.item() == pytest.approx(expected["zero_point"], rel=2e-7)
    q = quantize(x, scale, zero_point, qmin=expected["qmin"], qmax=expected["qmax"])
    # With the midpoint as zero point the minimum is exactly between two integers (-127.5): fp32
    # rounds the tie to even, the reference's float64 is next to it. test_compat.py
    # reproduces that integer too.
    tie = x == x.min() if kind == "signed_midpoint" else torch.zeros_like(x, dtype=torch.bool)
    integers, reference_integers = q.int(), torch.tensor(expected["quantized"])
    assert torch.equal(integers[~tie], reference_integers[~tie])
    assert (integers - reference_integers).abs().max() <= 1
    back = dequantize(q, scale, zero_point)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(back[~tie], torch.tensor(expected["dequantized"])[~tie], **close)
    torch.testing.assert_close(back, x, **reference["tolerance"])


def test_real_zero_point_order_of_operations():
    x, s, zp = spread(1000), torch.tensor([0.03]), torch.tensor([1.7])
    q = ((x - zp) * (1 / s)).round().clamp(-128, 127)
    assert torch.equal(quantize(x, s, zp).float(), q)
    assert same_bits(dequantize(q.to(torch.int8), s, zp), q * s + zp)


def test_real_zero_point_per_head_and_per_token_of_a_cache():
    cache = spread(2, 4, 5, 16)  # batch, heads, tokens, head_dim
    for granularity, shape in ((PerAxis(1), (4,)), (PerToken(), (2, 4, 5, 1))):
        scale, zero_point = choose_qparams(
            cache, real_zero_point="minimum", granularity=granularity
        )
        assert tuple(scale.shape) == tuple(zero_point.shape) == shape
        fake = fake_quantize(cache, scale, zero_point, qmin=0, qmax=255, granularity=granularity)
        wide = scale.reshape(1, 4, 1, 1) if shape == (4,) else scale
        assert ((fake - cache).abs() <= 0.5001 * wide + 1e-5 * cache.abs()).all()
