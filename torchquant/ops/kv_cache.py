"""Key/value caches of 8 and 4 bits: rows, and attention to them."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.functional.kv_cache import kv_row_bytes
from torchquant.ops._register import fake

__all__ = ["attention_cached", "dequantize_kv", "quantize_kv"]


def quantize_kv(input: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """Rows of a key/value cache: the keys (or the values) of a head and a token in 8 or 4 bits.

    A row has one scale and one real-valued zero point, its least value; or, with ``group_size``,
    one of each for every group of channels. Both are bfloat16 and lie in the row, so that a cache
    is one tensor, uint8 ``[batch, heads, tokens, bytes]``, whose tokens and entries are selected as
    those of any tensor.

    Args:
        input: float32, bfloat16 or float16 ``[..., D]``, D at most 1024, of any strides.
        bits: 8, or 4 (D must be even).
        group_size: channels that share a scale: a multiple of 16 up to 256; None: all, at most 256.

    Returns:
        uint8 ``[..., bytes]``, ``D * bits / 8`` bytes of integers and 4 for each group. A group
        with NaN or infinity becomes NaN.

    Raises:
        TypeError: ``input`` is not float32, bfloat16 or float16.
        ValueError: ``input`` has no dimension, or the sizes do not fit.

    Gradients: none; autograd sees constants.

    Source: the 8-bit format with a real-valued zero point; groups as in Liu et al., "KIVI: A
    Tuning-Free Asymmetric 2bit Quantization for KV Cache" (2024).

    Example:
        >>> quantize_kv(torch.zeros(2, 3, 10, 64), 4, 32).shape  # 32 bytes, and 4 for each group
        torch.Size([2, 3, 10, 40])
    """
    return torch.ops.torchquant.quantize_kv.default(input, bits, group_size)  # type: ignore[no-any-return]


def dequantize_kv(
    rows: Tensor,
    head_dim: int,
    bits: int,
    group_size: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The values of :func:`quantize_kv`'s rows.

    Args:
        rows: uint8 ``[..., bytes]``, of any strides.
        head_dim: channels of a row.
        bits, group_size: as they were in :func:`quantize_kv`.
        dtype: float32, bfloat16 or float16.

    Returns:
        ``[..., head_dim]`` of ``dtype``, contiguous, ``q * scale + zero_point`` rounded to fp32 and
        then to ``dtype``.

    Raises:
        TypeError: ``rows`` is not uint8, or ``dtype`` is not one of the three.
        ValueError: ``rows`` has another number of bytes, or the sizes do not fit.

    Gradients: none; autograd sees constants.

    Example:
        >>> dequantize_kv(quantize_kv(torch.tensor([1.0, 2.0, 3.0, 16.0]), 4), 4, 4)
        tensor([ 1.,  2.,  3., 16.])
    """
    return torch.ops.torchquant.dequantize_kv.default(rows, head_dim, bits, group_size, dtype)  # type: ignore[no-any-return]


def attention_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bits: int,
    group_size: int | None = None,
    *,
    value_dim: int | None = None,
    recent_key: Tensor | None = None,
    recent_value: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention to a key/value cache, which is read as it is: no float copy is made.

    Queries and weights are rounded to 16-bit integers, and all products are products of integers.
    It is made for a decoding step, a few queries for each sequence.

    Args:
        query: float32, bfloat16 or float16 ``[B, H, Q, D]``, of any strides.
        key: :func:`quantize_kv`'s rows of the keys, uint8 ``[B, G, K, bytes]``, with H a multiple
            of G (grouped queries), of any strides.
        value: the rows of the values, uint8 ``[B, G, K, bytes]``.
        bits, group_size: as they were in :func:`quantize_kv`, for keys and values.
        value_dim: E, the channels of a value; D when None.
        recent_key, recent_value: tokens after those of key and value, which are kept in 8 bits:
            uint8 ``[B, G, R, bytes]`` with one scale (over 256 channels: one for each 256).
        mask: bool (False: not attended to) or float (added to the scaled scores), of a shape that
            broadcasts to ``[B, H, Q, K + R]``; or None.
        scale: ``1 / sqrt(D)`` when None.

    Returns:
        ``[B, H, Q, E]`` of query's dtype, stored as ``[B, Q, H, E]``. A query that may not attend
        to any key gives zeros. The bits are the same on every device, with any number of threads,
        alone and in a batch.

    Raises:
        TypeError: ``query`` is not float32, bfloat16 or float16, the rows are not uint8, or
            ``mask`` is neither bool nor float.
        ValueError: the shapes do not fit, the devices differ, or one of the recent two is missing.

    Gradients: none; a query that requires one is refused.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.

    Example:
        >>> x = torch.eye(4)[None, None]
        >>> rows = quantize_kv(x, 8)
        >>> attention_cached(100 * x, rows, rows, 8).sub(x).abs().max() < 0.01
        tensor(True)
    """
    return torch.ops.torchquant.attention_cached.default(  # type: ignore[no-any-return]
        query, key, value, bits, group_size, value_dim, recent_key, recent_value, mask, scale
    )


@fake("quantize_kv")
def _(input: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    size = kv_row_bytes(input.shape[-1], bits, group_size)
    return torch.empty(*input.shape[:-1], size, dtype=torch.uint8, device=input.device)


@fake("dequantize_kv")
def _(
    rows: Tensor,
    head_dim: int,
    bits: int,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    return torch.empty(*rows.shape[:-1], head_dim, dtype=dtype, device=rows.device)


@fake("attention_cached")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bits: int,
    group_size: int | None = None,
    value_dim: int | None = None,
    recent_key: Tensor | None = None,
    recent_value: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    batch, heads, queries, head_dim = query.shape
    shape = (batch, queries, heads, head_dim if value_dim is None else value_dim)
    return torch.empty(shape, dtype=query.dtype, device=query.device).transpose(1, 2)
