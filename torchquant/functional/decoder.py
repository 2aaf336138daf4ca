"""What a decoder does between its linear layers: rotary embedding and attention in float32.

Attention has one stated order of sums, so the bits depend neither on the number of threads nor on
how many tokens are computed at once: a token has the same bits alone and in a prompt::

    score[t]  = sum over c of q[c] * k[t,c]       16 lanes (c mod 16), fmaf, then lanes 8, 4, 2, 1
                                                  apart are added, as in torchquant.functional.norms
    weight[t] = 2^(score[t] * f - the greatest score * f)          f = scale * log2(e) in float32,
                                                  the power of torchquant.functional.attention
    total     = sum over t of weight[t]           16 lanes (t mod 16), as above
    part[c]   = sum over t of weight[t] * v[t,c]  for each 64 tokens: fmaf, ascending, from 0
    y[c]      = sum of the parts                  ascending, from 0
    out[c]    = y[c] * (1 / total)                one division for each query
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchquant.functional._arithmetic import fmaf, reciprocal
from torchquant.functional.attention import _LOG2_E, _power_of_two
from torchquant.functional.kv_cache import _sum_of_products
from torchquant.functional.norms import _sum

TOKENS_OF_A_PART = 64


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: ``x * cos + r * sin``, where r is ``(-x[D/2:], x[:D/2])``.

    Each product and the sum are rounded to float32, as in transformers' models.

    Args:
        states: queries or keys, float32 ``[heads, M, D]``, D even.
        cos: float32 ``[M, D]``.
        sin: float32 ``[M, D]``.

    Returns:
        float32 ``[heads, M, D]``.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).

    Example:
        >>> rotate(torch.tensor([[[1.0, 2.0]]]), torch.zeros(1, 2), torch.ones(1, 2))
        tensor([[[-2.,  1.]]])
    """
    half = states.shape[-1] // 2
    turned = torch.cat((-states[..., half:], states[..., :half]), -1)
    return states * cos + turned * sin


def causal_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attention of the last M tokens of a sequence; each sees the tokens up to itself.

    Args:
        query: float32 ``[H, M, D]``.
        keys: float32 ``[G, T, D]`` of all tokens, T at least M; H is a multiple of G.
        values: float32 ``[G, T, D]``.
        scale: multiplies the scores.

    Returns:
        float32 ``[H, M, D]``, in the order of sums above.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.

    Example:
        >>> x = torch.eye(2)[None]
        >>> causal_attention(200 * x, x, x, 1.0)
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    repeat = query.shape[0] // keys.shape[0]
    keys, values = (states.repeat_interleave(repeat, 0) for states in (keys, values))
    new, tokens = query.shape[1], keys.shape[1]
    factor = torch.tensor(_LOG2_E * scale, dtype=torch.float32, device="cpu")
    shape = (*query.shape[:2], tokens, query.shape[2])
    products = _sum_of_products(query[:, :, None].expand(shape), keys[:, None])[..., 0]
    scores = products * factor
    seen = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = _power_of_two(scores - scores.amax(-1, keepdim=True))
    weights = torch.where(seen, weights, 0.0)
    return _weighted_sum(weights, values) * reciprocal(_sum(weights))


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    missing = -weights.shape[-1] % TOKENS_OF_A_PART
    weights = pad(weights, (0, missing)).unflatten(-1, (-1, TOKENS_OF_A_PART))
    values = pad(values, (0, 0, 0, missing)).unflatten(-2, (-1, TOKENS_OF_A_PART))
    parts = torch.zeros(*weights.shape[:-1], values.shape[-1])
    for place in range(TOKENS_OF_A_PART):
        parts = fmaf(weights[..., place, None], values[:, None, :, place], parts)
    result = torch.zeros(*parts.shape[:2], parts.shape[-1])
    for part in parts.unbind(2):
        result = result + part
    return result
