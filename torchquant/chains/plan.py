"""Which values of a recorded forward are int8, and which calls make one step.

A value is int8 if a layer with static activations reads it, or a step whose own result is int8.
Everything else stays float32. Values that pass through unchanged (max pooling, flattening, nearest
upsampling, some of the channels) share their scale with what they are made from; such a group of
values is an *edge*. The parts of a concatenation belong to its edge where nothing else reads them.

Steps on float values are in programs too, where a program makes or reads one of their values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from torchquant.chains.edges import PASSING, Edges
from torchquant.chains.layouts import Layouts, reads_of
from torchquant.chains.operations import (
    Activate,
    Add,
    Affine,
    Layer,
    Mul,
    Norm,
    Operation,
    Other,
    Same,
    Shape,
)
from torchquant.configs import Float, Static
from torchquant.graph.trace import Trace, refs


@dataclass(frozen=True)
class Group:
    """The calls of one step: a layer, then perhaps an addition, then perhaps an activation.

    Args:
        calls: the indices of the calls; the result of the last one is the step's output.
        operands: the indices of the results that the first call reads.
        residual: the index of the result that the addition reads besides, or None.
        activation: the function of the activation, or "none".
        rows: True if its values are ``[..., c]``, rows of a linear layer, and not images.
    """

    calls: tuple[int, ...]
    operands: tuple[int, ...]
    residual: int | None = None
    activation: str = "none"
    rows: bool = False

    @property
    def end(self) -> int:
        """The index of the call whose result is the step's output."""
        return self.calls[-1]

    @property
    def reads(self) -> tuple[int, ...]:
        """All results that the step reads."""
        return self.operands if self.residual is None else (*self.operands, self.residual)


@dataclass(frozen=True)
class Plan:
    """What is int8 in a region.

    Args:
        operations: what each call computes.
        sources: for each call the index of the result that is its own; an identity has its
            argument's.
        live: the calls whose results are needed.
        edges: the quantization of each edge.
        edge_of: the edge of each int8 value, by the index of its call.
        points: the int8 values that are rounded right after their call; the other int8 values only
            move integers.
        observed: the points that the region has to observe; a layer that reads one of the others
            sees all of its values.
        last: the results ``[n, h, w, c]`` that are images ``[n, c, h, w]`` to the steps.
        layers: the edge that each layer reads, by the layer's path.
        groups: the steps, by the index of their last call.
        in_float: why a call that a step could compute does not, by its index.
        dropped: layers that read no edge, and why.
        ended: the values that their layer's configuration keeps in float, and the layer's path.
    """

    operations: tuple[Operation, ...]
    sources: tuple[int, ...]
    live: frozenset[int]
    edges: tuple[Static, ...]
    edge_of: Mapping[int, int]
    points: frozenset[int]
    observed: frozenset[int]
    last: frozenset[int]
    layers: Mapping[str, int]
    groups: Mapping[int, Group]
    in_float: Mapping[int, str]
    dropped: Mapping[str, str]
    ended: Mapping[int, str]


def make_plan(
    trace: Trace,
    operations: Sequence[Operation],
    shapes: Sequence[Shape],
    activations: Mapping[str, Static],
    outputs: Mapping[str, Static | Float] = MappingProxyType({}),
) -> Plan:
    """Decide which values of a region are int8.

    Args:
        trace: the calls of the region.
        operations: what each of them computes.
        shapes: the shape of each result in the first batch.
        activations: the quantization of the activations that enter each layer, by path.
        outputs: what the configurations of some layers say about the values that leave them.

    Raises:
        ValueError: the outputs of two layers are one value, or share a scale, and have different
            configurations.
    """
    dropped: dict[str, str] = {}
    while True:
        used = {path: value for path, value in activations.items() if path not in dropped}
        known = [
            Other(f"{op.path}: {dropped.get(op.path, 'not a layer with static activations')}")
            if isinstance(op, Layer) and op.path not in used
            else op
            for op in operations
        ]
        planner = _Planner(trace, known, shapes, used, outputs)
        other = planner.conflicts()
        if not other:
            return planner.plan(dropped)
        dropped.update(other)


class _Planner:
    def __init__(
        self,
        trace: Trace,
        operations: Sequence[Operation],
        shapes: Sequence[Shape],
        activations: Mapping[str, Static],
        outputs: Mapping[str, Static | Float],
    ) -> None:
        self.trace = trace
        self.operations = operations
        self.shapes = shapes
        self.activations = activations
        self.count = len(operations)
        self.sources = self._sources()
        self.live = self._live()
        self.readers = self._readers()
        self.next: dict[int, int] = {}  # the call that becomes part of the same step
        self.residuals: dict[int, int] = {}  # by the index of the addition
        layouts = Layouts(trace, operations, shapes, self.sources)
        self.able, self.rows, self.last = layouts.able, layouts.rows, layouts.last
        self.in_float = layouts.in_float
        self._fuse_activations()
        self._fuse_additions()
        self.outputs = outputs
        self.forced = self._forced()
        self.int8 = self._int8()
        self.joined = self._joined()
        self.edges = Edges(self)

    # ------------------------------------------------------------ the graph without identities

    def operands(self, index: int) -> tuple[int, ...]:
        """The results that a call computes with; sizes are not among them."""
        return tuple(self.sources[read] for read in reads_of(index, self.trace, self.operations))

    def _sources(self) -> list[int]:
        found: list[int] = []
        for index, operation in enumerate(self.operations):
            reads = self.trace.calls[index].reads()
            found.append(found[reads[0]] if isinstance(operation, Same) else index)
        return found

    def _live(self) -> set[int]:
        waiting = [self.sources[read] for read in refs(self.trace.result)]
        live: set[int] = set()
        while waiting:
            index = waiting.pop()
            if index not in live:
                live.add(index)
                waiting += self.operands(index)
        return live

    def _readers(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in range(self.count)]
        for index in sorted(self.live):
            for read in dict.fromkeys(self.operands(index)):
                found[read].append(index)
        for read in dict.fromkeys(self.sources[r] for r in refs(self.trace.result)):
            found[read].append(self.count)
        return found

    # ------------------------------------------------------------ what is one step

    def _fuse_activations(self) -> None:
        for index in self.live:
            operation = self.operations[index]
            if isinstance(operation, (Layer, Add, Mul, Affine)) and self.able[index]:
                readers = self.readers[index]
                if len(readers) == 1 and readers[0] < self.count:
                    after = self.operations[readers[0]]
                    if isinstance(after, Activate) and self.able[readers[0]]:
                        self.next[index] = readers[0]

    def end(self, index: int) -> int:
        """The last call of the step to which a call belongs."""
        while index in self.next:
            index = self.next[index]
        return index

    # ------------------------------------------------------------ what is int8

    def _int8(self) -> set[int]:
        found: set[int] = set()
        for index in sorted(self.live, reverse=True):
            forced = self.forced.get(index, ("", None))[1]
            wanted = isinstance(forced, Static) or any(
                self._wants_int8(reader, index, found) for reader in self.readers[index]
            )
            if self.end(index) == index and wanted and not isinstance(forced, Float):
                found.add(index)
        for index in sorted(self.live):  # what passes through an int8 value unchanged is int8 too
            passing = isinstance(self.operations[index], PASSING) and self.able[index]
            if passing and self.operands(index)[0] in found:
                found.add(index)
        return found

    def _wants_int8(self, reader: int, index: int, found: set[int]) -> bool:
        if reader == self.count:
            return False
        operation = self.operations[reader]
        if isinstance(operation, Layer):
            return True
        if isinstance(operation, Norm) or not self.able[reader]:
            return False
        if isinstance(operation, Affine) and not self.able[index]:
            return False  # a float value of Python's is scaled before it is rounded
        return self.end(reader) in found

    def _joined(self) -> set[int]:
        """The last calls of steps on float values that are in programs, next to other steps."""
        starts = [
            index
            for index in sorted(self.live - set(self.next.values()))
            if self.able[index] and not isinstance(self.operations[index], (Same, Other))
        ]
        made = {
            self.end(index)
            for index in starts
            if isinstance(self.operations[index], Layer) or self.end(index) in self.int8
        }
        needed = {read for index in starts if self.end(index) in made for read in self._all(index)}
        found: set[int] = set()
        for index in reversed(starts):  # what a step reads
            if self.end(index) in needed and self.end(index) not in made:
                found.add(self.end(index))
                needed.update(self._all(index))
        for index in starts:  # what reads a step's result
            end = self.end(index)
            if end not in made and any(read in made or read in found for read in self._all(index)):
                found.add(end)
        return found

    def _all(self, index: int) -> Iterator[int]:
        """The results that a step reads, by the index of its first call."""
        yield from self.operands(index)
        while index in self.next:
            index = self.next[index]
            if index in self.residuals:
                yield self.residuals[index]

    def _forced(self) -> dict[int, tuple[str, Static | Float]]:
        """The values that configurations decide about, with the layers that they leave."""
        found: dict[int, tuple[str, Static | Float]] = {}
        for index in sorted(self.live):
            operation = self.operations[index]
            part = self.outputs.get(operation.path) if isinstance(operation, Layer) else None
            if isinstance(operation, Layer) and part is not None:
                found[self.end(index)] = (operation.path, part)
        return found

    def _fuse_additions(self) -> None:
        for index in sorted(self.live, reverse=True):
            if isinstance(self.operations[index], Add) and self.able[index]:
                self._fuse_addition(index)

    def _fuse_addition(self, index: int) -> None:
        candidates = [
            read
            for read in dict.fromkeys(self.operands(index))
            if isinstance(self.operations[read], (Layer, Affine))
            and self.able[read]
            and self.readers[read] == [index]
            and (read in self.rows) == (index in self.rows)
        ]
        if candidates and len(set(self.operands(index))) == 2:
            # The later one, and a layer rather than numbers for each channel.
            layer = max(candidates, key=lambda one: (isinstance(self.operations[one], Layer), one))
            (other,) = set(self.operands(index)) - {layer}
            self.next[layer] = index
            self.residuals[index] = other

    # ------------------------------------------------------------ the result

    def conflicts(self) -> dict[str, str]:
        """Layers that read an edge of other layers but have another quantization of activations."""
        first: dict[int, tuple[str, Static]] = {}
        found = {}
        for index, operation in enumerate(self.operations):
            source = self.operands(index)[0] if isinstance(operation, Layer) else -1
            name, part = self.forced.get(source, ("", None))
            if index in self.live and isinstance(operation, Layer) and isinstance(part, Float):
                found[operation.path] = (
                    f"it reads the output of {name}, which is configured as float"
                )
        if found:
            return found
        for index, (name, part) in self.forced.items():
            if index in self.int8 and isinstance(part, Static):
                other, known = first.setdefault(self.edges.find(index), (name, part))
                if known != part:
                    raise ValueError(
                        f"the outputs of {other} and {name} share a scale and must have one "
                        f"configuration, got {known!r} and {part!r}; give both the same output"
                    )
        for path, edge in self.edges.layers():
            own = self.activations[path]
            name, known = first.setdefault(edge, (path, own))
            if known != own:
                found[path] = f"it reads the value of {name}, which has other activations"
        return found

    def plan(self, dropped: Mapping[str, str]) -> Plan:
        layers = dict(self.edges.layers())
        chosen = {edge: self.activations[path] for path, edge in layers.items()}
        for index, (_, part) in self.forced.items():
            if index in self.int8 and isinstance(part, Static):
                chosen[self.edges.find(index)] = part
        usual = next(iter(self.activations.values()), Static())
        between = replace(usual, bits=8, narrow_range=None)  # read by no layer
        firsts = sorted({self.edges.find(index) for index in self.int8})
        numbers = {first: number for number, first in enumerate(firsts)}
        groups = {group.end: group for group in self._groups()}
        points = {index for index in self.int8 if self.edges.rounds(index)}
        return Plan(
            tuple(self.operations),
            tuple(self.sources),
            frozenset(self.live),
            tuple(chosen.get(first, between) for first in firsts),
            {index: numbers[self.edges.find(index)] for index in sorted(self.int8)},
            frozenset(points),
            frozenset(index for index in points if not self.edges.is_seen(index)),
            frozenset(self.last),
            {path: numbers[edge] for path, edge in layers.items()},
            groups,
            {index: why for index, why in self.in_float.items() if index in self.live},
            dict(dropped),
            {end: path for end, (path, part) in self.forced.items() if isinstance(part, Float)},
        )

    def _groups(self) -> Iterator[Group]:
        inner = set(self.next.values())
        for index in sorted(self.live):
            operation = self.operations[index]
            if index in inner or not self.able[index] or isinstance(operation, (Same, Other)):
                continue
            end = self.end(index)
            float_step = not isinstance(operation, Layer) and end not in self.int8
            if float_step and end not in self.joined:
                continue
            calls = [index]
            while calls[-1] in self.next:
                calls.append(self.next[calls[-1]])
            residual = next((self.residuals[c] for c in calls if c in self.residuals), None)
            last = self.operations[end]
            function = last.function if isinstance(last, Activate) else "none"
            rows = index in self.rows
            yield Group(tuple(calls), self.operands(index), residual, function, rows)
