"""Integers of 2 to 8 bits in 32-bit words, as the layouts of other libraries store them.

A word holds its first integer in its lowest bits. Integers are stored without a sign: ``q + half``
with ``half = 2^(bits-1)``. They follow each other without gaps, also across the border of two
words; 32 integers take ``bits`` words. On a little-endian machine this is the string of bits of
:func:`torchquant.functional.pack_integers`, apart from the sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.functional import _bits


def unpack_words(words: Tensor, bits: int, length: int) -> Tensor:
    """int32 ``[R, W]`` to int8 ``[R, length]``, the stored integers minus ``2^(bits-1)``.

    Example:
        >>> unpack_words(torch.tensor([[0x76543210]], dtype=torch.int32), 4, 8)
        tensor([[-8, -7, -6, -5, -4, -3, -2, -1]], dtype=torch.int8)
    """
    signed = _bits.unpack(words.contiguous().view(torch.uint8), bits, length)
    return signed.bitwise_xor_(-(1 << (bits - 1)))  # flips the highest bit: subtracts half


def pack_words(integers: Tensor, bits: int) -> Tensor:
    """The reverse of :func:`unpack_words`; bits behind the last integer are 0.

    Example:
        >>> pack_words(torch.tensor([[-8, -7, 7]], dtype=torch.int8), 4)
        tensor([[3856]], dtype=torch.int32)
    """
    rows = _bits.pack(integers.bitwise_xor(-(1 << (bits - 1))), bits)
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % 4))
    return padded.contiguous().view(torch.int32)


def unpack_words_with_gaps(words: Tensor, bits: int, length: int) -> Tensor:
    """As :func:`unpack_words` for words that hold ``32 // bits`` whole integers each.

    Example:
        >>> words = torch.tensor([[0b111_000, 0b100]], dtype=torch.int32)
        >>> unpack_words_with_gaps(words, 3, 11)
        tensor([[-4,  3, -4, -4, -4, -4, -4, -4, -4, -4,  0]], dtype=torch.int8)
    """
    each, half = 32 // bits, 1 << (bits - 1)
    integers = words.new_empty((*words.shape, each), dtype=torch.int8)
    for place in range(each):
        integers[..., place] = ((words >> (bits * place)) & (2 * half - 1)) - half
    return integers.flatten(-2)[..., :length].contiguous()


def words_for(length: int, bits: int) -> int:
    """The number of words that hold ``length`` integers without gaps.

    Example:
        >>> words_for(64, 3), words_for(10, 3)
        (6, 1)
    """
    return -(-length * bits // 32)


__all__ = ["pack_words", "unpack_words", "unpack_words_with_gaps", "words_for"]
