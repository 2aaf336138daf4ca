"""Attention with bfloat16 products."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.ops._register import fake

__all__ = ["attention"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """``softmax(query @ key.T * scale + mask) @ value``, products in bfloat16, sums in float32.

    Queries, keys, values and the softmax's weights are rounded to bfloat16 before they are
    multiplied; scores, softmax and sums are float32. torch does the same in bfloat16 models; in a
    float32 model it lowers the precision of attention to 8 bits. The scores of a block of queries
    are in memory all at once, so this operator is for sequences of up to a few thousand tokens.

    Args:
        query: float32, bfloat16 or float16 ``[B, H, Q, D]``, of any strides: the transposed view of
            a projection's ``[B, Q, H, D]`` output is read in place.
        key: of query's dtype, ``[B, G, K, D]``, with H a multiple of G (grouped queries).
        value: of query's dtype, ``[B, G, K, E]``.
        mask: bool (False: not attended to) or float (added to the scaled scores), of a shape that
            broadcasts to ``[B, H, Q, K]``; or None.
        scale: ``1 / sqrt(D)`` when None.
        causal: query i attends to keys 0 to i only; may be combined with a mask.

    Returns:
        ``[B, H, Q, E]`` of query's dtype, stored as ``[B, Q, H, E]``, so that the output projection
        reads ``result.transpose(1, 2).reshape(B, Q, H * E)`` without a copy. A query that may not
        attend to any key gives zeros. The bits are the same on every device, with any number of
        threads, alone and in a batch, except where magnitudes below 1e-18 are involved: AMX treats
        products below 1e-38 as zero.

    Raises:
        TypeError: ``query`` is not float32, bfloat16 or float16, ``key`` or ``value`` has another
            dtype, or ``mask`` is neither bool nor float.
        ValueError: the shapes do not fit, or the devices differ.

    Gradients: to query, key, value and a float mask, including gradients of gradients, computed
    from the formula in float32.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.

    Example:
        >>> x = torch.eye(4)[None, None]
        >>> attention(100 * x, 100 * x, x).equal(x)
        True
    """
    return torch.ops.torchquant.attention.default(query, key, value, mask, scale, causal)  # type: ignore[no-any-return]


@fake("attention")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    batch, heads, queries, _ = query.shape
    shape = (batch, queries, heads, value.shape[-1])
    return torch.empty(shape, dtype=query.dtype, device=query.device).transpose(1, 2)
