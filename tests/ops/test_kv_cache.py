"""Key/value caches: rows, attention to them, kernels and refusals."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FLOATS, INF, NAN, assert_same_bits, check_everywhere, floats, threads
from torch import Tensor

import torchquant
from torchquant import functional, ops
from torchquant.functional.kv_cache import recent_group_size

# bits, group size, channels of keys and of values, tokens
FORMATS = {
    "8 bits": (8, None, 64, 64, 300),
    "8 bits, many channels": (8, None, 255, 33, 70),
    "8 bits in groups": (8, 32, 48, 100, 17),
    "8 bits, channels beside groups": (8, 64, 80, 80, 257),
    "4 bits": (4, None, 6, 10, 1),
    "4 bits in groups": (4, 32, 64, 64, 257),
    "4 bits, a group across the halves": (4, 32, 80, 48, 31),
    "4 bits, small groups": (4, 16, 24, 40, 260),
    "4 bits, most channels": (4, 256, 1024, 512, 5),
}


def rows_of(x: Tensor, bits: int, group: int | None) -> Tensor:
    return functional.quantize_kv(x, bits, group)


def exact(q, k, v, mask=None, scale=None):
    """In float64 on the values of the rows, with the bound of its error."""
    repeat = q.shape[1] // k.shape[1]
    q, k, v = (t.double() for t in (q, k, v))
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ k.transpose(2, 3) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -INF)
    elif mask is not None:
        scores = scores + mask.double()
    largest = q.abs().amax(-1, keepdim=True) * k.abs().sum(-1).amax(-1)[..., None, None]
    e = largest * abs(scale) + scores.nan_to_num(0.0, 0.0, 0.0).abs().amax(-1, keepdim=True)
    bound = (2.0**-7 + e * 2.0**-14) * v.abs().amax((-2, -1), keepdim=True)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v, bound


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_rows_have_the_specifications_bits(form, dtype):
    bits, group, channels, _, _ = form
    x = floats(2, 3, 5, channels, dtype=dtype) * floats(channels, seed=1).exp()
    x[0, 0, 0, 0], x[1, 2, 3, -1], x[0, 1, 1], x[0, 1, 2] = NAN, -INF, 0.0, 3.25
    rows = functional.quantize_kv(x, bits, group)
    assert rows.shape == (2, 3, 5, functional.kv_row_bytes(channels, bits, group))
    check_everywhere(lambda: ops.quantize_kv(x, bits, group), rows, counts=(1, 2))
    for out in FLOATS:
        values = functional.dequantize_kv(rows, channels, bits, group, dtype=out)
        check_everywhere(
            lambda out=out: ops.dequantize_kv(rows, channels, bits, group, dtype=out), values
        )


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_value_is_within_half_a_step(form):
    bits, group, channels, _, _ = form
    x = floats(4, 50, channels, seed=2) * 3 + 1
    values = ops.dequantize_kv(ops.quantize_kv(x, bits, group), channels, bits, group)
    for part, got in zip(
        x.split(group or channels, -1), values.split(group or channels, -1), strict=True
    ):
        least, most = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
        # The zero point is a bfloat16 below the least value, the scale one above the true one.
        step = (most - least + 2.0**-7 * least.abs()) * (1 + 2.0**-7) / (2**bits - 1)
        assert ((got - part).abs() <= step / 2 * (1 + 2.0**-7) + 1e-6).all()


def test_special_rows():
    """Constant rows are exact in bfloat16; what is not finite makes its group NaN, and no other."""
    x = floats(4, 64)
    x[0], x[1, 3], x[2, 40] = 1.5, NAN, INF
    values = ops.dequantize_kv(ops.quantize_kv(x, 4, 32), 64, 4, 32)
    assert values[0].eq(1.5).all()
    assert values[1, :32].isnan().all() and values[1, 32:].isfinite().all()
    assert values[2, 32:].isnan().all() and values[2, :32].isfinite().all()
    huge = torch.tensor([[-3e38, 3e38], [1e-40, -1e-40], [-0.0, 0.0]])
    assert ops.dequantize_kv(ops.quantize_kv(huge, 8), 2, 8).isfinite().all()


def test_the_reference_of_the_source_system():
    """The minimum as a real zero point: within its tolerance of 0.01 and bfloat16's rounding."""
    x = torch.tensor([4.0138, 0.8434, 2.0849, 3.0642, 6.7355, 9.0873, 2.2935, 4.5145, 1.0269, 4.98])
    values = ops.dequantize_kv(ops.quantize_kv(x, 8), 10, 8)
    torch.testing.assert_close(values, x, rtol=0.01, atol=0.01)


def test_strides_of_rows_do_not_matter():
    x = floats(2, 7, 4 * 32).view(2, 7, 4, 32).transpose(1, 2)
    rows = ops.quantize_kv(x, 4, 16)
    assert_same_bits(rows, ops.quantize_kv(x.contiguous(), 4, 16))
    for view in (rows[:, 1:3, 2:5], rows.transpose(0, 1), rows[..., ::1].flip(2)):
        got = ops.dequantize_kv(view, 32, 4, 16)
        assert_same_bits(got, ops.dequantize_kv(view.contiguous(), 32, 4, 16))
    swapped = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert_same_bits(ops.quantize_kv(swapped, 4, 16), rows)


# ---------------------------------------------------------------- attention


def states(form, heads=(4, 2), queries=3, batch=2, seed=0, dtype=torch.float32):
    _, _, d, e, tokens = form
    q = floats(batch, heads[0], queries, d, seed=seed).to(dtype)
    k = floats(batch, heads[1], tokens, d, seed=seed + 1) * floats(d, seed=seed + 3).exp()
    v = floats(batch, heads[1], tokens, e, seed=seed + 2) + 0.5
    return q, k, v


def masks(batch, heads, queries, tokens, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "none": None,
        "padding": torch.rand(batch, 1, 1, tokens, generator=g) < 0.7,
        "bool": torch.rand(heads, queries, tokens, generator=g) < 0.5,
        "additive": torch.randn(heads, queries, tokens, generator=g),
        "one for all keys": torch.rand(queries, 1, generator=g) < 0.8,
    }


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_kernels_give_the_specifications_bits(form):
    bits, group, _, e, tokens = form
    dtype = FLOATS[tokens % 3]
    q, k, v = states(form, dtype=dtype, queries=2, batch=1)
    key, value = rows_of(k, bits, group), rows_of(v, bits, group)
    recent = [rows_of(t[:, :, :9], 8, recent_group_size(t.shape[-1])) for t in (k, v)]
    for name, mask in masks(1, 4, 2, tokens + recent[0].shape[2]).items():
        for last in ((None, None), recent):
            m = mask
            if mask is not None and mask.shape[-1] > 1 and last[0] is None:
                m = mask[..., :tokens]
            options = {"value_dim": e, "recent_key": last[0], "recent_value": last[1], "mask": m}
            expected = functional.attention_cached(q, key, value, bits, group, **options)
            check_everywhere(
                lambda o=options: ops.attention_cached(q, key, value, bits, group, **o),
                expected,
                counts=(1, 2),
                what=name,
            )


@settings(deadline=None, max_examples=25)
@given(
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([None, 16, 32, 64]),
    heads=st.sampled_from([(1, 1), (9, 3), (4, 2), (20, 2)]),
    queries=st.integers(1, 3),
    tokens=st.integers(0, 520),
    recent=st.integers(0, 300),
    d=st.integers(1, 80),
    e=st.integers(1, 80),
    seed=st.integers(0, 1000),
)
def test_instruction_sets_agree(bits, group, heads, queries, tokens, recent, d, e, seed):
    d, e = (x + x % 2 * (bits == 4) for x in (d, e))
    q = floats(1, heads[0], queries, d, seed=seed)
    sizes = [(tokens, bits, group), (recent, 8, None)]
    rows = [
        ops.quantize_kv(floats(1, heads[1], n, width, seed=seed + width), b, g)
        for n, b, g in sizes
        for width in (d, e)
    ]

    def call():
        key, value, recent_key, recent_value = rows
        return ops.attention_cached(
            q,
            key,
            value,
            bits,
            group,
            value_dim=e,
            recent_key=recent_key,
            recent_value=recent_value,
        )

    check_everywhere(call, call(), counts=(1, 2))


@pytest.mark.parametrize("magnitude", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_error_bound(form, magnitude):
    """Against float64 on the values of the rows; the specification's docstring states the bound."""
    bits, group, d, e, tokens = form
    for dtype in FLOATS:
        q, k, v = states(form, seed=7, dtype=dtype)
        q = q * magnitude
        key, value = rows_of(k, bits, group), rows_of(v, bits, group)
        k, v = (
            functional.dequantize_kv(rows, width, bits, group)
            for rows, width in ((key, d), (value, e))
        )
        for mask in masks(2, 4, 3, tokens).values():
            true, bound = exact(q, k, v, mask)
            y = ops.attention_cached(q, key, value, bits, group, value_dim=e, mask=mask).double()
            rounding = torch.finfo(dtype).eps * true.abs() + 1e-7
            assert ((y - true).abs() <= bound + rounding).all()


def test_the_usual_error_is_far_smaller():
    form = FORMATS["8 bits"]
    q, k, v = states(form, queries=1)
    key, value = rows_of(k, 8, None), rows_of(v, 8, None)
    k, v = (functional.dequantize_kv(rows, 64, 8) for rows in (key, value))
    true, _ = exact(q, k, v)
    assert (ops.attention_cached(q, key, value, 8) - true).abs().max() < 2.0**-12 * v.abs().max()


def test_a_score_written_out():
    """Two keys: one whose score is 0, and one. The first value is 1, the other 0."""
    q, k = floats(1, 1, 1, 32, seed=3), floats(1, 1, 1, 32, seed=4)
    rows = ops.quantize_kv(torch.cat([torch.zeros_like(k), k], 2), 8)
    values = ops.quantize_kv(torch.tensor([[0.0, 0.0], [1.0, 0.0]])[None, None], 8)
    codes, scale, zero = rows[0, 0, 1, :32].double(), *rows[0, 0, 1, 32:].view(torch.bfloat16)
    step = q.abs().max() / 32767
    integers = torch.round(q * (1 / step)).double().flatten()
    score = (integers @ codes * scale + integers.sum() * zero) * step * 0.5
    got = ops.attention_cached(q, rows, values, 8, value_dim=2, scale=0.5)[0, 0, 0, 0]
    assert abs(float(got) - float(torch.sigmoid(score.double()))) < 2.0**-14


def test_neither_the_batch_nor_threads_nor_other_queries_matter():
    form = FORMATS["4 bits in groups"]
    q, k, v = states(form, heads=(10, 1), batch=3, queries=2)
    key, value = rows_of(k, 4, 32), rows_of(v, 4, 32)
    together = ops.attention_cached(q, key, value, 4, 32)
    for count in (1, 2, 3, 7):
        with threads(count):
            assert_same_bits(ops.attention_cached(q, key, value, 4, 32), together)
    for i in range(3):
        one = slice(i, i + 1)
        got = ops.attention_cached(q[one], key[one], value[one], 4, 32)
        assert_same_bits(got, together[one])
    last = ops.attention_cached(q[:, :, 1:], key, value, 4, 32)
    assert_same_bits(last, together[:, :, 1:])


def test_masked_keys_have_no_influence():
    q, k, v = states(FORMATS["8 bits"])
    key, value = rows_of(k, 8, None), rows_of(v, 8, None)
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    mask[..., 270:] = False
    expected = ops.attention_cached(q, key[:, :, :270], value[:, :, :270], 8)
    assert_same_bits(ops.attention_cached(q, key, value, 8, mask=mask), expected)
    additive = torch.zeros(2, 1, 1, 300).masked_fill(~mask, -INF)
    assert_same_bits(ops.attention_cached(q, key, value, 8, mask=additive), expected)


def test_strides_and_the_layout_of_the_result():
    q, k, v = states(FORMATS["8 bits in groups"])
    key, value = rows_of(k, 8, 32), rows_of(v, 8, 32)
    out = ops.attention_cached(q, key, value, 8, 32, value_dim=100)
    assert out.transpose(1, 2).is_contiguous()
    apart = q.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([key, key], 2)[:, :, :17]
    turned = value.transpose(2, 3).contiguous().transpose(2, 3)
    got = ops.attention_cached(apart, wide, turned, 8, 32, value_dim=100)
    assert_same_bits(got, out)


def test_queries_without_keys_give_zeros():
    q, k, v = states(FORMATS["8 bits"])
    key, value = rows_of(k, 8, None), rows_of(v, 8, None)
    mask = torch.ones(3, 300, dtype=torch.bool)
    mask[1] = False
    out = ops.attention_cached(q, key, value, 8, mask=mask)
    assert out[:, :, 1].eq(0).all() and out[:, :, [0, 2]].ne(0).any(-1).all()
    assert ops.attention_cached(q, key[:, :, :0], value[:, :, :0], 8).eq(0).all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_stays_in_its_query(value):
    q, k, v = states(FORMATS["8 bits"], queries=3)
    rows = rows_of(k, 8, None), rows_of(v, 8, None)
    clean = ops.attention_cached(q, *rows, 8)
    q[0, 1, 1, 2] = value
    for isa in torchquant.cpu.available_isas():
        with torchquant.cpu.use_isa(isa):
            out = ops.attention_cached(q, *rows, 8)
        assert out[0, 1, 1].isnan().all()
        out[0, 1, 1] = clean[0, 1, 1]
        assert_same_bits(out, clean)


# ---------------------------------------------------------------- refusals

Q, ROWS = torch.zeros(1, 2, 1, 6), torch.zeros(1, 1, 3, 10, dtype=torch.uint8)
REFUSED = {
    "bits": (lambda: ops.quantize_kv(Q, 5), "quantize_kv: bits must be 4 or 8, got 5"),
    "odd": (
        lambda: ops.quantize_kv(Q[..., :5], 4),
        "quantize_kv: head_dim must be even for bits = 4, got 5; use bits = 8",
    ),
    "group": (
        lambda: ops.quantize_kv(Q, 8, 24),
        "quantize_kv: group_size must be None (one scale per row) or a multiple of 16 up to 256, "
        "got 24",
    ),
    "wide": (
        lambda: ops.quantize_kv(torch.zeros(300), 8),
        "quantize_kv: head_dim must be at most 256 for one scale per row, got 300; "
        "pass a group_size",
    ),
    "very wide": (
        lambda: ops.quantize_kv(torch.zeros(1040), 8, 16),
        "quantize_kv: head_dim must be between 1 and 1024, got 1040",
    ),
    "bytes": (
        lambda: ops.dequantize_kv(ROWS, 7, 8),
        "dequantize_kv: rows must have rows of 11 bytes for 7 channels, bits = 8 and "
        "group_size = 7, got uint8 [1, 1, 3, 10]",
    ),
    "query": (
        lambda: ops.attention_cached(Q[0], ROWS, ROWS, 8),
        "attention_cached: query must be [batch, heads, queries, d] with d at least 1, got "
        "float32 [2, 1, 6]",
    ),
    "batch": (
        lambda: ops.attention_cached(Q, ROWS.repeat(2, 1, 1, 1), ROWS, 8),
        "attention_cached: key must be [batch, key heads, keys, bytes] with batch = 1, got uint8 "
        "[2, 1, 3, 10]",
    ),
    "heads": (
        lambda: ops.attention_cached(Q, ROWS.repeat(1, 3, 1, 1), ROWS, 8),
        "attention_cached: key heads must divide the query's 2 heads, got 3",
    ),
    "value": (
        lambda: ops.attention_cached(Q, ROWS, ROWS[:, :, :2], 8),
        "attention_cached: value must be [1, 1, 3, bytes], as key is, got uint8 [1, 1, 2, 10]",
    ),
    "one of two": (
        lambda: ops.attention_cached(Q, ROWS, ROWS, 8, recent_key=ROWS),
        "attention_cached: recent_key and recent_value must be given together, or neither",
    ),
    "mask": (
        lambda: ops.attention_cached(Q, ROWS, ROWS, 8, mask=torch.zeros(4, dtype=torch.bool)),
        "attention_cached: mask must broadcast to [batch, heads, queries, keys] = [1, 2, 1, 3], "
        "got bool [4]",
    ),
    "scale": (
        lambda: ops.attention_cached(Q, ROWS, ROWS, 8, scale=INF),
        "attention_cached: scale must be finite, got inf",
    ),
}
WRONG_TYPES = {
    "integers": (
        lambda: ops.quantize_kv(torch.zeros(4, dtype=torch.int8), 8),
        "quantize_kv: input must be float32, bfloat16 or float16, got int8 [4]",
    ),
    "rows": (
        lambda: ops.attention_cached(Q, Q, ROWS, 8),
        "attention_cached: key must be the uint8 result of quantize_kv, got float32 [1, 2, 1, 6]",
    ),
    "dtype": (
        lambda: ops.dequantize_kv(ROWS, 6, 8, dtype=torch.float64),
        "dequantize_kv: dtype must be float32, bfloat16 or float16, got float64",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(("call", "message"), WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_wrong_types(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


def test_gradients_are_refused_or_constant():
    q = Q.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="attention_cached: no gradients, but query"):
        ops.attention_cached(q, ROWS, ROWS, 8)
    assert not ops.quantize_kv(q, 8).requires_grad
