"""torchquant.functional: quantize, dequantize, fake_quantize, choosing parameters."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchquant.functional import (
    choose_qparams,
    dequantize,
    fake_quantize,
    qparams_from_range,
    quantize,
    quantize_per_token,
)
from torchquant.scheme import PerAxis, PerGroup, PerTensor, PerToken, quant_range

INF, NAN = math.inf, math.nan
LARGEST = float(torch.finfo(torch.float32).max)
REFERENCE = Path(__file__).parents[1] / "reference"
any_float = st.floats(width=32)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
scales = st.floats(2.0**-100, 2.0**100, width=32)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, signs of zeros included; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


def spread(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers over many binades, with exact halves and the odd zero among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(
        torch.randint(-12, 12, shape, generator=generator).float()
    )
    halves = torch.randint(-400, 400, shape, generator=generator).float() / 2
    pick = torch.randint(0, 3, shape, generator=generator)
    return torch.where(pick == 0, halves, x)


# ---------------------------------------------------------------- against torch's own operators


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


# ---------------------------------------------------------------- rules, one by one


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


# ---------------------------------------------------------------- choosing scale and zero point


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


# ---------------------------------------------------------------- per token


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


# ---------------------------------------------------------------- real-valued zero points


@pytest.mark.parametrize("kind", ["signed_midpoint", "unsigned_minimum"])
def test_real_zero_point_reference(kind):
    reference = json.loads((REFERENCE / "real_zero_point.json").read_text())
    expected = reference[kind]
    x = torch.tensor(reference["x"])
    scale, zero_point = choose_qparams(x, real_zero_point=kind.split("_")[1])
    assert scale.item() == pytest.approx(expected["scale"], rel=2e-7)
    assert zero_point.item() == pytest.approx(expected["zero_point"], rel=2e-7)
    q = quantize(x, scale, zero_point, qmin=expected["qmin"], qmax=expected["qmax"])
    # With the midpoint as zero point the minimum lies exactly between two integers (-127.5): fp32
    # sees the tie and goes to even, the reference's float64 lands beside it. test_compat.py
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


# ---------------------------------------------------------------- errors

X = torch.zeros(2, 6)
Q = torch.zeros(2, 6, dtype=torch.int8)
SUM_TYPE = "PerTensor(), PerAxis(axis), PerGroup(group_size) or PerToken()"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: quantize(X.double(), 1.0),
            TypeError,
            "quantize: input must be float32, bfloat16 or float16, got float64 [2, 6]; "
            "convert it with .to()",
        ),
        (
            lambda: quantize([1.0], 1.0),
            TypeError,
            "quantize: input must be a torch.Tensor, got list",
        ),
        (
            lambda: quantize(X, torch.ones(3)),
            ValueError,
            "quantize with PerTensor(): scale must have shape [1], got [3]",
        ),
        (
            lambda: quantize(X, torch.ones(2), granularity=PerAxis(1)),
            ValueError,
            "quantize with PerAxis(axis=1): scale must have shape [6], got [2]",
        ),
        (
            lambda: fake_quantize(X, 0.5, granularity=PerGroup(4)),
            ValueError,
            "fake_quantize with PerGroup(group_size=4): scale must have shape [2, 2], got [1]",
        ),
        (
            lambda: quantize(X, torch.ones(2, 1, dtype=torch.float64), granularity=PerToken()),
            TypeError,
            "quantize with PerToken(): scale must be float32, got float64 [2, 1]; "
            "convert it with .to()",
        ),
        (
            lambda: quantize(X, "0.1"),
            TypeError,
            "quantize with PerTensor(): scale must be a float or a float32 tensor of shape [1], "
            "got str '0.1'",
        ),
        (
            lambda: quantize(X, 0.0),
            ValueError,
            "quantize with PerTensor(): scale must be finite and at least 2^-126, got 0.0",
        ),
        (
            lambda: quantize(X, -1.0),
            ValueError,
            "quantize with PerTensor(): scale must be finite and at least 2^-126, got -1.0",
        ),
        (
            lambda: quantize(X, NAN),
            ValueError,
            "quantize with PerTensor(): scale must be finite and at least 2^-126, got nan",
        ),
        (
            lambda: quantize(X, torch.ones(1, device="meta")),
            ValueError,
            "quantize with PerTensor(): scale must be on the input's device cpu, got meta; "
            "move it with .to(device)",
        ),
        (
            lambda: quantize(X, 1.0, 128),
            ValueError,
            "quantize with PerTensor(): zero_point must be from -128 to 127, got 128",
        ),
        (
            lambda: quantize(X, 1.0, 1.5),
            TypeError,
            "quantize with PerTensor(): zero_point must be None, an int or an int32 tensor of "
            "shape [1], got float 1.5; pass a float32 tensor for a real-valued zero point",
        ),
        (
            lambda: quantize(X, 1.0, torch.zeros(1, dtype=torch.int64)),
            TypeError,
            "quantize with PerTensor(): zero_point must be int32 or float32, got int64 [1]; "
            "convert it with .to()",
        ),
        (
            lambda: quantize(
                X, torch.ones(2), torch.zeros(3, dtype=torch.int32), granularity=PerAxis(0)
            ),
            ValueError,
            "quantize with PerAxis(axis=0): zero_point must have shape [2] or [1], got [3]",
        ),
        (
            lambda: quantize(X, 1.0, qmin=5, qmax=5),
            ValueError,
            "quantize: qmin must be less than qmax, both within [-2^22, 2^22], "
            "got qmin = 5, qmax = 5",
        ),
        (
            lambda: fake_quantize(X, 1.0, qmin=0, qmax=2**23),
            ValueError,
            "fake_quantize: qmin must be less than qmax, both within [-2^22, 2^22], "
            "got qmin = 0, qmax = 8388608",
        ),
        (
            lambda: quantize(X, 1.0, dtype=torch.uint8),
            ValueError,
            "quantize: dtype must hold [qmin, qmax] = [-128, 127], got uint8",
        ),
        (
            lambda: quantize(X, 1.0, dtype=torch.float32),
            TypeError,
            "quantize: dtype must be int8, uint8, int16 or int32, got float32",
        ),
        (
            lambda: quantize(X, 1.0, granularity="per_tensor"),
            TypeError,
            f"quantize: granularity must be {SUM_TYPE}, got str 'per_tensor'",
        ),
        (
            lambda: quantize(X, torch.ones(2), granularity=PerAxis(2)),
            ValueError,
            "PerAxis: axis must be from -2 to 1 for an input of shape [2, 6], got 2",
        ),
        (
            lambda: dequantize(X, 1.0),
            TypeError,
            "dequantize: input must be int8, uint8, int16 or int32, got float32 [2, 6]; "
            "convert it with .to()",
        ),
        (
            lambda: dequantize(Q, 1.0, dtype=torch.float64),
            TypeError,
            "dequantize: dtype must be float32, bfloat16 or float16, got float64",
        ),
        (
            lambda: quantize_per_token(torch.tensor(1.0)),
            ValueError,
            "quantize_per_token: input must have shape [..., K], got a 0-dimensional tensor",
        ),
        (
            lambda: quantize_per_token(Q),
            TypeError,
            "quantize_per_token: input must be float32, bfloat16 or float16, got int8 [2, 6]; "
            "convert it with .to()",
        ),
        (
            lambda: choose_qparams(X, bits=9),
            ValueError,
            "quant_range: bits must be an integer from 2 to 8, got 9",
        ),
        (
            lambda: choose_qparams(X, granularity=3),
            TypeError,
            f"choose_qparams: granularity must be {SUM_TYPE}, got int 3",
        ),
        (
            lambda: choose_qparams(X, real_zero_point="middle"),
            ValueError,
            "choose_qparams: real_zero_point must be None, 'midpoint' or 'minimum', got 'middle'",
        ),
        (
            lambda: choose_qparams(X, preserve_range=True),
            ValueError,
            "qparams_from_range: preserve_range must be False for a symmetric range, got True; "
            "pass symmetric=False with it",
        ),
        (
            lambda: qparams_from_range(0.0, X, qmin=0, qmax=1, symmetric=False),
            TypeError,
            "qparams_from_range: min and max must both be tensors or both be numbers, "
            "got float 0.0 and float32 [2, 6]",
        ),
        (
            lambda: qparams_from_range(X, X[0], qmin=0, qmax=1, symmetric=False),
            ValueError,
            "qparams_from_range: max must have min's shape [2, 6], got [6]",
        ),
        (
            lambda: qparams_from_range(1.0, -1.0, qmin=0, qmax=1, symmetric=False),
            ValueError,
            "qparams_from_range: min must not exceed max, got min = 1.0, max = -1.0",
        ),
        (
            lambda: qparams_from_range(-1.0, 1.0, qmin=-5, qmax=0, symmetric=True),
            ValueError,
            "qparams_from_range: qmax must be positive for a symmetric range, got 0",
        ),
    ],
)
def test_wrong_arguments_raise(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
