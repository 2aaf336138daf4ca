"""What the root of a quantized region does otherwise than other modules of its class.

Its class stays, so these are attributes of the instance, beside its forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from torchquant.training.state import keeping_dtype

SCALE, ZERO_POINT = "chain_scale", "chain_zero_point"  # the buffers of a region's root


class Region(Protocol):
    """What is needed of a region."""

    root: nn.Module

    def is_intact(self) -> bool:
        """True if what the record relies on is as it was."""

    def copied_to(self, root: nn.Module) -> Region:
        """A region for a replica of the root."""


class _Method:
    """Stands for a method of the root."""

    def __init__(self, region: Region) -> None:
        self.region = region


class Apply(_Method):
    """``nn.Module._apply``: scales keep their dtype under ``.to(dtype)``, as those of layers do.

    Example:
        >>> Apply.name
        '_apply'
    """

    name = "_apply"

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Replace the tensors of the root and of its children."""
        root = self.region.root
        scale, keep = root._buffers.get(SCALE), keeping_dtype(fn)

        def apply(tensor: Tensor) -> Tensor:
            return keep(tensor) if tensor is scale else fn(tensor)

        result: nn.Module = type(root)._apply(root, apply, recurse)
        return result


class Replicate(_Method):
    """A replica, as DataParallel makes one for each device: it has a region of its own.

    Example:
        >>> Replicate.name
        '_replicate_for_data_parallel'
    """

    name = "_replicate_for_data_parallel"

    def __call__(self) -> nn.Module:
        """The replica; its children are set later."""
        root = self.region.root
        replica: nn.Module = type(root)._replicate_for_data_parallel(root)
        detach(replica)
        if self.region.is_intact():
            attach(self.region.copied_to(replica))
        return replica


_METHODS = (Apply, Replicate)
NAMES = ("forward", *(method.name for method in _METHODS))  # of the attributes


def attach(region: Region) -> None:
    """Let a region run instead of the forward of its root."""
    region.root.__dict__["forward"] = region
    for method in _METHODS:
        region.root.__dict__[method.name] = method(region)


def detach(root: nn.Module) -> None:
    """Give the root of a region the methods of its class again."""
    for name in NAMES:
        root.__dict__.pop(name, None)
