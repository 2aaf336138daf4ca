"""Which calls a step can compute, by the dimensions of their values.

To the steps, values are images. Results ``[n, c, h, w]``, ``[n, c]`` and, where convolutions make
them, ``[n, c, l]`` are images as they are. Results ``[n, h, w, c]`` of images in this order are the
same images. Other results ``[..., c]`` are rows, on which linear layers and norms work.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchquant.chains.edges import PASSING
from torchquant.chains.operations import (
    Activate,
    Add,
    Affine,
    Channels,
    Concat,
    Layer,
    Mul,
    Norm,
    Operation,
    Other,
    Same,
    Shape,
)
from torchquant.graph.trace import Trace

MIXING = (Add, Mul, Concat)


def reads_of(index: int, trace: Trace, operations: Sequence[Operation]) -> tuple[int, ...]:
    """The results that a call computes with, identities among them; sizes are not.

    Example:
        >>> from torchquant.graph.trace import Call, Ref
        >>> calls = Call("input", "x"), Call("method", "size", (Ref(0),))
        >>> calls = *calls, Call("method", "view", (Ref(0), Ref(1)))
        >>> reads_of(2, Trace(calls, Ref(2), ("x",), {}, ()), [Same(), Same(), Same()])
        (0,)
    """
    operation, reads = operations[index], trace.calls[index].reads()
    if isinstance(operation, (Affine, Norm, Channels)):
        return (operation.source,)
    return reads if isinstance(operation, (*MIXING, Other)) else reads[:1]


class Layouts:
    """The dimensions of the results.

    Args:
        trace: the calls.
        operations: what they compute.
        shapes: the shapes of their results.
        sources: the result that each result is, without identities.

    Attributes:
        able: for each call whether a step can compute it from integers, or from floats.
        rows: the values ``[..., c]`` of more than two dimensions.
        last: the results ``[n, h, w, c]`` of calls that were given images in this order.
        in_float: why a call that a step could compute does not, by its index.
    """

    def __init__(
        self,
        trace: Trace,
        operations: Sequence[Operation],
        shapes: Sequence[Shape],
        sources: Sequence[int],
    ) -> None:
        self.trace, self.operations, self.shapes = trace, operations, shapes
        self.sources = sources
        self.in_float: dict[int, str] = {}
        self.rows: set[int] = set()
        self.last = self._last()
        self.sequences = self._has_sequences()
        self.able = self._able()

    def _operands(self, index: int) -> tuple[int, ...]:
        reads = reads_of(index, self.trace, self.operations)
        return tuple(self.sources[read] for read in reads)

    def _last(self) -> set[int]:
        """The results ``[n, h, w, c]`` of calls that were given images in this order."""
        found: set[int] = set()
        for index, operation in enumerate(self.operations):
            known = any(read in found for read in reads_of(index, self.trace, self.operations))
            if isinstance(operation, Same) and operation.last is not None:
                known = operation.last
            if known and self._rank(index) == 4 and not isinstance(operation, Other):
                found.add(index)
        return found

    def _has_sequences(self) -> bool:
        """True if three dimensions mean [n, c, l] here: a convolution makes such values.

        One image [c, h, w] without a batch has three dimensions, too.
        """
        return any(
            isinstance(operation, Layer)
            and not operation.linear
            and operation.rank == self._rank(index) == 3
            for index, operation in enumerate(self.operations)
        )

    def _rank(self, index: int) -> int:
        shape = self.shapes[index]
        return 0 if shape is None else len(shape)

    def _able(self) -> list[bool]:
        """For each call whether a step can compute it from integers, or from quantized floats."""
        able: list[bool] = []
        for index, operation in enumerate(self.operations):
            if isinstance(operation, (Same, Other)):
                able.append(isinstance(operation, Same) and able[self.sources[index]])
                continue
            ranks = {self._rank(index), *map(self._rank, self._operands(index))}
            allowed = {2, 4, 3} if self.sequences else {2, 4}
            if isinstance(operation, Norm):
                allowed = {2}
            if isinstance(operation, Layer):
                allowed = {operation.rank}
            if any(read in self.last for read in reads_of(index, self.trace, self.operations)):
                able.append(self._is_last(index, able))
                if not able[-1]:
                    self.in_float[index] = "its values are [n, h, w, c]"
            elif self._is_of_rows(index, ranks, able):
                self.rows.add(index)
                able.append(True)
            elif isinstance(operation, Affine) and operation.dim not in (None, 1):
                self.in_float[index] = (
                    f"it has a number for each place in dimension {operation.dim}"
                )
                able.append(False)
            elif not ranks <= allowed or self.rows.intersection(self._operands(index)):
                self.in_float[index] = f"its values have {max(ranks)} dimensions"
                able.append(False)
            elif isinstance(operation, (Layer, Affine, Norm, *PASSING)):
                able.append(True)
            else:
                able.append(any(able[read] for read in self._operands(index)))
        return able

    def _is_of_rows(self, index: int, ranks: set[int], able: Sequence[bool]) -> bool:
        """True if a step can compute the call on rows ``[..., c]`` of more than two dimensions."""
        operation, reads = self.operations[index], self._operands(index)
        if self.sequences or len(ranks) != 1 or min(ranks) < 3:
            return False
        if any(able[read] and read not in self.rows for read in reads):
            return False  # an image
        if isinstance(operation, Layer):
            return operation.linear
        if isinstance(operation, Affine):
            return operation.dim in (None, min(ranks) - 1)
        if isinstance(operation, Norm):
            return True
        return isinstance(operation, (Activate, Add)) and any(read in self.rows for read in reads)

    def _is_last(self, index: int, able: Sequence[bool]) -> bool:
        """True if a step can compute the call on images whose channels are the last dimension."""
        operation, reads = self.operations[index], reads_of(index, self.trace, self.operations)
        if not all(read in self.last and able[read] for read in reads):
            return False
        if isinstance(operation, Layer):
            return operation.linear
        if isinstance(operation, Affine):
            return operation.dim in (None, 3)
        same = all(self.shapes[read] == self.shapes[index] for read in reads)
        return same and isinstance(operation, (Activate, Norm, Add, Mul))
