"""Comparing torchquant_aten, the operators in plain ATen, with the CPU's kernels.

The same calls run on a GPU where there is one: what is device-generic is tested on both.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import torchquant.ops  # noqa: F401  (registers the operators)
from support import assert_same_bits, integers

KERNELS, ATEN = torch.ops.torchquant, torch.ops.torchquant_aten
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@dataclass(frozen=True, eq=False)
class Packed:
    """Stands for the packed weights, one after the other: each namespace has its own layout."""

    weights: tuple[Tensor, ...]

    @property
    def canonical(self) -> dict[str, Tensor | None]:
        """The specification's arguments in its place."""
        return {"weight": torch.cat(self.weights)}

    def by(self, namespace: Any, device: str) -> Tensor:
        return torch.cat([namespace.pack_weight(moved(w, device)) for w in self.weights])


@dataclass(frozen=True, eq=False)
class PackedConv(Packed):
    """The packed weight of a convolution."""

    groups: int

    def by(self, namespace: Any, device: str) -> Tensor:
        (weight,) = self.weights
        return namespace.pack_conv_weight(moved(weight, device), self.groups)


@dataclass(frozen=True, eq=False)
class PackedIntx(Packed):
    """A packed weight of 2 to 8 bits; it holds its scales and zero points."""

    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int | None

    @property
    def canonical(self) -> dict[str, Tensor | None]:
        (weight,) = self.weights
        scales = {"weight_scale": self.scale, "weight_zero_point": self.zero_point}
        return {"weight": weight, **scales}

    def by(self, namespace: Any, device: str) -> Tensor:
        tensors = [None if t is None else moved(t, device) for t in self.canonical.values()]
        return namespace.pack_intx_weight(*tensors, self.bits, self.group_size)


def packed(*weights: Tensor) -> Packed:
    return Packed(weights)


def moved(tensor: Tensor, device: str) -> Tensor:
    """The tensor on ``device``, with its strides and its offset."""
    if device == "cpu":
        return tensor
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def arguments(namespace: Any, device: str, *args: Any, **kwargs: Any) -> Any:
    """Arguments for one namespace on one device, as ``(args, kwargs)``."""

    def convert(value: Any) -> Any:
        if isinstance(value, Packed):
            return value.by(namespace, device)
        return moved(value, device) if isinstance(value, Tensor) else value

    return [convert(a) for a in args], {name: convert(a) for name, a in kwargs.items()}


def flat(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def check_same(name: str, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """``torchquant_aten``'s operator gives the CPU kernel's bits; returns them."""
    positional, named = arguments(KERNELS, "cpu", *args, **kwargs)
    expected = flat(getattr(KERNELS, name)(*positional, **named))
    for device in DEVICES:
        positional, named = arguments(ATEN, device, *args, **kwargs)
        got = flat(getattr(ATEN, name)(*positional, **named))
        assert len(got) == len(expected)
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert a.device.type == device and a.is_contiguous()
            assert_same_bits(a.cpu(), b, (name, device, i))
    return expected


def zeros_of(count: int, seed: int, dtype: torch.dtype = torch.int8) -> Tensor:
    """Zero points, int32, of the range of ``dtype``."""
    return integers(count, seed=seed, dtype=dtype).to(torch.int32)
