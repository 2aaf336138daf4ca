"""Weight formats: canonical integers on disk, integers packed for the kernels in memory.

A format is one object that converts between the two forms. A layer class names its format in
:attr:`torchquant.nn.base.QuantizedModule.weight_format`. The base class packs, unpacks, moves,
saves and loads through the format, so no other Python file depends on a layout. ``csrc/formats``
describes the layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant import ops

__all__ = ["INT8", "INT8_CONV", "ConvFormat", "WeightFormat"]


class WeightFormat:
    """A packed format of integer weights; subclasses define all methods except ``empty``.

    The canonical form is one tensor, ``qweight``, which does not depend on a device or a layout.
    The packed form is also one tensor, in the layout that the kernels of its device use.

    Example:
        >>> INT8.canonical((2, 64))
        (torch.int8, (2, 64))
    """

    name: str

    def canonical(self, shape: Sequence[int]) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of ``qweight`` for a weight of ``shape``."""
        raise self._missing("canonical")

    def pack(self, qweight: Tensor) -> Tensor:
        """The packed form of ``qweight``, a new tensor on the same device."""
        raise self._missing("pack")

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        """The ``qweight`` from which :meth:`pack` made ``packed``."""
        raise self._missing("unpack")

    def empty(self, shape: Sequence[int], device: torch.device | str | None) -> Tensor:
        """A packed weight of the given shape, filled with zeros."""
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


@dataclass(frozen=True)
class ConvFormat(WeightFormat):
    """int8 ``[O, C / groups, kh, kw]`` or ``[O, C / groups, k]``: the weight of a convolution.

    The layout depends on the number of groups (``csrc/formats``); the name in files does not,
    because a layer stores its groups itself.

    Args:
        groups: the number of groups, which divides O.

    Example:
        >>> ConvFormat(groups=2).canonical((8, 4, 3, 3))
        (torch.int8, (8, 4, 3, 3))
    """

    groups: int = 1

    name = "int8_conv"

    def canonical(self, shape: Sequence[int]) -> tuple[torch.dtype, tuple[int, ...]]:
        return torch.int8, tuple(shape)

    def pack(self, qweight: Tensor) -> Tensor:
        return ops.pack_conv_weight(qweight, self.groups)

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        return ops.unpack_conv_weight(packed, list(shape), self.groups)


INT8 = _Int8()
INT8_CONV = ConvFormat()
