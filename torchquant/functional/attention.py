"""Attention with bfloat16 products and the same bits everywhere.

The order of the sums is that of AMX's ``tdpbf16ps``. Of each 32 products along the summed
dimension, those of even index and those of odd index are summed separately, with one fused
multiply-add after the other from zero. The two sums are added, and the result is added to the
total of the products before. A product of two
bfloat16 numbers is exact in float32.

The softmax is taken to the base 2 (scores times ``scale * log2(e)``), with a polynomial for the
fraction of the exponent that is within 3e-6: the weights are rounded to bfloat16 next, which costs
a thousand times as much. Weights below 2^-59.5 of the largest are zero. Their sum, of what they
were before that rounding, has the order of :mod:`torchquant.functional.norms`.

Against float64, on operands rounded to bfloat16, an output is within ``2^-8 + 4e * 2^-24`` of the
largest of its values, e being the largest sum of ``abs(q * k * scale)`` among its scores,
plus the rounding of the result (the tests hold the bound).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchquant.functional._arithmetic import fmaf, reciprocal
from torchquant.functional._checks import FLOAT_DTYPES, describe, require_dtype
from torchquant.functional.norms import _sum

_STEP = 32  # products that one instruction sums
_LOG2_E = float.fromhex("0x1.71547652b82fep+0")
_LEAST_EXPONENT = -60.0
_POLYNOMIAL = ("0x1.3a02ccp-7", "0x1.c9fc46p-5", "0x1.ec0378p-3", "0x1.62e12cp-1", "0x1p+0")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """``softmax(query @ key.T * scale + mask) @ value``; :func:`torchquant.ops.attention`.

    Args:
        query: float32, bfloat16 or float16 ``[B, H, Q, D]``.
        key, value: of query's dtype, ``[B, G, K, D]`` and ``[B, G, K, E]``, H a multiple of G.
        mask: bool (False: not attended to) or float (added to the scores), broadcastable to
            ``[B, H, Q, K]``; or None.
        scale: ``1 / sqrt(D)`` when None.
        causal: query i attends to keys 0 to i only.

    Returns:
        ``[B, H, Q, E]`` of query's dtype; zeros for a query that may not attend to any key.

    Raises:
        TypeError: ``query`` is not float32, bfloat16 or float16, or ``key`` or ``value`` has
            another dtype.
        ValueError: ``key`` or ``value`` does not have 4 dimensions, or H is not a multiple of G.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.

    Example:
        >>> x = torch.eye(4)[None, None]
        >>> attention(100 * x, 100 * x, x).equal(x)
        True
    """
    require_dtype("attention", "query", query, FLOAT_DTYPES)
    for name, tensor in (("key", key), ("value", value)):
        require_dtype("attention", name, tensor, (query.dtype,))
        if tensor.dim() != 4 or query.shape[1] % max(1, tensor.shape[1]):
            raise ValueError(
                f"attention: {name} must be [batch, key heads, keys, size], got {describe(tensor)}"
            )
    group = query.shape[1] // max(1, key.shape[1])
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    factor = _LOG2_E * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)

    products = _product(_rounded(query), _rounded(key).transpose(2, 3))
    scores = products * torch.tensor(factor, dtype=torch.float32, device="cpu")
    lowest = -math.inf
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, lowest)
    elif mask is not None:
        log2_e = torch.tensor(_LOG2_E, dtype=torch.float32, device="cpu")
        scores = scores + mask.to(torch.float32) * log2_e
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
        scores = scores.masked_fill(~allowed, lowest)
    greatest = scores.nan_to_num(lowest, math.inf, lowest).amax(-1, keepdim=True)
    greatest = torch.where(greatest == lowest, torch.zeros_like(greatest), greatest)
    weights = torch.where(allowed, _power_of_two(scores - greatest), 0.0)
    total = _sum(weights)
    inverse = torch.where(total == 0, torch.zeros_like(total), reciprocal(total))
    sums = _product(_rounded(weights), _rounded(value))
    return (sums * inverse).to(query.dtype)


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(torch.float32)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the order of ``tdpbf16ps``."""
    length = a.shape[-1]
    a = pad(a, (0, -length % _STEP))
    b = pad(b, (0, 0, 0, -length % _STEP))
    total = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=torch.float32, device=a.device)
    for first in range(0, a.shape[-1], _STEP):
        sums = [torch.zeros_like(total), torch.zeros_like(total)]
        for k in range(first, first + _STEP):
            sums[k % 2] = fmaf(a[..., k : k + 1], b[..., k : k + 1, :], sums[k % 2])
        total = total + (sums[0] + sums[1])
    return total


def _power_of_two(x: Tensor) -> Tensor:
    """2^x for x <= 0; zero below 2^-59.5."""
    lowest = torch.full((), _LEAST_EXPONENT, device=x.device)
    y = torch.where(x < lowest, lowest, x)
    n = torch.round(y)
    f = y - n
    p = fmaf(f, float.fromhex(_POLYNOMIAL[0]), float.fromhex(_POLYNOMIAL[1]))
    for coefficient in _POLYNOMIAL[2:]:
        p = fmaf(p, f, float.fromhex(coefficient))
    power = torch.exp2(n.to(torch.float64)).to(torch.float32)
    return p * torch.where(n <= lowest, torch.zeros_like(power), power)
