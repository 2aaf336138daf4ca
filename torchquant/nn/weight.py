"""Weight formats: canonical tensors on disk, integers packed for the kernels in memory.

A format is one object that converts between the two forms. A layer class names its format in
:attr:`torchquant.nn.base.QuantizedModule.weight_format`. The base class packs, unpacks, moves,
saves and loads through the format, so no other Python file depends on a layout. ``csrc/formats``
describes the layouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant import ops
from torchquant.functional import _bits

__all__ = ["INT8", "INT8_CONV", "INTX", "ConvFormat", "IntxFormat", "WeightFormat"]

Described = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor


class WeightFormat:
    """A packed format of integer weights.

    The canonical form does not depend on a device or a layout. The packed form is one tensor, in
    the layout that the kernels of its device use.

    Most formats pack one canonical tensor, ``qweight``; their classes define ``canonical``,
    ``pack`` and ``unpack``. A format that packs several (integers, scales, zero points) names them
    in ``tensors`` and defines ``canonical_tensors``, ``pack_tensors`` and ``unpack_tensors``.

    Example:
        >>> INT8.canonical((2, 64))
        (torch.int8, (2, 64))
    """

    name: str

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the canonical tensors that the packed form holds, ``qweight`` first."""
        return ("qweight",)

    def canonical_tensors(self, shape: Sequence[int]) -> dict[str, Described]:
        """Dtype and shape of each of ``tensors`` for a weight of ``shape``."""
        return {"qweight": self.canonical(shape)}

    def pack_tensors(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """The packed form of the canonical tensors of a weight of ``shape``, on their device.

        Raises:
            ValueError: no weight has these values.
        """
        return self.pack(tensors["qweight"])

    def unpack_tensors(self, packed: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
        """The canonical tensors from which :meth:`pack_tensors` made ``packed``."""
        return {"qweight": self.unpack(packed, shape)}

    def canonical(self, shape: Sequence[int]) -> Described:
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
        return self.pack_tensors(
            {
                name: torch.zeros((), dtype=dtype, device=device).expand(size)
                for name, (dtype, size) in self.canonical_tensors(shape).items()
            },
            shape,
        )

    def _missing(self, method: str) -> TypeError:
        return TypeError(f"WeightFormat: {type(self).__name__} must define {method}()")


class _Int8(WeightFormat):
    """int8 ``[N, K]``: tiles on the CPU, rows on an accelerator (``csrc/formats``)."""

    name = "int8"

    def canonical(self, shape: Sequence[int]) -> Described:
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

    def canonical(self, shape: Sequence[int]) -> Described:
        return torch.int8, tuple(shape)

    def pack(self, qweight: Tensor) -> Tensor:
        return ops.pack_conv_weight(qweight, self.groups)

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        return ops.unpack_conv_weight(packed, list(shape), self.groups)


@dataclass(frozen=True)
class IntxFormat(WeightFormat):
    """Integers of 2 to 8 bits ``[N, K]`` with their scales and zero points.

    ``qweight`` holds rows of bits (:func:`torchquant.functional.pack_integers`). The packed form
    holds everything that a kernel reads (``csrc/formats/intx_tiles.h``).

    Args:
        bits: 2 to 8.
        group_size: the inputs that share a scale; None: one scale per output channel.
        has_zero_point: whether each scale has a zero point.

    Example:
        >>> for name, described in IntxFormat(4, 32).canonical_tensors((8, 100)).items():
        ...     print(name, *described)
        qweight torch.uint8 (8, 50)
        qweight_scale torch.float32 (8, 4)
    """

    bits: int = 4
    group_size: int | None = None
    has_zero_point: bool = False

    name = "intx"

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the canonical tensors that the packed form holds."""
        zero_point = ("qweight_zero_point",) if self.has_zero_point else ()
        return ("qweight", "qweight_scale", *zero_point)

    def canonical(self, shape: Sequence[int]) -> Described:
        return torch.uint8, (shape[0], (shape[1] * self.bits + 7) // 8)

    def canonical_tensors(self, shape: Sequence[int]) -> dict[str, Described]:
        size = self.group_size
        groups = (shape[0],) if size is None else (shape[0], -(-shape[1] // size))
        described = (self.canonical(shape), (torch.float32, groups), (torch.int8, groups))
        return dict(zip(self.tensors, described, strict=False))

    def pack_tensors(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        integers = _bits.unpack(tensors["qweight"], self.bits, shape[1])
        return self.pack_integers(
            integers, tensors["qweight_scale"], tensors.get("qweight_zero_point")
        )

    def unpack_tensors(self, packed: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
        integers, *rest = self.unpack_integers(packed, shape)
        rows = _bits.pack(integers, self.bits)
        return dict(zip(self.tensors, (rows, *rest), strict=False))

    def pack_integers(self, integers: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """The packed form of int8 ``[N, K]``; zero_point is None unless ``has_zero_point``."""
        return ops.pack_intx_weight(
            integers, scale, zero_point, bits=self.bits, group_size=self.group_size
        )

    def unpack_integers(
        self, packed: Tensor, shape: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """int8 ``[N, K]``, scales and zero points; the latter are 0 without ``has_zero_point``."""
        return ops.unpack_intx_weight(
            packed,
            shape[0],
            shape[1],
            bits=self.bits,
            group_size=self.group_size,
            has_zero_point=self.has_zero_point,
        )


INT8 = _Int8()
INT8_CONV = ConvFormat()
INTX = IntxFormat()
