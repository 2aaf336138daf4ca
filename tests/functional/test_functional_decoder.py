"""Attention in float32 with one order of sums, and the rotary embedding."""

from __future__ import annotations

import math

import pytest
import torch
from support import assert_same_bits, floats

from torchquant.functional._arithmetic import fmaf
from torchquant.functional.attention import _power_of_two
from torchquant.functional.decoder import TOKENS_OF_A_BLOCK, causal_attention, rotate
from torchquant.functional.norms import _sum

SHAPES = [(2, 1, 1, 1, 8), (4, 2, 3, 70, 16), (6, 2, 5, 5, 24), (1, 1, 2, 129, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, ...]) -> None:
    heads, groups, new, tokens, size = shape
    query = floats(heads, new, size, seed=1)
    keys, values = floats(groups, tokens, size, seed=2), floats(groups, tokens, size, seed=3)
    got = causal_attention(query, keys, values, 0.3)
    k, v = (x.double().repeat_interleave(heads // groups, 0) for x in (keys, values))
    seen = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)
    scores = (query.double() @ k.transpose(1, 2) * 0.3).masked_fill(~seen, -math.inf)
    expected = scores.softmax(-1) @ v
    assert (got - expected).abs().max() <= 2e-5 * values.abs().max()


def test_the_order_of_sums() -> None:
    """One query, written out."""
    size, tokens = 8, 2 * TOKENS_OF_A_BLOCK + 3
    q, k, v = floats(size, seed=1), floats(tokens, size, seed=2), floats(tokens, size, seed=3)
    scores = torch.zeros(tokens)
    for c in range(size):
        scores = fmaf(q[c].expand(tokens), k[:, c], scores)
    scores = scores * torch.tensor(0.25 * math.log2(math.e), dtype=torch.float32)
    weights = _power_of_two(scores - scores.max())
    total, y = torch.zeros(1), torch.zeros(size)
    for first in range(0, tokens, TOKENS_OF_A_BLOCK):
        part = weights[first : first + TOKENS_OF_A_BLOCK]
        total = total + _sum(part)
        block = torch.zeros(size)
        for j, weight in enumerate(part):
            block = fmaf(weight.expand(size), v[first + j], block)
        y = y + block
    got = causal_attention(q[None, None], k[None], v[None], 0.25)[0, 0]
    assert_same_bits(got, y * (1 / total))


def test_another_default_dtype() -> None:
    query, keys, values = floats(4, 3, 16), floats(2, 80, 16, seed=1), floats(2, 80, 16, seed=2)
    expected = causal_attention(query, keys, values, 0.25)
    torch.set_default_dtype(torch.float64)
    try:
        got = causal_attention(query, keys, values, 0.25)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_token_alone_has_the_bits_of_a_prompt(rows: int) -> None:
    query, keys, values = floats(4, 80, 16), floats(2, 80, 16, seed=1), floats(2, 80, 16, seed=2)
    whole = causal_attention(query, keys, values, 0.25)
    for end in (rows, 40, 64, 65, 80):
        part = query[:, end - rows : end]
        got = causal_attention(part, keys[:, :end], values[:, :end], 0.25)
        assert_same_bits(got, whole[:, end - rows : end])


def test_later_tokens_do_not_reach_earlier_ones() -> None:
    query, keys, values = floats(2, 9, 8), floats(1, 9, 8, seed=1), floats(1, 9, 8, seed=2)
    expected = causal_attention(query, keys, values, 0.25)
    for states in (keys, values):
        spoilt = states.clone()
        spoilt[:, 5] = math.nan
        pair = (spoilt, values) if states is keys else (keys, spoilt)
        got = causal_attention(query, *pair, 0.25)
        assert_same_bits(got[:, :5], expected[:, :5])
        assert got[:, 5:].isnan().all()


@pytest.mark.parametrize("turned", [16, 6])
def test_rotary_embedding(turned: int) -> None:
    x, cos, sin = floats(3, 5, 16), floats(5, turned, seed=1), floats(5, turned, seed=2)
    got = rotate(x, cos, sin)
    first, rest = x[..., :turned], x[..., turned:]
    half = turned // 2
    swapped = torch.cat((-first[..., half:], first[..., :half]), -1)
    assert_same_bits(got, torch.cat((first * cos + swapped * sin, rest), -1))
