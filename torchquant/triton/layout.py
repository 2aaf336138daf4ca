"""The rows layout of packed weights (csrc/formats/int8_rows.h): sizes, and the row sums."""

from __future__ import annotations

import torch
from torch import Tensor


def padded_k(k: int) -> int:
    """K rounded up to a multiple of 64."""
    return (k + 63) // 64 * 64


def padded_n(n: int) -> int:
    """N rounded up to a multiple of 16."""
    return (n + 15) // 16 * 16


def layout_shape(n: int, k: int) -> tuple[int, int]:
    """Of a packed weight ``[N, K]``."""
    tail = (4 * padded_n(n) + padded_k(k) - 1) // padded_k(k)
    return padded_n(n) + tail, padded_k(k)


def packed_sums(packed: Tensor, n: int) -> Tensor:
    """int32 ``[N16]``: the sum of each weight row."""
    padded = padded_n(n)
    return packed.reshape(-1).narrow(0, padded * packed.shape[1], 4 * padded).view(torch.int32)
