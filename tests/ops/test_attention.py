"""attention: specification, error bound, kernels, gradients, and the verb for transformers."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FLOATS, INF, NAN, assert_same_bits, check_everywhere, floats, threads
from torch import nn
from torch.nn import functional as F

import torchquant
from torchquant import functional, ops

# batch, heads, key heads, queries, keys, d, e
SHAPES = {
    "one of each": (1, 1, 1, 1, 1, 1, 1),
    "small and odd": (2, 4, 2, 7, 9, 5, 3),
    "a block": (1, 2, 2, 32, 32, 32, 32),
    "one more": (1, 2, 1, 33, 33, 33, 17),
    "one less": (1, 1, 1, 31, 31, 31, 15),
    "deep": (1, 1, 1, 17, 40, 100, 16),
    "many keys": (1, 2, 2, 3, 211, 16, 8),
    "many queries": (1, 1, 1, 70, 2, 8, 20),
}


def tensors(shape, seed=0, dtype=torch.float32, magnitude=1.0):
    batch, heads, key_heads, queries, keys, d, e = shape
    q = floats(batch, heads, queries, d, seed=seed) * magnitude
    k = floats(batch, key_heads, keys, d, seed=seed + 1) * magnitude
    v = floats(batch, key_heads, keys, e, seed=seed + 2)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def masks(shape, seed=0):
    batch, heads, _, queries, keys, _, _ = shape
    g = torch.Generator().manual_seed(seed)
    return {
        "none": None,
        "padding": torch.rand(batch, 1, 1, keys, generator=g) < 0.7,
        "bool": torch.rand(batch, 1, queries, keys, generator=g) < 0.5,
        "additive": torch.randn(heads, queries, keys, generator=g),
        "additive bfloat16": torch.randn(queries, keys, generator=g).bfloat16(),
        "one for all keys": torch.rand(queries, 1, generator=g) < 0.8,
        "one number": torch.tensor(1.5),
    }


def exact(q, k, v, mask=None, scale=None, causal=False):
    """In float64, on operands rounded to bfloat16; and the scores' sums of magnitudes."""
    q, k, v = (t.bfloat16().double() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ k.transpose(2, 3) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -INF)
    elif mask is not None:
        scores = scores + mask.double()
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -INF)
    magnitude = q.abs() @ k.abs().transpose(2, 3) * abs(scale)
    if mask is not None and mask.dtype != torch.bool:
        magnitude = magnitude + mask.double().abs()
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v, v, magnitude.amax(-1, keepdim=True)


# ---------------------------------------------------------------- specification


@pytest.mark.parametrize("magnitude", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_error_bound(shape, magnitude):
    """Against float64; the specification's docstring states the bound."""
    for dtype in FLOATS:
        q, k, v = tensors(shape, 3, dtype, magnitude)
        for mask in masks(shape).values():
            for causal in (False, True):
                true, values, sums = exact(q, k, v, mask, None, causal)
                y = ops.attention(q, k, v, mask, causal=causal).double()
                rounding = torch.finfo(dtype).eps * true.abs() + 1e-7
                bound = (2.0**-8 + 4 * sums * 2.0**-24) * values.abs().amax((-2, -1), keepdim=True)
                assert ((y - true).abs() <= bound + rounding).all()


def test_the_order_of_a_product_is_the_promised_one():
    """One score, written out: even and odd indices are summed separately, 32 products at a time."""
    q, k, _ = tensors((1, 1, 1, 1, 1, 50, 1))
    a, b = (t.bfloat16().float().flatten() for t in (q, k))
    total = torch.tensor(0.0)
    for first in (0, 32):
        sums = [torch.tensor(0.0), torch.tensor(0.0)]
        for i in range(first, min(50, first + 32)):
            sums[i % 2] = functional.fmaf(a[i], b[i], sums[i % 2])
        total = total + (sums[0] + sums[1])
    # Two keys: this one, and one whose score is 0. The first value is 1, the other 0.
    both = torch.cat([k, torch.zeros_like(k)], 2)
    value = torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1)
    weight = torch.sigmoid(total.double() * 0.1)
    got = functional.attention(q, both, value, scale=0.1)
    assert abs(float(got) - float(weight)) < 2.0**-8


def test_close_to_torch():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 32, generator=g) for length in (40, 50, 50))
    mask = torch.rand(2, 1, 40, 50, generator=g) < 0.8
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(ops.attention(q, k, v, mask), expected, rtol=0.02, atol=0.02)
    half = [t.bfloat16() for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*half, is_causal=True)
    torch.testing.assert_close(ops.attention(*half, causal=True), expected, rtol=0.02, atol=0.02)


# Frozen: a change of any bit here changes what deployed models compute.
FROZEN = (
    "-0x1.1p+1",
    "-0x1.48f12cp+0",
    "-0x1.623f7p-1",
    "-0x1.9ab3aap+0",
    "-0x1.0971aep+1",
    "-0x1.0f2caep+1",
)


def test_bits_are_frozen():
    x = torch.arange(-21, 21).float().reshape(1, 1, 6, 7) / 8
    y = functional.attention(x, x.flip(2), x.flip(3), causal=True)
    assert y[0, 0, :, 2].tolist() == [float.fromhex(text) for text in FROZEN]


# ---------------------------------------------------------------- kernels


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_give_the_specifications_bits(shape, dtype):
    q, k, v = tensors(shape, 5, dtype, 2.0)
    for name, mask in masks(shape).items():
        for causal in (False, True):
            expected = functional.attention(q, k, v, mask, causal=causal)
            check_everywhere(
                lambda mask=mask, causal=causal: ops.attention(q, k, v, mask, causal=causal),
                expected,
                counts=(1, 2),
                what=name,
            )


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    queries=st.integers(1, 70),
    keys=st.integers(1, 70),
    d=st.integers(1, 70),
    e=st.integers(1, 40),
    mask=st.sampled_from(["none", "padding", "bool", "additive", "one for all keys"]),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.0, -0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_instruction_sets_agree(batch, heads, queries, keys, d, e, mask, causal, scale, seed):
    shape = (batch, *heads, queries, keys, d, e)
    q, k, v = tensors(shape, seed)
    m = masks(shape, seed)[mask]

    def call():
        return ops.attention(q, k, v, m, scale=scale, causal=causal)

    check_everywhere(call, call(), counts=(1, 2))


def test_strides_do_not_matter():
    """Views of projections' outputs, of a fused projection, and layouts that have to be copied."""
    fused = floats(2, 20, 3 * 4 * 8)
    q, k, v = (part.view(2, 20, 4, 8).transpose(1, 2) for part in fused.chunk(3, -1))
    expected = ops.attention(*(t.contiguous() for t in (q, k, v)))
    assert_same_bits(ops.attention(q, k, v), expected)
    swapped = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    assert_same_bits(ops.attention(*swapped), expected)
    mask = torch.rand(20, 20) < 0.5
    assert_same_bits(
        ops.attention(q, k, v, mask.t().contiguous().t()), ops.attention(q, k, v, mask)
    )
    assert_same_bits(
        ops.attention(q[:1].expand(2, 4, 20, 8), k, v)[:1], ops.attention(q[:1], k[:1], v[:1])
    )


def test_the_result_lies_as_the_output_projection_reads_it():
    q, k, v = tensors((2, 4, 2, 5, 6, 8, 3))
    out = ops.attention(q, k, v)
    assert out.shape == (2, 4, 5, 3) and out.transpose(1, 2).is_contiguous()


def test_neither_the_batch_nor_threads_matter():
    q, k, v = tensors((5, 3, 3, 45, 64, 16, 16))
    together = ops.attention(q, k, v)
    for count in (1, 2, 3, 7):
        with threads(count):
            assert_same_bits(ops.attention(q, k, v), together)
    for i in range(5):
        one = slice(i, i + 1)
        assert_same_bits(ops.attention(q[one], k[one], v[one]), together[one])
    first = ops.attention(q[:, :, :20], k, v)
    assert_same_bits(first, together[:, :, :20])  # nor the other queries


def test_masked_keys_have_no_influence():
    q, k, v = tensors((2, 2, 2, 10, 40, 8, 8))
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[..., 29:] = False
    expected = ops.attention(q, k[:, :, :29], v[:, :, :29])
    assert_same_bits(ops.attention(q, k, v, mask), expected)
    additive = torch.zeros(2, 1, 1, 40).masked_fill(~mask, -INF)
    assert_same_bits(ops.attention(q, k, v, additive), expected)


def test_queries_without_keys_give_zeros():
    q, k, v = tensors((1, 1, 1, 4, 6, 8, 8))
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[2] = False
    out = ops.attention(q, k, v, mask)
    assert out[0, 0, 2].eq(0).all() and out[0, 0, [0, 1, 3]].ne(0).any(-1).all()
    assert ops.attention(q, k[:, :, :0], v[:, :, :0]).eq(0).all()
    assert ops.attention(q[:, :, :0], k, v).shape == (1, 1, 0, 8)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_stays_in_its_query(value):
    q, k, v = tensors((1, 1, 1, 40, 40, 8, 8))
    clean = ops.attention(q, k, v)
    q = q.clone()
    q[0, 0, 33, 2] = value
    for isa in torchquant.cpu.available_isas():
        with torchquant.cpu.use_isa(isa):
            out = ops.attention(q, k, v)
        others = [row for row in range(40) if row != 33]
        assert_same_bits(out[:, :, others], clean[:, :, others])
        assert out[0, 0, 33].isnan().all()


def test_large_scores():
    q, k, v = tensors((1, 1, 1, 8, 40, 16, 4), magnitude=1e4)
    true, _, _ = exact(q, k, v)
    check_everywhere(lambda: ops.attention(q, k, v), functional.attention(q, k, v))
    assert (ops.attention(q, k, v) - true).abs().max() < 0.05


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("mask", ["none", "bool", "additive", "causal"])
def test_gradients_are_those_of_the_formula(mask):
    shape = (2, 4, 2, 6, 6, 8, 5)
    g = torch.Generator().manual_seed(0)
    sizes = ((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 5))
    q, k, v = (torch.randn(size, generator=g).requires_grad_() for size in sizes)
    m = masks(shape).get(mask)
    inputs = [q, k, v]
    if mask == "additive":
        inputs.append(m.requires_grad_())
    group_k, group_v = (t.repeat_interleave(2, 1) for t in (k, v))
    options = {"is_causal": True} if mask == "causal" else {"attn_mask": m}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        reference = F.scaled_dot_product_attention(q, group_k, group_v, **options)
    ours = ops.attention(q, k, v, m, causal=mask == "causal")
    factor = torch.randn(ours.shape, generator=g)
    got = torch.autograd.grad((ours * factor).sum(), inputs, create_graph=True)
    expected = torch.autograd.grad((reference * factor).sum(), inputs, create_graph=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    seconds = [sum(g.square().sum() for g in grads) for grads in (got, expected)]
    got, expected = (torch.autograd.grad(total, inputs) for total in seconds)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"query": torch.ones(1, 2, 3, 4).double()},
            TypeError,
            "attention: query must be float32, bfloat16 or float16, got float64 [1, 2, 3, 4]; "
            "convert it with .to(torch.float32)",
        ),
        (
            {"query": torch.ones(2, 3, 4)},
            ValueError,
            "attention: query must be [batch, heads, queries, d], got float32 [2, 3, 4]",
        ),
        (
            {"key": torch.ones(1, 2, 5, 3)},
            ValueError,
            "attention: key must be [batch, key heads, keys, d] with batch = 1 and d = 4, "
            "got float32 [1, 2, 5, 3]",
        ),
        (
            {"key": torch.ones(1, 3, 5, 4)},
            ValueError,
            "attention: key heads must divide the query's 2 heads, got 3",
        ),
        (
            {"value": torch.ones(1, 2, 6, 4)},
            ValueError,
            "attention: value must be [1, 2, 5, e], as key is, got float32 [1, 2, 6, 4]",
        ),
        (
            {"value": torch.ones(1, 2, 5, 4).half()},
            TypeError,
            "attention: value must be float32, got float16 [1, 2, 5, 4]; "
            "convert it with .to(torch.float32)",
        ),
        (
            {"mask": torch.ones(4, 5, dtype=torch.bool)},
            ValueError,
            "attention: mask must broadcast to [batch, heads, queries, keys] = [1, 2, 3, 5], "
            "got bool [4, 5]",
        ),
        (
            {"mask": torch.ones(3, 5, dtype=torch.int64)},
            TypeError,
            "attention: mask must be bool, float32, bfloat16 or float16, got int64 [3, 5]",
        ),
        ({"scale": INF}, ValueError, "attention: scale must be finite, got inf"),
    ],
    ids=["float64", "3d", "d", "heads", "keys", "dtypes", "mask", "integer mask", "scale"],
)
def test_refusals(change, error, message):
    arguments = {
        "query": torch.ones(1, 2, 3, 4),
        "key": torch.ones(1, 2, 5, 4),
        "value": torch.ones(1, 2, 5, 4),
    }
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        ops.attention(**{**arguments, **change})


# ---------------------------------------------------------------- models


def bert(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        **options,
    )
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("padded", [False, True])
def test_models(make, padded):
    model = make()
    ids = torch.arange(30).reshape(2, 15)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 9:] = 0
    calls = []
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask)[0]
        torchquant.replace_attention_(model)
        with torch.profiler.profile() as profile:
            got = model(input_ids=ids, attention_mask=mask)[0]
    calls = [event.key for event in profile.key_averages()]
    assert "torchquant::attention" in calls
    assert "aten::scaled_dot_product_attention" not in calls
    kept = mask.bool()
    torch.testing.assert_close(got[kept], expected[kept], rtol=0.02, atol=0.02)
    assert not torch.equal(got, expected)
    torchquant.replace_attention_(model)  # again
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        assert_same_bits(model(input_ids=ids, attention_mask=mask)[0], expected)


def test_decoding_is_left_to_torch():
    model = llama()
    ids = torch.arange(8).reshape(1, 8)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    torchquant.replace_attention_(model)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_training_with_dropout_is_left_to_torch():
    model = bert(attention_probs_dropout_prob=0.5).train()
    torchquant.replace_attention_(model)
    with torch.profiler.profile() as profile:
        model(input_ids=torch.arange(8).reshape(1, 8))[0].sum().backward()
    assert "torchquant::attention" not in [event.key for event in profile.key_averages()]


def test_verb_refuses():
    with pytest.raises(TypeError, match="must be a transformers model, got Linear"):
        torchquant.replace_attention_(nn.Linear(2, 2))
    model = bert()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="must use attention implementation 'sdpa', got 'eager'"):
        torchquant.replace_attention_(model)
