"""Which int8 values share a scale, and which of them are rounded and observed.

Values that pass through unchanged share the scale of what they are made from, and so do the parts
of a concatenation that nothing else reads: no integer changes, and no part is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from torchquant.chains.operations import (
    AdaptiveMaxPool,
    Channels,
    Concat,
    Crop,
    Flatten,
    Layer,
    MaxPool,
    Operation,
    Other,
    Pad,
    PixelShuffle,
    Shape,
    Upsample,
)
from torchquant.configs import Float, Static

_WHOLE = (Flatten, Upsample, Pad, PixelShuffle)  # no value is left out
_MAXIMA = (MaxPool, AdaptiveMaxPool)
PASSING = (*_WHOLE, *_MAXIMA, Channels, Crop)


class Graph(Protocol):
    """What edges need to know of the calls."""

    operations: Sequence[Operation]
    shapes: Sequence[Shape]
    activations: Mapping[str, Static]
    count: int
    live: set[int]
    int8: set[int]
    readers: list[list[int]]
    forced: dict[int, tuple[str, Static | Float]]

    def operands(self, index: int) -> tuple[int, ...]:
        """The results that a call computes with."""


class Edges:
    """The int8 values in groups that share a scale.

    Args:
        graph: the calls, with the int8 values among their results.
    """

    def __init__(self, graph: Graph) -> None:
        self.operations, self.shapes = graph.operations, graph.shapes
        self.activations, self.operands = graph.activations, graph.operands
        self.count, self.readers = graph.count, graph.readers
        self.live, self.int8, self.forced = graph.live, graph.int8, graph.forced
        self.parents = {index: index for index in self.int8}
        self._share()
        self._share_parts()

    def _share(self) -> None:
        inputs: dict[str, int] = {}
        for index in sorted(self.live):
            operation = self.operations[index]
            passing = isinstance(operation, PASSING)
            moving = isinstance(operation, Other) and operation.moves
            if (passing or moving) and index in self.int8:
                for read in self.operands(index):
                    if read in self.int8:
                        self._unite(index, read)
            if isinstance(operation, Layer) and self.operands(index)[0] in self.int8:
                read = self.operands(index)[0]
                self._unite(read, inputs.setdefault(operation.path, read))

    def _share_parts(self) -> None:
        """Let parts that only concatenations read have the scale of the whole: nothing is copied.

        A layer with fewer bits, or with another quantization, would change more than its input.
        """
        for index in sorted(self.int8):
            if not isinstance(self.operations[index], Concat):
                continue
            for read in dict.fromkeys(self.operands(index)):
                alone = read in self.int8 and all(
                    reader in self.int8 and isinstance(self.operations[reader], Concat)
                    for reader in self.readers[read]
                )
                if not alone:
                    continue
                edges = {self.find(read), self.find(index)}
                own = {self.activations[path] for path, edge in self.layers() if edge in edges}
                for end, (_, part) in self.forced.items():
                    if end in self.int8 and self.find(end) in edges and isinstance(part, Static):
                        own.add(part)
                if len(own) <= 1 and all(one.bits == 8 for one in own):
                    self._unite(index, read)

    def find(self, index: int) -> int:
        """The first value of the edge to which an int8 value belongs."""
        while self.parents[index] != index:
            index = self.parents[index]
        return index

    def _unite(self, first: int, second: int) -> None:
        a, b = sorted((self.find(first), self.find(second)))
        self.parents[b] = a

    def layers(self) -> Iterator[tuple[str, int]]:
        """The paths of the layers, with the first value of the edge that they read."""
        for index in sorted(self.live):
            operation = self.operations[index]
            if isinstance(operation, Layer) and self.operands(index)[0] in self.int8:
                yield operation.path, self.find(self.operands(index)[0])

    def is_seen(self, index: int) -> bool:
        """True if a layer reads all values of a result, or if only their maxima matter."""
        readers = self.readers[index]
        inside = [
            reader in self.int8 and self.find(reader) == self.find(index) for reader in readers
        ]
        for reader, same in zip(readers, inside, strict=True):
            if reader == self.count:
                continue
            operation = self.operations[reader]
            if isinstance(operation, Layer):
                return True
            whole = isinstance(operation, (*_WHOLE, Concat)) or (
                isinstance(operation, Channels)
                and len(set(operation.index)) == (self.shapes[operation.source] or (0, 0))[1]
            )
            if isinstance(operation, _MAXIMA):
                whole = all(inside) and all(
                    isinstance(self.operations[other], _MAXIMA) or self.is_seen(other)
                    for other in readers
                )
            if whole and same and self.is_seen(reader):
                return True
        return False

    def rounds(self, index: int) -> bool:
        """True if an int8 value is not made of integers of its edge already."""
        operation = self.operations[index]
        if isinstance(operation, Concat):
            edges = [self.find(r) if r in self.int8 else -1 for r in self.operands(index)]
            return any(edge != self.find(index) for edge in edges)
        moving = isinstance(operation, Other) and operation.moves
        if not (moving or isinstance(operation, PASSING)):
            return True
        return not all(read in self.int8 for read in self.operands(index)[:1])
