"""Weight formats: canonical integers on disk, packed for the kernels in memory.

A format is one object that converts between the two. A module names its format once
(:attr:`torchquant.nn.base.QuantizedModule.weight_format`); the base class packs, unpacks, moves,
saves and loads through it, so no other Python file depends on a layout. The layouts themselves are
pictured in ``csrc/formats``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchquant import ops

__all__ = ["INT8", "WeightFormat"]


class WeightFormat:
    """How integers of a weight are packed; subclasses override all methods.

    The canonical form is one tensor, ``qweight``, that depends on no device and no layout. The
    packed form is one tensor too, in the layout of the kernels of the device that it is on.

    Example:
        >>> INT8.canonical((2, 64))
        (torch.int8, (2, 64))
    """

    name: str

    def canonical(self, shape: Sequence[int]) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of ``qweight`` for a weight of ``shape``."""
        raise self._missing("canonical")

    def pack(self, qweight: Tensor) -> Tensor:
        """The packed form of ``qweight``, on the same device, in memory of its own."""
        raise self._missing("pack")

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        """The ``qweight`` that :meth:`pack` was given."""
        raise self._missing("unpack")

    def empty(self, shape: Sequence[int], device: torch.device | str | None) -> Tensor:
        """A packed weight of ``shape`` whose integers are all 0."""
        dtype, size = self.canonical(shape)
        zero = torch.zeros((), dtype=dtype, device=device)
        return self.pack(zero.expand(size))

    def _missing(self, method: str) -> TypeError:
        return TypeError(f"WeightFormat: {type(self).__name__} must define {method}()")


class _Int8(WeightFormat):
    """int8 ``[N, K]``: tiles on the CPU, rows on an accelerator (``csrc/formats``)."""

    name = "int8"

    def canonical(self, shape: Sequence[int]) -> tuple[torch.dtype, tuple[int, ...]]:
        return torch.int8, tuple(shape)

    def pack(self, qweight: Tensor) -> Tensor:
        return ops.pack_weight(qweight)

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        return ops.unpack_weight(packed, *shape)


INT8 = _Int8()
