"""What a decoder does between its linear layers: rotary embedding and attention in float32.

Attention has one stated order of sums, so the bits depend neither on the number of threads nor on
how many tokens are computed at once: a token has the same bits alone and in a prompt::

    t[j]   = sum over c of q[c] * k[j,c]             fmaf, ascending, from 0
    s[j]   = t[j] * f                                f = scale * log2(e), rounded to float32
    w[j]   = 2^(s[j] - the greatest s)               as in torchquant.functional.attention
    total += sum over j of w[j]                      for each block of 64 tokens, ascending, in 16
                                                     lanes as in torchquant.functional.norms
    b[c]   = sum over j of w[j] * v[j,c]             for each block: fmaf, ascending, from 0
    y[c]  += b[c]                                    blocks ascending, from 0
    out[c] = y[c] * (1 / total)                      one division for each query
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchquant.functional._arithmetic import fmaf, reciprocal
from torchquant.functional.attention import _LOG2_E, _power_of_two
from torchquant.functional.norms import _sum

TOKENS_OF_A_BLOCK = 64


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first R channels: ``x * cos + r * sin``, r being ``(-x2, x1)``.

    ``x1`` and ``x2`` are the halves of these channels. Each product and the sum are rounded to
    float32, as in transformers' models.

    Args:
        states: queries or keys, float32 ``[heads, M, D]``.
        cos: float32 ``[M, R]``, R even and at most D.
        sin: float32 ``[M, R]``.

    Returns:
        float32 ``[heads, M, D]``; channels from R on are as they were.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).

    Example:
        >>> rotate(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.zeros(1, 2), torch.ones(1, 2))
        tensor([[[-2.,  1.,  3.]]])
    """
    x, rest = states.split([cos.shape[-1], states.shape[-1] - cos.shape[-1]], -1)
    first, second = x.chunk(2, -1)
    turned = x * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned, rest), -1)


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
    device = query.device
    seen = torch.ones(new, tokens, dtype=torch.bool, device=device).tril(tokens - new)
    scores = torch.zeros(query.shape[0], new, tokens, dtype=torch.float32, device=device)
    for c in range(query.shape[2]):
        scores = fmaf(query[..., c, None], keys[:, None, :, c], scores)
    scores = scores * torch.tensor(_LOG2_E * scale, dtype=torch.float32, device="cpu")
    lowest = -torch.inf
    scores = scores.masked_fill(~seen, lowest)
    greatest = scores.nan_to_num(lowest, torch.inf, lowest).amax(-1, keepdim=True)
    greatest = torch.where(greatest == lowest, 0.0, greatest)
    weights = torch.where(seen, _power_of_two(scores - greatest), 0.0)
    return _weighted_mean(weights, values, seen)


def _weighted_mean(weights: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    device, missing = values.device, -weights.shape[-1] % TOKENS_OF_A_BLOCK
    blocks = -1, TOKENS_OF_A_BLOCK
    weights, seen = (pad(t, (0, missing)).unflatten(-1, blocks) for t in (weights, seen))
    values = pad(values, (0, 0, 0, missing)).unflatten(-2, blocks)
    sums = torch.zeros(*weights.shape[:-1], values.shape[-1], dtype=torch.float32, device=device)
    for j in range(TOKENS_OF_A_BLOCK):  # in all blocks at once
        more = fmaf(weights[..., j, None], values[:, None, :, j], sums)
        sums = torch.where(seen[..., j, None], more, sums)
    total, y = torch.zeros_like(sums[:, :, 0, :1]), torch.zeros_like(sums[:, :, 0])
    for block in range(weights.shape[2]):
        total = total + _sum(weights[:, :, block])
        y = y + sums[:, :, block]
    return y * torch.where(total == 0, 0.0, reciprocal(total))
