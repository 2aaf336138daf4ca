"""What peers of the low-bit benchmark share: a layer in a format, and copies that take turns."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch

from torchquant.bench.lowbit_shapes import copies
from torchquant.bench.peers.base import Call

T = TypeVar("T")


class NoSuchFormat(RuntimeError):
    """A format that a library has not."""


@dataclass(frozen=True)
class LowbitLayer:
    """A float layer without bias, and the format in which a peer is to store it.

    `group_size` None: one scale per output channel. `cold`: the weights must not be in a cache.
    """

    weight: torch.Tensor
    bits: int
    group_size: int | None
    cold: bool

    def repeat(self, layer_bytes: int, make: Callable[[], T]) -> list[T]:
        """One layer; for cold weights as many as do not fit into the caches together."""
        return [make() for _ in range(copies(layer_bytes) if self.cold else 1)]


class LowbitPeer(ABC):
    """One library's layer with weights of few bits. Each instance lives alone in its own process.

    Quantizing and packing the weight is not part of a call; it happens once, in `load`.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @abstractmethod
    def load(self, layer: LowbitLayer) -> None:
        """Convert a float layer.

        Raises:
            NoSuchFormat: the library does not have it.
        """

    @abstractmethod
    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        """Ways of applying the loaded layer to fp32 `x` `[M, K]`, by name; the fastest one counts.

        Each call returns `[M, N]` as a tensor or an array.
        """

    @abstractmethod
    def about(self) -> dict[str, str]:
        """Version, engine and instruction set, for readers of the results."""


class SameForAllFormats(LowbitPeer):
    """A peer whose weight does not depend on the format: it is converted once per layer."""

    _loaded: tuple[torch.Tensor, bool] | None = None

    def load(self, layer: LowbitLayer) -> None:
        loaded = self._loaded
        if loaded is not None and loaded[0] is layer.weight and loaded[1] == layer.cold:
            return
        self.convert(layer)
        self._loaded = layer.weight, layer.cold

    @abstractmethod
    def convert(self, layer: LowbitLayer) -> None:
        """Convert a float layer, whatever its format."""


def in_turn(calls: Iterable[Call]) -> Call:
    """A call that is the next one of `calls` every time.

    >>> call = in_turn([lambda: "a", lambda: "b"])
    >>> call(), call(), call()
    ('a', 'b', 'a')
    """
    made = list(calls)
    if len(made) == 1:
        return made[0]
    following = itertools.cycle(made).__next__
    return lambda: following()()
