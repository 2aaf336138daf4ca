"""What only a batch can show: the sizes of all results, and that the record is right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchquant.chains.interpreter import Interpreter
from torchquant.chains.operations import Operation, Shape
from torchquant.chains.per_channel import with_numbers
from torchquant.chains.plan import Plan, make_plan
from torchquant.chains.rearrange import with_rearrangements
from torchquant.chains.recognize import operation_of
from torchquant.configs import Float, Static
from torchquant.graph.trace import Trace
from torchquant.nn.kinds import kind_of

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

_TOLERANCE = 1e-5


class FirstBatch:
    """The sizes and the arithmetic of a region in its first batch.

    Args:
        root: the module that was recorded.
        trace: the calls of its forward.

    Attributes:
        shapes: the shape of each result; None if it is no float tensor.
        flops: the floating-point operations of each call.
    """

    def __init__(self, root: nn.Module, trace: Trace) -> None:
        self.root = root
        self.trace = trace
        self.shapes: list[Shape] = []
        self.flops: list[int] = []

    @classmethod
    def known(
        cls, root: nn.Module, trace: Trace, shapes: Sequence[Shape], flops: Sequence[int]
    ) -> FirstBatch:
        """The facts of a batch that was seen before, for example from a file."""
        facts = cls(root, trace)
        facts.shapes, facts.flops = list(shapes), list(flops)
        return facts

    def compare(self, forward: Callable[..., Any], inputs: Sequence[Any]) -> str:
        """Run the forward and its record on copies of a batch.

        Returns:
            Why the record cannot stand for the forward, or an empty text.
        """
        from torch.utils.flop_counter import FlopCounterMode  # its import takes long

        with torch.random.fork_rng(devices=_gpus(inputs)), torch.no_grad():
            wanted = forward(*(_copied(item) for item in inputs))
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                got = self._run([_copied(item) for item in inputs], counter)
        except Exception as error:  # user code on its own tensors
            return f"its recorded calls fail ({type(error).__name__}: {error})"
        difference = _difference(wanted, got)
        if difference > _TOLERANCE:
            return f"its recorded calls give other results (by {difference:.1e} of the greatest)"
        return ""

    def shapes_of(self, inputs: Sequence[Any], interpreter: Interpreter) -> list[Shape]:
        """The shape of each result for another batch."""
        shapes: dict[int, Shape] = {}

        def seen(index: int, value: Any) -> None:
            shapes[index] = _shape_of(value)

        with torch.random.fork_rng(devices=[]), torch.no_grad():
            interpreter.with_observer(seen)(inputs)
        return [shapes.get(index) for index in range(len(self.trace.calls))]

    def _run(self, inputs: Sequence[Any], counter: FlopCounterMode) -> Any:
        shapes: dict[int, Shape] = {}
        totals: dict[int, int] = {}

        def seen(index: int, value: Any) -> None:
            shapes[index] = _shape_of(value)
            totals[index] = int(counter.get_total_flops())

        result = Interpreter(self.trace, self.root, seen=seen)(inputs)
        count = len(self.trace.calls)
        self.shapes = [shapes.get(index) for index in range(count)]
        ends = [0, *(totals[index] for index in range(count))]
        self.flops = [after - before for before, after in itertools.pairwise(ends)]
        return result

    def plan(
        self,
        activations: Mapping[str, Static],
        outputs: Mapping[str, Static | Float] = MappingProxyType({}),
    ) -> Plan:
        """What is int8, from the sizes of the batch.

        Args:
            activations: the quantization of the activations that enter each layer, by path.
            outputs: what configurations say about the values that leave layers, by path.
        """
        operations = self.operations(activations)
        return make_plan(self.trace, operations, self.shapes, activations, outputs)

    def operations(
        self, activations: Mapping[str, Static], shapes: Sequence[Shape] | None = None
    ) -> list[Operation]:
        """What each call computes on values with some sizes, usually those of the batch."""
        shapes = self.shapes if shapes is None else shapes
        # A tensor of the model has no dimension of the batch, even if it looks so in a batch of 1.
        fixed = _fixed(self.trace)
        known = [None if index in fixed else shape for index, shape in enumerate(shapes)]
        operations: list[Operation] = []
        modules = [
            self.root.get_submodule(call.target) if call.kind == "module" else None
            for call in self.trace.calls
        ]
        for index, call in enumerate(self.trace.calls):
            module, layer = modules[index], None
            if module is not None and call.target in activations:
                kind = kind_of(module)
                layer = None if kind is None else kind.name
            operations.append(operation_of(call, module, layer, known, known[index]))
        operations = with_numbers(self.trace, modules, operations, shapes)
        return with_rearrangements(self.trace, modules, operations, shapes)


def _fixed(trace: Trace) -> set[int]:
    """The results that are made of tensors of the model only."""
    found: set[int] = set()
    for index, call in enumerate(trace.calls):
        reads = call.reads()
        if call.kind == "tensor" or (reads and found.issuperset(reads)):
            found.add(index)
    return found


def _shape_of(value: Any) -> Shape:
    tensor = isinstance(value, Tensor) and value.is_floating_point()
    return tuple(value.shape) if tensor else None


def _gpus(inputs: Sequence[Any]) -> list[int]:
    devices = (item.device for item in inputs if isinstance(item, Tensor))
    return sorted({device.index for device in devices if device.type == "cuda"})


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _difference(wanted: Any, got: Any) -> float:
    """The greatest difference, divided by the greatest value; infinite for other structures."""
    if isinstance(wanted, Tensor) and isinstance(got, Tensor):
        if wanted.shape != got.shape or wanted.dtype != got.dtype:
            return float("inf")
        if not wanted.numel() or torch.equal(wanted, got):
            return 0.0
        first, second = wanted.double().nan_to_num(), got.double().nan_to_num()
        error, size = float((first - second).abs().max()), float(first.abs().max())
        return error / size if size else float("inf")
    if isinstance(wanted, (tuple, list)) and isinstance(got, (tuple, list)):
        if len(wanted) != len(got):
            return float("inf")
        pairs = zip(wanted, got, strict=True)
        return max((_difference(*pair) for pair in pairs), default=0.0)
    if isinstance(wanted, Mapping) and isinstance(got, Mapping):
        if list(wanted) != list(got):
            return float("inf")
        return max((_difference(wanted[key], got[key]) for key in wanted), default=0.0)
    return 0.0 if type(wanted) is type(got) and wanted == got else float("inf")
