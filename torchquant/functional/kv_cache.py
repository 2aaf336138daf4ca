"""Key/value caches of 8 and 4 bits, and attention to them.

The keys (or the values) of one head and one token are a row, which is quantized on its own: with
one scale and one real-valued zero point, or with one of each for every group of channels. Both are
bfloat16 and lie in the row behind the integers (a picture is in ``csrc/formats/kv_rows.h``)::

    zero  = the least x of the group, rounded down to bfloat16
    scale = (the greatest x - zero) / (2^bits - 1), rounded up to bfloat16
    q     = clamp(rint((x - zero) * (1 / scale)), 0, 2^bits - 1)
    x'    = fmaf(q, scale, zero)

A range below ``2^-126 * (2^bits - 1)`` has scale 1. A group with NaN or infinity becomes NaN.

Attention multiplies integers: a query is quantized to 16 bits (symmetric, one scale), so that its
products with a key's integers are exact sums in 32 bits, in any order. ``g`` are groups::

    acc[g] = sum over c of g of q[c] * k[j,c]                              exact
    t      = fmaf(float(acc[g]), key_scale[j,g], t), then
             fmaf(float(sum of q over g), key_zero[j,g], t)                ascending, from t = 0
    score  = t * (query_step * scale * log2(e)) (+ mask * log2(e))
    weight = 2^(score - the greatest score)        as in torchquant.functional.attention

The keys are then taken in blocks of 256, in ascending order; a cache may consist of two parts,
whose blocks do not overlap. In each block the products of weights
and value scales are rounded to integers from 0 to 32767 of a common step::

    a[j]   = weight[j] * value_scale[j,g],   step = the greatest a / 32767
    w[j]   = rint(a[j] * (1 / step))
    y[c]   = fmaf(float(sum over j of w[j] * v[j,c]), step, y[c])        the sum exact
    zeros += sum over j of weight[j] * value_zero[j,g]      in 16 lanes, fmaf
    total += sum over j of weight[j]                        in 16 lanes
    out[c] = (y[c] + zeros) * (1 / total)

Against float64 attention to the rows' values, an output is within ``2^-7 + e * 2^-14`` of the
largest of its values, plus the rounding of the result. ``e`` is ``scale`` times the greatest
magnitude of the query times the largest sum of magnitudes of a key, plus the largest score (the
tests hold the bound). The first term is for the worst weights; usual errors are below ``2^-12``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchquant.functional._arithmetic import divide, fmaf, reciprocal
from torchquant.functional._checks import (
    FLOAT_DTYPES,
    describe,
    dtype_name,
    require_device,
    require_dtype,
)
from torchquant.functional.attention import _LOG2_E, _power_of_two
from torchquant.functional.norms import _LANES, _sum

KEYS_OF_A_BLOCK = 256
MOST_CHANNELS = 256  # of a group
MOST_HEAD_DIM = 1024
_MOST_WEIGHT = 32767
_LEAST_STEP = 2.0**-126


def kv_row_bytes(head_dim: int, bits: int, group_size: int | None = None) -> int:
    """Bytes of one row: the integers, and four bytes for each scale with its zero point.

    Args:
        head_dim: channels of a row.
        bits: 8 or 4.
        group_size: as in :func:`quantize_kv`.

    Returns:
        The size of the last dimension of :func:`quantize_kv`'s result.

    Raises:
        ValueError: the arguments do not fit.

    Example:
        >>> kv_row_bytes(64, 8), kv_row_bytes(64, 4, 32)
        (68, 40)
    """
    group = _group("kv_row_bytes", "head_dim", head_dim, bits, group_size)
    return head_dim * bits // 8 + 4 * -(-head_dim // group)


def quantize_kv(input: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """Rows of a key/value cache; :func:`torchquant.ops.quantize_kv`.

    Args:
        input: float32, bfloat16 or float16 ``[..., D]``, D at most 1024.
        bits: 8, or 4 (D must be even).
        group_size: channels that share a scale: a multiple of 16 up to 256; None: all, at most 256.

    Returns:
        uint8 ``[..., kv_row_bytes(D, bits, group_size)]``.

    Raises:
        TypeError: ``input`` is not float32, bfloat16 or float16.
        ValueError: ``input`` has no dimension, or the sizes do not fit.

    Example:
        >>> quantize_kv(torch.tensor([1.0, 2.0, 3.0, 16.0]), 4)  # 0, 1, 2, 15; scale and zero 1
        tensor([ 32, 241, 128,  63, 128,  63], dtype=torch.uint8)
    """
    who = "quantize_kv"
    require_dtype(who, "input", input, FLOAT_DTYPES)
    if input.dim() == 0:
        raise ValueError(f"{who}: input must have at least 1 dimensions, got {describe(input)}")
    group = _group(who, "head_dim", input.shape[-1], bits, group_size)
    most = 2**bits - 1
    codes, parameters = [], []
    for x in input.to(torch.float32).split(group, -1):
        finite = x.isfinite().all(-1, keepdim=True)
        numbers = torch.where(finite, x, 0.0)
        zero = _towards(numbers.amin(-1, keepdim=True) + 0.0, up=False)
        scale = divide(0.5 * numbers.amax(-1, keepdim=True) - 0.5 * zero, 0.5 * most)
        scale = torch.where(scale < _LEAST_STEP, 1.0, _towards(scale, up=True))
        q = torch.round((numbers - zero) * reciprocal(scale)).clamp(0, most)
        codes.append(torch.where(finite, q, 0.0).to(torch.uint8))
        for parameter in (scale, zero):
            half = parameter.to(torch.bfloat16).view(torch.int16)
            half = torch.where(finite, half, 0x7FC0)
            # The clone has strides of its own, which an empty result may lack.
            parameters.append(half.clone(memory_format=torch.contiguous_format).view(torch.uint8))
    row = torch.cat(codes, -1)
    if bits == 4:
        low, high = row.chunk(2, -1)
        row = low | high << 4
    return torch.cat([row, *parameters], -1)


def dequantize_kv(
    rows: Tensor,
    head_dim: int,
    bits: int,
    group_size: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The values of rows; :func:`torchquant.ops.dequantize_kv`.

    Args:
        rows: uint8 ``[..., bytes]``, a result of :func:`quantize_kv`.
        head_dim, bits, group_size: as they were there.
        dtype: float32, bfloat16 or float16.

    Returns:
        ``[..., head_dim]`` of ``dtype``, rounded to it once.

    Raises:
        TypeError: ``rows`` is not uint8, or ``dtype`` is not one of the three.
        ValueError: ``rows`` has another number of bytes, or the sizes do not fit.

    Example:
        >>> dequantize_kv(quantize_kv(torch.tensor([1.0, 2.0, 3.0, 16.0]), 4), 4, 4)
        tensor([ 1.,  2.,  3., 16.])
    """
    who = "dequantize_kv"
    codes, scale, zero = _parts(who, "rows", rows, "head_dim", head_dim, bits, group_size)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{who}: dtype must be float32, bfloat16 or float16, got {dtype_name(dtype)}"
        )
    groups = zip(codes, scale.split(1, -1), zero.split(1, -1), strict=True)
    return torch.cat([fmaf(q.to(torch.float32), s, z) for q, s, z in groups], -1).to(dtype)


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
    """Attention to the rows of a cache; :func:`torchquant.ops.attention_cached`.

    Args:
        query: float32, bfloat16 or float16 ``[B, H, Q, D]``.
        key, value: uint8 ``[B, G, K, bytes]``, results of :func:`quantize_kv`; H a multiple of G.
        bits, group_size: as they were there, of keys and of values.
        value_dim: E, the channels of a value; D when None.
        recent_key, recent_value: the tokens after those, in 8 bits: uint8 ``[B, G, R, bytes]``,
            results of ``quantize_kv(x, 8, recent_group_size(channels))``; both or neither.
        mask: bool (False: not attended to) or float (added to the scores), broadcastable to
            ``[B, H, Q, K + R]``; or None.
        scale: ``1 / sqrt(D)`` when None.

    Returns:
        ``[B, H, Q, E]`` of query's dtype; zeros for a query that may not attend to any key.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape does not fit, or one of the recent two is missing.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.

    Example:
        >>> x = torch.eye(4)[None, None]
        >>> rows = quantize_kv(x, 8)
        >>> attention_cached(100 * x, rows, rows, 8).sub(x).abs().max() < 0.01
        tensor(True)
    """
    who = "attention_cached"
    require_dtype(who, "query", query, FLOAT_DTYPES)
    if query.dim() != 4 or query.shape[3] < 1:
        raise ValueError(
            f"{who}: query must be [batch, heads, queries, d] with d at least 1, got "
            f"{describe(query)}"
        )
    if (recent_key is None) != (recent_value is None):
        raise ValueError(f"{who}: recent_key and recent_value must be given together, or neither")
    d = query.shape[-1]
    dv = d if value_dim is None else value_dim
    keys = [_repeated(who, "key", query, key, "d", d, bits, group_size)]
    values = [_repeated(who, "value", query, value, "value_dim", dv, bits, group_size)]
    if recent_key is not None and recent_value is not None:
        groups = recent_group_size(d), recent_group_size(dv)
        keys.append(_repeated(who, "recent_key", query, recent_key, "d", d, 8, groups[0]))
        values.append(
            _repeated(who, "recent_value", query, recent_value, "value_dim", dv, 8, groups[1])
        )
    factor = _LOG2_E * (1 / math.sqrt(d) if scale is None else scale)

    scores = _scores(query, keys, torch.tensor(factor, dtype=torch.float32, device="cpu"))
    lowest = -math.inf
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, lowest)
    elif mask is not None:
        log2_e = torch.tensor(_LOG2_E, dtype=torch.float32, device="cpu")
        scores = scores + mask.to(torch.float32) * log2_e
    greatest = scores.nan_to_num(lowest, math.inf, lowest).amax(-1, keepdim=True)
    greatest = torch.where(greatest == lowest, 0.0, greatest)
    return _weighted_sum(_power_of_two(scores - greatest), values, dv).to(query.dtype)


def recent_group_size(channels: int) -> int | None:
    """The group size of a cache's recent rows: None where one scale can serve a whole row.

    Args:
        channels: of a key, or of a value.

    Returns:
        None up to 256 channels, then 256.

    Example:
        >>> recent_group_size(128), recent_group_size(512)
        (None, 256)
    """
    return None if channels <= MOST_CHANNELS else MOST_CHANNELS


_Part = tuple[list[Tensor], Tensor, Tensor]  # integers of each group, scales, zero points


def _scores(query: Tensor, keys: list[_Part], factor: Tensor) -> Tensor:
    x = query.to(torch.float32)
    step = _step(x.abs().amax(-1, keepdim=True))
    q = torch.round(x * reciprocal(step)).clamp(-_MOST_WEIGHT, _MOST_WEIGHT).nan_to_num(0.0)
    scores = []
    for codes, scale, zero in keys:
        t = torch.zeros((), device=x.device)
        for g, part in enumerate(q.to(torch.float64).split(codes[0].shape[-1], -1)):
            acc = (part @ codes[g].to(torch.float64).transpose(2, 3)).to(torch.float32)
            t = fmaf(acc, scale[..., g].unsqueeze(2), t)
            total = part.sum(-1, keepdim=True).to(torch.float32)
            t = fmaf(total, zero[..., g].unsqueeze(2), t)
        scores.append(t)
    return torch.cat(scores, -1) * torch.where(step.isfinite(), step * factor, math.nan)


def _weighted_sum(weights: Tensor, values: list[_Part], channels: int) -> Tensor:
    totals = torch.zeros(*weights.shape[:3], 1, device=weights.device)
    y = torch.zeros(*weights.shape[:3], channels, device=weights.device)
    zeros = y
    start = 0
    for codes, scale, zero in values:
        keys = scale.shape[2]
        for first in range(0, keys, KEYS_OF_A_BLOCK):
            block = slice(first, min(first + KEYS_OF_A_BLOCK, keys))
            part = weights[..., start + block.start : start + block.stop]
            totals = totals + _sum(part)
            acc, steps, offsets = [], [], []
            for g, integers in enumerate(codes):
                a = part * scale[:, :, None, block, g]
                step = _step(a.nan_to_num(0.0).amax(-1, keepdim=True))
                w = torch.round(a * reciprocal(step)).clamp(0, _MOST_WEIGHT).nan_to_num(0.0)
                acc.append(w.to(torch.float64) @ integers[:, :, block].to(torch.float64))
                steps.append(step.expand(acc[-1].shape))
                offset = _sum_of_products(part, zero[:, :, None, block, g])
                offsets.append(offset.expand(acc[-1].shape))
            y = fmaf(torch.cat(acc, -1).to(torch.float32), torch.cat(steps, -1), y)
            zeros = zeros + torch.cat(offsets, -1)
        start += keys
    inverse = torch.where(totals == 0, 0.0, reciprocal(totals))
    return (y + zeros) * inverse


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """As ``_sum`` of ``a * b``, with a fused multiply-add for each element."""
    missing = -a.shape[-1] % _LANES
    lanes = torch.zeros(*a.shape[:-1], _LANES, device=a.device)
    parts = (pad(t, (0, missing)).split(_LANES, -1) for t in (a, b.expand(a.shape)))
    for x, y in zip(*parts, strict=True):
        lanes = fmaf(x, y, lanes)
    return _sum(lanes)


def _step(greatest: Tensor) -> Tensor:
    """The step of 16-bit integers: 1 for zeros, at least 2^-126; NaN and infinity stay."""
    step = divide(greatest, float(_MOST_WEIGHT))
    step = torch.where(step < _LEAST_STEP, _LEAST_STEP, step)
    return torch.where(greatest == 0, 1.0, step)


def _towards(x: Tensor, up: bool) -> Tensor:
    """``x`` rounded to a bfloat16 that is not less (up) or not greater, and finite; as float32."""
    bits = x.contiguous().view(torch.int32)
    away = ((bits < 0) != up) & ((bits & 0xFFFF) != 0)
    bits = torch.where(away, bits + 0x10000, bits)
    bits = torch.where((bits & 0x7F800000) == 0x7F800000, bits - 0x10000, bits)
    return (bits & -0x10000).view(torch.float32)


def _parts(
    who: str, name: str, rows: Tensor, what: str, size: int, bits: int, group_size: int | None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The integers of each group, uint8, and scales and zero points, float32 ``[..., groups]``."""
    require_dtype(who, name, rows, (torch.uint8,))
    group = _group(who, what, size, bits, group_size)
    groups = -(-size // group)
    length = size * bits // 8 + 4 * groups
    if rows.dim() == 0 or rows.shape[-1] != length:
        raise ValueError(
            f"{who}: {name} must have rows of {length} bytes for {size} channels, bits = {bits} "
            f"and group_size = {group}, got {describe(rows)}"
        )
    codes, parameters = rows.split([length - 4 * groups, 4 * groups], -1)
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1)
    values = parameters.contiguous().view(torch.bfloat16).to(torch.float32)
    return list(codes.split(group, -1)), values[..., ::2], values[..., 1::2]


def _repeated(
    who: str,
    name: str,
    query: Tensor,
    rows: Tensor,
    what: str,
    size: int,
    bits: int,
    group_size: int | None,
) -> _Part:
    """:func:`_parts` with a key head for every query head."""
    codes, scale, zero = _parts(who, name, rows, what, size, bits, group_size)
    require_device(who, name, rows, query.device, "query")
    if rows.dim() != 4 or query.shape[1] % max(1, rows.shape[1]):
        raise ValueError(
            f"{who}: {name} must be [batch, key heads, keys, bytes], got {describe(rows)}"
        )
    repeat = query.shape[1] // max(1, rows.shape[1])
    repeated = [part.repeat_interleave(repeat, 1) for part in codes]
    return repeated, scale.repeat_interleave(repeat, 1), zero.repeat_interleave(repeat, 1)


def _group(who: str, what: str, size: int, bits: int, group_size: int | None) -> int:
    if bits not in (4, 8):
        raise ValueError(f"{who}: bits must be 4 or 8, got {bits}")
    if not 1 <= size <= MOST_HEAD_DIM:
        raise ValueError(f"{who}: {what} must be between 1 and {MOST_HEAD_DIM}, got {size}")
    if bits == 4 and size % 2:
        raise ValueError(f"{who}: {what} must be even for bits = 4, got {size}; use bits = 8")
    if group_size is not None and (group_size % 16 or not 16 <= group_size <= MOST_CHANNELS):
        raise ValueError(
            f"{who}: group_size must be None (one scale per row) or a multiple of 16 up to "
            f"{MOST_CHANNELS}, got {group_size}"
        )
    group = size if group_size is None else min(group_size, size)
    if group > MOST_CHANNELS:
        raise ValueError(
            f"{who}: {what} must be at most {MOST_CHANNELS} for one scale per row, got {size}; "
            "pass a group_size"
        )
    return group
