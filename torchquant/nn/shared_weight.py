"""SharedWeight: one packed weight that several layers have, such as a tied embedding and the head.

The layers hold the same tensor ``packed``. It stays one tensor in everything that changes or copies
the model: moves between devices, ``load_state_dict``, ``deepcopy``, pickles. A state dict has the
canonical tensors under the name of each layer, and they are the same tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from torchquant.nn.weight import WeightFormat


class Member(Protocol):
    """The attributes of a layer that :class:`SharedWeight` uses."""

    packed: Tensor
    shared_weight: SharedWeight | None

    @property
    def layout(self) -> WeightFormat: ...

    @property
    def weight_shape(self) -> tuple[int, ...]: ...

    def take_packed(self, packed: Tensor) -> None: ...


class SharedWeight:
    """The weight of several layers.

    Args:
        layout: the format of the packed weight.
        shape: the shape of the weight.
        packed: the packed weight.

    Example:
        >>> from torch import nn
        >>> from torchquant.nn import QuantizedEmbedding
        >>> first, second = (QuantizedEmbedding(100, 64) for _ in range(2))
        >>> share_weight([first, second])
        >>> first.packed is second.packed
        True
    """

    def __init__(self, layout: WeightFormat, shape: Sequence[int], packed: Tensor) -> None:
        self.layout, self.shape, self.packed = layout, tuple(shape), packed
        self._members: weakref.WeakSet[Any] = weakref.WeakSet()
        # The canonical tensors that were unpacked last, and `packed` at that time.
        self._source = _seen(packed)
        self._unpacked: dict[str, _Seen] = {}

    @property
    def members(self) -> list[Any]:
        """The layers that exist now."""
        return [layer for layer in self._members if layer.shared_weight is self]

    def join(self, layer: Member) -> None:
        """Let a layer have this weight."""
        layer.shared_weight = self
        self._members.add(layer)

    def moved_to(self, device: torch.device, old: Tensor) -> Tensor | None:
        """What a layer's ``old`` became when another layer moved the weight to ``device``."""
        present = self.packed
        return present if present is not old and present.device == device else None

    def moved(self, old: Tensor, new: Tensor) -> None:
        """A layer has replaced ``old`` by ``new``; on the same device, all layers do."""
        if new is self.packed:
            return
        self.packed = new
        for layer in self.members:
            if layer.packed is old and old.device == new.device:
                layer.take_packed(new)

    def replace(self, packed: Tensor) -> None:
        """Give all layers another packed weight."""
        self.packed = packed
        for layer in self.members:
            layer.take_packed(packed)

    def unpacked(self) -> dict[str, Tensor]:
        """The canonical tensors: those that were returned before, if they are still in use.

        Tensors that somebody has changed since are not returned again.
        """
        found = {name: _unchanged(seen) for name, seen in self._unpacked.items()}
        present = {name: tensor for name, tensor in found.items() if tensor is not None}
        source = None if self.packed.is_inference() else _unchanged(self._source)
        if present and len(present) == len(found) and source is self.packed:
            return present
        new = self.layout.unpack_tensors(self.packed, self.shape)
        self._source = _seen(self.packed)
        self._unpacked = {name: _seen(tensor) for name, tensor in new.items()}
        return new

    def __getstate__(self) -> dict[str, Any]:
        tensors = self.layout.unpack_tensors(self.packed, self.shape)
        return {"layout": self.layout, "shape": self.shape, "tensors": tensors}

    def __setstate__(self, state: dict[str, Any]) -> None:
        layout, shape = state["layout"], state["shape"]
        SharedWeight.__init__(self, layout, shape, layout.pack_tensors(state["tensors"], shape))

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedWeight:
        copied = SharedWeight(self.layout, self.shape, self.packed.clone())
        memo[id(self)] = copied
        return copied


def share_weight(layers: Sequence[Any]) -> None:
    """Let all layers have the weight of the first, which has the same values.

    Args:
        layers: layers of one format, shape and device.

    Raises:
        ValueError: formats, shapes, devices or values differ.

    Example:
        >>> from torchquant.nn import QuantizedEmbedding, QuantizedIntxLinear
        >>> from torchquant import Int8WeightOnlyConfig
        >>> embedding = QuantizedEmbedding(100, 64)
        >>> head = QuantizedIntxLinear(64, 100, config=Int8WeightOnlyConfig())
        >>> share_weight([embedding, head])
        >>> head.packed.data_ptr() == embedding.packed.data_ptr()
        True
    """
    first, *others = layers
    for layer in others:
        if not has_same_weight(first, layer):
            raise ValueError(
                "share_weight: layers must have the same weight in the same format and on the same "
                f"device, got {first} and {layer}"
            )
    shared = first.shared_weight or SharedWeight(first.layout, first.weight_shape, first.packed)
    for layer in layers:
        shared.join(layer)
        layer.take_packed(shared.packed)


def has_same_weight(first: Any, second: Any) -> bool:
    """True if two quantized layers have the same integers, scales and zero points in one format.

    Example:
        >>> from torchquant.nn import QuantizedEmbedding
        >>> has_same_weight(QuantizedEmbedding(8, 4), QuantizedEmbedding(8, 5))
        False
    """
    if (first.layout, first.weight_shape) != (second.layout, second.weight_shape):
        return False
    ours, theirs = first.packed, second.packed
    if ours is theirs or (ours.is_meta and theirs.is_meta):
        return True
    return ours.device == theirs.device and torch.equal(ours, theirs)


_Seen = tuple[weakref.ReferenceType[Tensor], int | None]


def _seen(tensor: Tensor) -> _Seen:
    """A tensor and the number of its changes until now, or None if it does not count them."""
    return weakref.ref(tensor), None if tensor.is_inference() else tensor._version


def _unchanged(seen: _Seen) -> Tensor | None:
    """The tensor, if it still exists and has not changed since, as far as it counts changes."""
    tensor, version = seen[0](), seen[1]
    same = tensor is not None and (version is None or tensor._version == version)
    return tensor if same else None


__all__ = ["SharedWeight", "has_same_weight", "share_weight"]
