"""The blocks of GGUF tensors: integers, steps and minimums of each group of inputs.

A row consists of blocks of 32 or 256 values. All types here are one formula, with groups of 16 or
32 values inside a block::

    value[n, k] = step[n, g] * q[n, k] + minimum[n, g]

The minimum is absent in Q4_0, Q5_0, Q8_0, Q3_K and Q6_K: such a weight is one of our formats. Types
with a minimum (Q4_1, Q5_1, Q2_K, Q4_K, Q5_K) are not, except where each minimum is a multiple of
its step. Other types (IQ*, TQ*, MXFP4) are left to the package ``gguf``, which dequantizes them.

``d`` and ``m`` are float16. The layouts of a block, in bytes::

    Q4_0   d 2, q 16                              Q4_1   d 2, m 2, q 16
    Q5_0   d 2, high 4, q 16                      Q5_1   d 2, m 2, high 4, q 16
    Q8_0   d 2, q 32                              Q6_K   low 128, high 64, scales 16, d 2
    Q2_K   scales and minimums 16, q 64, d 2, m 2
    Q3_K   high 32, q 64, scales 12, d 2
    Q4_K   d 2, m 2, scales and minimums 12, q 128
    Q5_K   d 2, m 2, scales and minimums 12, high 32, q 128
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """The parts of some rows.

    Attributes:
        q: int8 ``[R, K]``; from 0 on with a minimum, centred at 0 without.
        step: float32 ``[R, groups]``.
        minimum: float32 ``[R, groups]``, or None.
    """

    q: Tensor
    step: Tensor
    minimum: Tensor | None = None


@dataclass(frozen=True)
class BlockType:
    """One type of blocks.

    Attributes:
        name: its name in GGUF.
        values: in a block.
        size: of a block in bytes.
        group: values that share a step.
        bits: of an integer.
        centred: whether there is no minimum.
        split: takes blocks, uint8 ``[B, size]``; returns integers ``[B, values]``, steps and
            minimums ``[B, groups]``.
    """

    name: str
    values: int
    size: int
    group: int
    bits: int
    centred: bool
    split: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]

    def blocks(self, rows: Tensor) -> Blocks:
        """The parts of rows, uint8 ``[R, bytes]``."""
        count = len(rows)
        q, step, minimum = self.split(rows.reshape(-1, self.size))
        shaped = (part if part is None else part.reshape(count, -1) for part in (step, minimum))
        return Blocks(q.to(torch.int8).reshape(count, -1), *shaped)  # type: ignore[arg-type]


def _half(blocks: Tensor, first: int) -> Tensor:
    """The float16 at a byte of each block, as float32 ``[B, 1]``."""
    return blocks[:, first : first + 2].contiguous().view(torch.float16).float()


def _nibbles(part: Tensor, run: int) -> Tensor:
    """Bytes to 4 bits: of ``run`` bytes first all low halves, then all high halves."""
    part = part.unflatten(1, (-1, run))
    return torch.stack((part & 15, part >> 4), 2).flatten(1)


def _pairs(part: Tensor, run: int) -> Tensor:
    """Bytes to 2 bits: of ``run`` bytes first the lowest pairs of bits, then the next ones."""
    part = part.unflatten(1, (-1, run))
    return torch.stack([(part >> shift) & 3 for shift in (0, 2, 4, 6)], 2).flatten(1)


def _bits(part: Tensor) -> Tensor:
    """32 bytes to 256 bits: first the lowest bits of all bytes, then the next ones."""
    return torch.stack([(part >> shift) & 1 for shift in range(8)], 1).flatten(1)


def _fifth_bits(part: Tensor) -> Tensor:
    """4 bytes to 32 bits, in their order."""
    return torch.stack([(part >> shift) & 1 for shift in range(8)], 2).flatten(1)


def _six_bits(part: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minimums of 6 bits each in the 12 bytes of Q4_K and Q5_K."""
    first, second, rest = part[:, :4], part[:, 4:8], part[:, 8:]
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), 1)
    minimums = torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), 1)
    return scales.float(), minimums.float()


def _q4_0(b: Tensor) -> tuple[Tensor, Tensor, None]:
    return _nibbles(b[:, 2:], 16).to(torch.int8) - 8, _half(b, 0), None


def _q4_1(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _nibbles(b[:, 4:], 16), _half(b, 0), _half(b, 2)


def _q5_0(b: Tensor) -> tuple[Tensor, Tensor, None]:
    q = _nibbles(b[:, 6:], 16) | (_fifth_bits(b[:, 2:6]) << 4)
    return q.to(torch.int8) - 16, _half(b, 0), None


def _q5_1(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = _nibbles(b[:, 8:], 16) | (_fifth_bits(b[:, 4:8]) << 4)
    return q, _half(b, 0), _half(b, 2)


def _q8_0(b: Tensor) -> tuple[Tensor, Tensor, None]:
    return b[:, 2:].contiguous().view(torch.int8), _half(b, 0), None


def _q2_k(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales = b[:, :16]
    step = _half(b, 80) * (scales & 15).float()
    return _pairs(b[:, 16:80], 32), step, -(_half(b, 82) * (scales >> 4).float())


def _q3_k(b: Tensor) -> tuple[Tensor, Tensor, None]:
    # The highest bit is stored inverted: q - 4 where it is 0.
    high = _bits(b[:, :32]).to(torch.int8)
    q = _pairs(b[:, 32:96], 32).to(torch.int8) - 4 * (1 - high)
    low, top = b[:, 96:104], b[:, 104:108]
    low = torch.cat((low & 15, low >> 4), 1)
    top = torch.cat([(top >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    scales = (low | (top << 4)).float() - 32
    return q, _half(b, 108) * scales, None


def _q4_k(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales, minimums = _six_bits(b[:, 4:16])
    return _nibbles(b[:, 16:], 32), _half(b, 0) * scales, -(_half(b, 2) * minimums)


def _q5_k(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales, minimums = _six_bits(b[:, 4:16])
    q = _nibbles(b[:, 48:], 32) | (_bits(b[:, 16:48]) << 4)
    return q, _half(b, 0) * scales, -(_half(b, 2) * minimums)


def _q6_k(b: Tensor) -> tuple[Tensor, Tensor, None]:
    q = _nibbles(b[:, :128], 64) | (_pairs(b[:, 128:192], 32) << 4)
    scales = b[:, 192:208].contiguous().view(torch.int8).float()
    return q.to(torch.int8) - 32, _half(b, 208) * scales, None


BLOCKS = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", 32, 18, 32, 4, True, _q4_0),
        BlockType("Q4_1", 32, 20, 32, 4, False, _q4_1),
        BlockType("Q5_0", 32, 22, 32, 5, True, _q5_0),
        BlockType("Q5_1", 32, 24, 32, 5, False, _q5_1),
        BlockType("Q8_0", 32, 34, 32, 8, True, _q8_0),
        BlockType("Q2_K", 256, 84, 16, 2, False, _q2_k),
        BlockType("Q3_K", 256, 110, 16, 3, True, _q3_k),
        BlockType("Q4_K", 256, 144, 32, 4, False, _q4_k),
        BlockType("Q5_K", 256, 176, 32, 5, False, _q5_k),
        BlockType("Q6_K", 256, 210, 16, 6, True, _q6_k),
    )
}

__all__ = ["BLOCKS", "BlockType", "Blocks"]
