"""Rows of integers of 2 to 8 bits without gaps: :func:`torchquant.functional.pack_integers`.

Eight integers take ``bits`` bytes, so each byte is put together from a few shifted integers.
Nothing is checked here, and nothing is read from a tensor: the functions work on the meta device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(input: Tensor, bits: int) -> Tensor:
    """int8 ``[..., K]`` to uint8 ``[..., ceil(K * bits / 8)]``.

    Example:
        >>> pack(torch.tensor([1, -1, 7], dtype=torch.int8), 4)
        tensor([241,   7], dtype=torch.uint8)
    """
    length = input.shape[-1]
    unsigned = input.contiguous().view(torch.uint8) & ((1 << bits) - 1)
    unsigned = torch.nn.functional.pad(unsigned, (0, -length % 8)).unflatten(-1, (-1, 8))
    rows = unsigned.new_zeros((*unsigned.shape[:-1], bits))
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        rows[..., byte] |= unsigned[..., place] << shift
        if shift + bits > 8:
            rows[..., byte + 1] |= unsigned[..., place] >> (8 - shift)
    size = (length * bits + 7) // 8
    return rows.flatten(-2)[..., :size].contiguous()  # type: ignore[no-any-return]


def unpack(input: Tensor, bits: int, length: int) -> Tensor:
    """uint8 ``[..., ceil(length * bits / 8)]`` to int8 ``[..., length]``.

    Example:
        >>> unpack(torch.tensor([241, 7], dtype=torch.uint8), 4, 3)
        tensor([ 1, -1,  7], dtype=torch.int8)
    """
    rows = torch.nn.functional.pad(input, (0, -input.shape[-1] % bits)).unflatten(-1, (-1, bits))
    middle = 1 << (bits - 1)
    integers = rows.new_empty((*rows.shape[:-1], 8), dtype=torch.int8)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        unsigned = rows[..., byte] >> shift
        if shift + bits > 8:
            unsigned |= rows[..., byte + 1] << (8 - shift)
        if bits == 8:
            integers[..., place] = unsigned.view(torch.int8)
        else:  # two's complement of fewer bits
            unsigned = (unsigned & (2 * middle - 1)) ^ middle
            integers[..., place] = unsigned.view(torch.int8) - middle
    return integers.flatten(-2)[..., :length].contiguous()  # type: ignore[no-any-return]


__all__ = ["pack", "unpack"]
