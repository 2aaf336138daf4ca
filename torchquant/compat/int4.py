"""int4 for NumPy arrays, lists of floats and tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchquant.compat._shared import holds_integers

ArrayLike: TypeAlias = Sequence[Any] | float | npt.NDArray[Any] | Tensor
Array: TypeAlias = npt.NDArray[Any] | Tensor


class Int4Result(NamedTuple):
    """Integers from -8 to 7 as int8, with their scale and zero point."""

    q: Array
    scale: float
    zero_point: int


def quantize_to_int4(
    values: ArrayLike, scale_method: Literal["minmax", "absmax"] = "minmax"
) -> Int4Result:
    """Quantize to the 16 levels -8..7.

    "minmax" maps the least value to -8 and the greatest to 7; equal values have no
    range and are quantized by "absmax". "absmax" maps the largest magnitude to 7 or -7 with zero
    point 0. The zero point is an integer that may be outside -8..7, because the range need not
    contain 0.

    Args:
        values: array, list of floats or tensor, of any shape; finite.
        scale_method: "minmax" or "absmax".

    Returns:
        ``(q, scale, zero_point)``: q is int8 of the values' shape, a tensor if ``values`` is one,
        otherwise a NumPy array.

    Raises:
        ValueError: scale_method is unknown, or a value is not finite.

    Example:
        >>> quantize_to_int4([-1.0, 0.0, 2.0])
        Int4Result(q=array([-8, -3,  7], dtype=int8), scale=0.2, zero_point=-3)
    """
    who = "quantize_to_int4"
    if scale_method not in ("minmax", "absmax"):
        raise ValueError(f"{who}: scale_method must be 'minmax' or 'absmax', got {scale_method!r}")
    x = _as_tensor(values).to(torch.float64)
    if not bool(x.isfinite().all()):
        raise ValueError(f"{who}: values must be finite, got NaN or infinity; remove them first")
    least, greatest = (float(x.min()), float(x.max())) if x.numel() else (0.0, 0.0)
    if scale_method == "absmax" or least == greatest:
        magnitude = max(-least, greatest)
        scale = magnitude / 7 or 1.0
        q = torch.clamp(torch.round(x / scale), -8, 7)
        return Int4Result(_like(q.to(torch.int8), values), scale, 0)
    scale = greatest / 15 - least / 15
    # A tie rounds up, so that least / scale + zero_point is in (-8.5, -7.5] and the greatest value,
    # 15 levels above it, in (6.5, 7.5]. The ends are then set, independent of the last bit.
    zero_point = math.floor(-8 - least / scale + 0.5)
    q = torch.clamp(torch.round(x / scale + zero_point), -8, 7)
    q = torch.where(x == least, -8.0, torch.where(x == greatest, 7.0, q))
    return Int4Result(_like(q.to(torch.int8), values), scale, zero_point)


def dequantize_from_int4(q: ArrayLike, scale: float, zero_point: int = 0) -> Array:
    """The reverse of :func:`quantize_to_int4`: ``(q - zero_point) * scale``.

    Args:
        q: integers as array, list or tensor.
        scale, zero_point: as :func:`quantize_to_int4` returns them.

    Returns:
        float32 of q's shape, a tensor if ``q`` is one, otherwise a NumPy array.

    Raises:
        TypeError: ``q`` does not hold integers.

    Example:
        >>> dequantize_from_int4([-8, -3, 7], 0.2, -3)
        array([-1.,  0.,  2.], dtype=float32)
    """
    integers = _as_integers("dequantize_from_int4", "q", q).to(torch.float64)
    return _like(((integers - zero_point) * scale).to(torch.float32), q)


def pack_int4_to_int8(q: ArrayLike) -> Array:
    """Two int4 values in each byte along the last axis: ``[..., L]`` -> ``[..., ceil(L/2)]``.

    A value with an even index is in the low four bits, the next value in the high four bits. With
    an odd length the last high four bits are 0; ``unpack_int8_to_int4(packed, length=L)`` drops
    them.

    Args:
        q: integers -8..7 as array, list or tensor with at least one dimension.

    Returns:
        int8, a tensor if ``q`` is one, otherwise a NumPy array.

    Raises:
        TypeError: ``q`` does not hold integers.
        ValueError: a value is outside -8..7, or q has no dimension.

    Example:
        >>> pack_int4_to_int8([1, -1, 7])
        array([-15,   7], dtype=int8)
    """
    who = "pack_int4_to_int8"
    values = _as_integers(who, "q", q)
    if values.dim() == 0:
        raise ValueError(f"{who}: q must have shape [..., L], got a single value")
    if bool(((values < -8) | (values > 7)).any()):
        raise ValueError(f"{who}: q must be in -8..7, got {int(values.min())}..{int(values.max())}")
    nibbles = values.to(torch.int32) & 0xF
    if nibbles.shape[-1] % 2:
        nibbles = torch.cat([nibbles, torch.zeros_like(nibbles[..., :1])], dim=-1)
    packed = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return _like(packed.to(torch.uint8).view(torch.int8), q)


def unpack_int8_to_int4(packed: ArrayLike, length: int | None = None) -> Array:
    """The reverse of :func:`pack_int4_to_int8`, with the sign extended.

    Args:
        packed: bytes as int8 array, list or tensor ``[..., B]``, low four bits first.
        length: number L of packed values: 2B (the default) or 2B - 1.

    Returns:
        int8 ``[..., L]``, a tensor if ``packed`` is one, otherwise a NumPy array.

    Raises:
        TypeError: ``packed`` does not hold integers.
        ValueError: ``length`` does not fit the number of bytes, or a value is outside -128..127.

    Example:
        >>> unpack_int8_to_int4([-15, 7], length=3)
        array([ 1, -1,  7], dtype=int8)
    """
    who = "unpack_int8_to_int4"
    values = _as_integers(who, "packed", packed)
    if values.dim() == 0:
        raise ValueError(f"{who}: packed must have shape [..., B], got a single value")
    if bool(((values < -128) | (values > 127)).any()):
        raise ValueError(
            f"{who}: packed must be in -128..127, got {int(values.min())}..{int(values.max())}"
        )
    full = 2 * values.shape[-1]
    if length is None:
        length = full
    if length not in (full, full - 1) or length < 0:
        raise ValueError(
            f"{who}: length must be {full} or {full - 1} for {values.shape[-1]} bytes, got {length}"
        )
    wide = values.to(torch.int32)
    nibbles = torch.stack([wide & 0xF, (wide >> 4) & 0xF], dim=-1).flatten(-2)
    signed = (nibbles ^ 8) - 8
    return _like(signed[..., :length].to(torch.int8), packed)


def example() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Sample values through the int4 round trip.

    Returns:
        NumPy arrays ``(original, quantized, dequantized)``.

    Example:
        >>> original, quantized, dequantized = example()
        >>> quantized
        array([-8, -5, -3, -2,  0,  1,  4,  7], dtype=int8)
        >>> bool(abs(original - dequantized).max() <= 0.2)
        True
    """
    original = torch.tensor([-1.0, -0.4, 0.0, 0.25, 0.6, 0.75, 1.5, 2.0]).numpy()
    q, scale, zero_point = quantize_to_int4(original)
    dequantized = dequantize_from_int4(q, scale, zero_point)
    return original, q, dequantized  # type: ignore[return-value]


def _as_tensor(values: ArrayLike) -> Tensor:
    # Lists go through NumPy: torch.tensor() would round floats to fp32.
    if isinstance(values, Tensor):
        return values
    return torch.from_numpy(np.array(values))


def _as_integers(who: str, name: str, values: ArrayLike) -> Tensor:
    tensor = _as_tensor(values)
    if tensor.numel() == 0:
        return tensor.to(torch.int8)  # an empty list has no type of its own
    if not holds_integers(tensor):
        raise TypeError(f"{who}: {name} must hold integers, got {tensor.dtype}")
    return tensor


def _like(result: Tensor, source: ArrayLike) -> Array:
    return result if isinstance(source, Tensor) else result.numpy()
