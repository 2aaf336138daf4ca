"""Runs one record of a region in training, with its int8 values rounded as in deployment.

The interpreter calls layers as modules. This module decides what happens at each call: a value is
observed and rounded once, right after the call that makes it; a layer that reads it multiplies its
integers and does not round again; averages and activations have the bits of the kernels. Gradients
pass straight through the roundings.

Where a dropout is active between a value and a layer, the value was rounded before, as in
deployment, and the layer multiplies what the dropout left of it in float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchquant.chains.averages import average
from torchquant.chains.edges import PASSING
from torchquant.chains.guard import reads_mode
from torchquant.chains.interpreter import Interpreter, Substitute, runs_hooks
from torchquant.chains.modes import Record
from torchquant.chains.normalize import normalizing
from torchquant.chains.operations import (
    Activate,
    AdaptiveAvgPool,
    AvgPool,
    Channels,
    Concat,
    Layer,
    Other,
    Same,
    Shape,
)
from torchquant.chains.plan import Plan
from torchquant.chains.rounding import FLOATS, activated
from torchquant.nn.base import Rounding, TrainedModule
from torchquant.nn.qat_parts import observe, rounded

_ALWAYS = nn.Dropout()  # stands for a functional dropout of a record of training mode


@dataclass(frozen=True)
class Place:
    """Where the quantizer of an int8 value is.

    Args:
        path: the layer that holds it.
        key: "" for the quantizer of the layer's input; otherwise as in
            :mod:`torchquant.nn.value_quantizers`.
    """

    path: str
    key: str = ""


class Simulated(Protocol):
    """What a simulation needs of a region."""

    root: nn.Module

    def quantizer_at(self, place: Place) -> Any:
        """The quantizer at a place."""

    def qparams_at(self, place: Place) -> tuple[Tensor, Tensor]:
        """Scale and zero point of its values in deployment."""


class Simulation:
    """One record with its plan.

    Args:
        region: gives the quantizers.
        record: the calls.
        plan: which of their results are int8.
        shapes: the shapes of the results in the first batch.
        places: for each edge of the plan, where its quantizer is; None for values that are not
            rounded in deployment.
    """

    def __init__(
        self,
        region: Simulated,
        record: Record,
        plan: Plan,
        shapes: Sequence[Shape],
        places: Sequence[Place | None],
    ) -> None:
        self.region, self.record, self.plan, self.places = region, record, plan, places
        self.shapes = shapes
        self.calls = record.trace.calls
        self.modules: dict[str, nn.Module] = {
            call.target: region.root.get_submodule(call.target)
            for call in self.calls
            if call.kind == "module"
        }
        self.layers: dict[str, TrainedModule] = {
            path: layer
            for path in plan.layers
            if isinstance(layer := self.modules[path], TrainedModule)
        }
        self.drops = {index for index in range(len(self.calls)) if self._may_drop(index)}
        self.in_place = self._in_place()
        self.points = {
            index for index in self._rounded() if self.places[plan.edge_of[index]] is not None
        }
        # Values that one layer alone reads: the layer rounds them. In bfloat16 it does not, because
        # the deployed region rounds to multiples of the scale in bfloat16 before the layer does.
        self.direct = set(self._direct())
        self.fusing = self.quantizing = True
        self.interpreter = Interpreter(
            record.trace, region.root, dict(self._substitutes()), self._points()
        )
        scopes = [module for _, module in self.interpreter.scopes]
        self.watched = [*self.interpreter.modules.values(), *scopes]

    def __call__(self, inputs: Sequence[Any]) -> Any:
        """The result of the forward."""
        # Without hooks, nobody sees the output of a layer before its ReLU.
        self.fusing = not any(runs_hooks(module) for module in self.watched)
        self.quantizing = any(layer._quantizing for layer in self.layers.values())
        return self.interpreter(inputs)

    # ------------------------------------------------------------ values

    def _points(self) -> dict[int, Callable[[Tensor], Tensor]]:
        return {index: self._point(index) for index in self.points}

    def _rounded(self) -> set[int]:
        """The values that are observed and rounded: concatenations instead of their parts.

        While a range is still learned, each part would be rounded with another scale.
        """
        whole = {
            index
            for index in self.plan.edge_of
            if index in self.plan.live and isinstance(self.plan.operations[index], Concat)
        }
        readers = self.record.trace.readers()
        return {one for one in whole | self.plan.points if not self._is_part(one, one, readers)}

    def _is_part(self, index: int, point: int, readers: list[list[int]]) -> bool:
        """True if a value only becomes part of concatenations that have its scale."""
        edges = self.plan.edge_of
        for reader in readers[index]:
            operation = self.plan.operations[reader] if reader < len(self.calls) else None
            joins = isinstance(operation, Concat) and edges.get(reader) == edges[point]
            passes = isinstance(operation, Same) or (
                isinstance(operation, PASSING) and edges.get(reader) == edges[point]
            )
            if not joins and not (passes and self._is_part(reader, point, readers)):
                return False
        return bool(readers[index])

    def _point(self, index: int) -> Callable[[Tensor], Tensor]:
        edge = self.plan.edge_of[index]
        place = self.places[edge]
        assert place is not None
        readers, direct = self._readers(edge), index in self.direct

        def point(value: Tensor) -> Tensor:
            if direct and value.dtype is torch.float32:
                return value
            quantizer = self.region.quantizer_at(place)
            if readers and not any(layer._quantizing for layer in readers):
                observe(quantizer, value)
                return value
            return rounded(quantizer, value)

        return point

    def _readers(self, edge: int) -> list[TrainedModule]:
        return [self.layers[path] for path, one in self.plan.layers.items() if one == edge]

    def _direct(self) -> Iterator[int]:
        """The values that exactly one call of one layer reads, and nothing else does."""
        readers = self.record.trace.readers()
        counts: dict[int, int] = {}
        for index in self.points:
            edge = self.plan.edge_of[index]
            counts[edge] = counts.get(edge, 0) + 1
        for index in self.points:
            found, waiting = [], [index]
            while waiting:
                for reader in readers[waiting.pop()]:
                    same = reader < len(self.calls) and isinstance(
                        self.plan.operations[reader], Same
                    )
                    if same and reader not in self.drops:
                        waiting.append(reader)
                    else:
                        found.append(reader)
            if len(found) != 1 or found[0] >= len(self.calls):
                continue
            operation = self.plan.operations[found[0]]
            if isinstance(operation, Layer) and counts[self.plan.edge_of[index]] == 1:
                yield index

    # ------------------------------------------------------------ what a dropout left

    def _may_drop(self, index: int) -> bool:
        """True if a call that deployment does not make may drop values in training."""
        if index in self.record.drops:
            return True
        call = self.calls[index]
        return (
            call.kind == "module"
            and isinstance(self.plan.operations[index], Same)
            and reads_mode(self.modules[call.target])
        )

    def _droppers(self, index: int) -> list[nn.Module]:
        """The modules that may drop elements of a result after it was rounded."""
        found: list[nn.Module] = []
        while True:
            operation, call = self.plan.operations[index], self.calls[index]
            found += self.in_place.get(index, ())
            if index in self.points:
                return found
            if index in self.drops:
                found.append(self.modules[call.target] if call.kind == "module" else _ALWAYS)
            moving = isinstance(operation, Other) and operation.moves
            if not moving and not isinstance(operation, (Same, *PASSING)):
                return found
            index = operation.source if isinstance(operation, Channels) else call.reads()[0]

    def _in_place(self) -> dict[int, list[nn.Module]]:
        """Modules that drop in place, by the results that they change."""
        found: dict[int, list[nn.Module]] = {}
        for index, call in enumerate(self.calls):
            if call.kind != "module" or index not in self.drops:
                continue
            if getattr(self.modules[call.target], "inplace", False):
                source = call.reads()[0]
                found.setdefault(source, []).append(self.modules[call.target])
                while isinstance(self.plan.operations[source], Same):
                    source = self.calls[source].reads()[0]
                    found.setdefault(source, []).append(self.modules[call.target])
        return found

    # ------------------------------------------------------------ calls

    def _substitutes(self) -> Iterator[tuple[int, Substitute]]:
        fused = dict(self._fused())
        for index, operation in enumerate(self.plan.operations):
            if index not in self.plan.live:
                continue
            if isinstance(operation, Layer) and operation.path in self.layers:
                yield index, self._layer(index, operation, index in fused)
            elif isinstance(operation, Activate):
                yield index, self._activation(operation.function, index in fused.values())
            elif isinstance(operation, (AvgPool, AdaptiveAvgPool)) and index in self.plan.groups:
                edge = self.plan.edge_of.get(self.plan.groups[index].operands[0])
                if edge is None:
                    yield index, self._float_average(operation)
                elif self.places[edge] is not None:
                    yield index, self._average(index, operation)
        for group in self.plan.groups.values():
            index = group.calls[0]
            operation, trace = self.plan.operations[index], self.record.trace
            norm = normalizing(trace, self.region.root, index, operation)
            if norm is not None:
                yield index, self._norm(norm, self.modules.get(self.calls[index].target))

    def _fused(self) -> Iterator[tuple[int, int]]:
        """Layers that apply the activation after them, and the calls of the activations."""
        for group in self.plan.groups.values():
            operation = self.plan.operations[group.calls[0]]
            if not isinstance(operation, Layer) or len(group.calls) != 2:
                continue
            layer, read = self.layers.get(operation.path), self.calls[group.end].reads()[0]
            plain = group.residual is None and not self._droppers(read)
            if layer is None or layer.activation != "none" or not plain:
                continue
            if group.activation in layer.fused_activations:
                yield group.calls[0], group.end

    def _layer(self, index: int, operation: Layer, fused: bool) -> Substitute:
        layer = self.layers[operation.path]
        read = self.calls[index].reads()[0]
        after = next((g.activation for g in self.plan.groups.values() if index in g.calls), "none")
        droppers = self._droppers(read)
        direct = self.plan.sources[read] in self.direct

        def call(value: Tensor) -> Tensor:
            rounding: Rounding = "own" if direct and value.dtype is torch.float32 else "done"
            if any(module.training for module in droppers):
                rounding = "none"
            activation = after if fused and self.fusing else layer.activation
            return layer.compute(value, activation, rounding)

        return call

    def _activation(self, function: str, fused: bool) -> Substitute:
        computed = activated(function)

        def call(value: Tensor, *rest: Any) -> Any:
            if not self.quantizing:
                return NotImplemented
            done = fused and self.fusing and value.dtype in FLOATS  # by the layer before it
            return value if done else computed(value)

        return call

    def _norm(self, substitute: Substitute, module: nn.Module | None) -> Substitute:
        """A norm with the bits of deployment; one that uses statistics of the batch stays."""

        def call(value: Tensor, *rest: Any) -> Any:
            batch = module is not None and module.training and reads_mode(module)
            return substitute(value, *rest) if self.quantizing and not batch else NotImplemented

        return call

    def _float_average(self, operation: AvgPool | AdaptiveAvgPool) -> Substitute:
        def averaged(value: Tensor, *rest: Any) -> Any:
            plain = not self.quantizing or value.dim() not in (3, 4)
            return NotImplemented if plain else average(value, None, None, operation)

        return averaged

    def _average(self, index: int, operation: AvgPool | AdaptiveAvgPool) -> Substitute:
        operand = self.plan.groups[index].operands[0]
        edge = self.plan.edge_of[operand]
        place, readers = self.places[edge], self._readers(edge)
        assert place is not None
        droppers = self._droppers(self.calls[index].reads()[0])
        shape = self.shapes[operand]
        rank = 0 if shape is None else len(shape)

        def averaged(value: Tensor, *rest: Any) -> Any:
            if readers:
                rounds = any(layer._quantizing for layer in readers)
            else:
                rounds = self.region.quantizer_at(place).quantizing
            dropped = any(module.training for module in droppers)
            if dropped or not rounds or value.dim() != rank:
                return NotImplemented
            return average(value, *self.region.qparams_at(place), operation)

        return averaged
