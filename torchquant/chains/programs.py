"""Runs a quantized region by programs of int8 steps, and by calls in Python between them.

The bits are those of :mod:`torchquant.chains.interpreter`, which runs in every other situation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from torchquant._extension import load
from torchquant.chains.first_batch import FirstBatch
from torchquant.chains.guard import Expected
from torchquant.chains.interpreter import Interpreter, Substitute, runs_hooks
from torchquant.chains.operations import Affine, Norm, Other
from torchquant.chains.per_channel import Numbers
from torchquant.chains.plan import Group, Plan
from torchquant.chains.program import Program
from torchquant.chains.recognize import depends_on_sizes
from torchquant.chains.schedule import (
    Item,
    Segment,
    make_schedule,
    make_steps,
    read_by_python,
)
from torchquant.chains.steps import Qparams
from torchquant.configs import Static
from torchquant.graph.randomness import is_random
from torchquant.graph.trace import Trace

_Guard = load().Guard
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
# Every hook of a forward is in one of these. Hooks of a backward pass run in it, because the
# interpreter computes the gradients.
_HOOK_DICTIONARIES = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = (
    *("_global_forward_hooks", "_global_forward_pre_hooks"),
    *("_global_backward_hooks", "_global_backward_pre_hooks"),
)
REFUSED = object()  # the result of a run that the interpreter has to do


class Quantized(Protocol):
    """What programs need of a region."""

    root: nn.Module
    trace: Trace
    plan: Plan | None
    facts: FirstBatch | None
    activations: dict[str, Static]
    expected: Expected | None

    def edge_qparams(self, edge: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of an edge."""

    def substitutes(self) -> dict[int, Substitute]:
        """The functions with the bits of the kernels."""

    def rounding_points(self) -> dict[int, Callable[[Tensor], Tensor]]:
        """The functions that round the int8 values."""


def may_use_kernels(inputs: Sequence[Any]) -> bool:
    """True if no mode of torch watches the operators, and the inputs are plain tensors on the CPU.

    A program refuses tensors that are not float32. A forward may convert its input first.

    Example:
        >>> sparse = torch.zeros(1, 4).to_sparse()
        >>> may_use_kernels([torch.zeros(1, 4)]), may_use_kernels([sparse.to("meta")])
        (True, False)
    """
    if _is_any_autocast_enabled():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._get_tracing_state() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(type(item) is Tensor and item.is_cpu and not item.is_nested for item in inputs)


class Programs:
    """The programs of one region, for the tensors that its layers have now.

    Args:
        region: a region whose expectations hold.
    """

    def __init__(self, region: Quantized) -> None:
        assert region.plan is not None and region.expected is not None
        self.trace = region.trace
        self.plan = _without_unsupported(region, region.plan)
        self.interpreter = Interpreter(
            region.trace, region.root, region.substitutes(), region.rounding_points()
        )
        self.ready = all(
            not runs_hooks(module)
            for module in (*self.interpreter.modules.values(), *_inner(self.interpreter))
        )
        self.random = any(map(is_random, region.trace.calls))
        self.learned: dict[tuple[Any, ...], list[bool] | None] = {}  # of results, for gradients
        assert region.facts is not None
        self.sizes = _Sizes(region.facts, region.activations, self.plan)
        self.items: list[tuple[Item, Program | None]] = []
        self.shown: set[int] = set()  # int8 values that Python reads
        try:
            self._make(region)
        except ValueError:  # a layer's own scale is not that of the value which it reads
            self.ready = False
        self.guard = _Guard(
            [
                *region.expected.entries(),
                *_entries(region.root, self.interpreter, self.plan),
            ]
        )

    def _make(self, region: Quantized) -> None:
        qparams = _qparams(region, self.plan)
        schedule = make_schedule(region.trace, self.plan)
        self.shown = read_by_python(region.trace, self.plan, schedule) & {*self.interpreter.points}
        for item in schedule:
            program = None
            if isinstance(item, Segment):
                program = Program(
                    make_steps(
                        item,
                        self.plan,
                        qparams,
                        self.interpreter.modules.__getitem__,
                        Numbers(region.trace, region.root).of,
                    )
                )
            self.items.append((item, program))

    def holds(self) -> bool:
        """True if the record of the forward holds, and no tensor of a layer and no hook changed."""
        return bool(self.guard.holds())

    def run(self, inputs: Sequence[Any]) -> Any:
        """The result of the forward, or ``REFUSED``; only if ``ready``."""
        if not self.sizes.fit(inputs, self.interpreter):
            return REFUSED
        results: dict[int, Any] = {}
        calls, sources = self.trace.calls, self.plan.sources
        for index, place in self.interpreter.inputs.items():
            value = inputs[place]
            # A program rounds its input; Python reads the rounded values, as in the interpreter.
            results[index] = self.interpreter.points[index](value) if index in self.shown else value
        for item, program in self.items:
            if program is None:
                assert isinstance(item, int)
                if item not in results:
                    found = _Resolved(results, self.interpreter, sources)
                    results[item] = self.interpreter.call(item, calls[item], found, inputs)
                continue
            assert isinstance(item, Segment)
            given = [results[index] for index in item.reads]
            if not item.rows and not self.sizes.have_ranks(given, item.reads):
                return REFUSED
            last = self.plan.last
            given = [
                value.permute(0, 3, 1, 2) if index in last else value
                for index, value in zip(item.reads, given, strict=True)
            ]
            try:
                made = _run_rows(program, given) if item.rows else program.run(given)
            except ValueError:  # sizes that the steps do not take; the calls say what is wrong
                return REFUSED
            if made is None:
                return REFUSED
            for index, value in zip(item.writes, made, strict=True):
                results[index] = value.permute(0, 2, 3, 1) if index in last else value
        return self.interpreter.result(_Resolved(results, self.interpreter, sources), inputs)


class _Sizes:
    """Whether programs, made for the sizes of the first batch, hold for those of another."""

    def __init__(self, facts: FirstBatch, activations: Mapping[str, Static], plan: Plan) -> None:
        self.facts = facts
        self.activations = activations
        self.plan = plan
        self.ranks = [None if shape is None else len(shape) for shape in facts.shapes]
        self.open = [  # what these calls compute has to be looked at for each size
            index
            for index in range(len(plan.operations))
            if not isinstance(plan.operations[index], Other)
            and depends_on_sizes(index, facts.trace)
        ]
        calls = zip(facts.trace.calls, facts.shapes, strict=True)
        first = tuple(shape for call, shape in calls if call.kind == "input")
        self.known: dict[tuple[Any, ...], bool] = {first: True}

    def have_ranks(self, values: Sequence[Any], indices: Sequence[int]) -> bool:
        """True if values have as many dimensions as in the first batch."""
        ranks = self.ranks
        return all(
            value.dim() == ranks[index] for value, index in zip(values, indices, strict=True)
        )

    def fit(self, inputs: Sequence[Any], interpreter: Interpreter) -> bool:
        """True if each call computes on these inputs what it did in the first batch."""
        if not self.open:
            return True
        key = tuple(item.shape for item in inputs)
        known = self.known.get(key)
        if known is None:
            if len(self.known) >= _MOST_SIZES:
                self.known.clear()
            known = self.known[key] = self._fit(inputs, interpreter)
        return known

    def _fit(self, inputs: Sequence[Any], interpreter: Interpreter) -> bool:
        try:
            shapes = self.facts.shapes_of(inputs, interpreter)
        except Exception:  # the calls themselves will say what is wrong
            return False
        operations = self.facts.operations(self.activations, shapes)
        return all(operations[index] == self.plan.operations[index] for index in self.open)


_MOST_SIZES = 256


def _run_rows(program: Program, inputs: Sequence[Tensor]) -> list[Tensor] | None:
    """Run a program on values ``[..., c]``, which all have the same number of rows."""
    leading = inputs[0].shape[:-1]
    if any(item.shape[:-1] != leading for item in inputs):
        return None
    made = program.run([item.reshape(-1, item.shape[-1]) for item in inputs])
    return None if made is None else [item.reshape(*leading, item.shape[-1]) for item in made]


class _Resolved(Mapping[int, Any]):
    """Results by the index of a call, in which an identity has the result of its argument.

    ``x.contiguous()`` is an identity to a step, but not to ``x.view()`` in Python: it runs.
    """

    def __init__(
        self, results: Mapping[int, Any], interpreter: Interpreter, sources: Sequence[int]
    ) -> None:
        self.results = results
        self.interpreter = interpreter
        self.sources = sources

    def __getitem__(self, index: int) -> Any:
        source = self.sources[index]
        call = self.interpreter.trace.calls[index]
        if source == index or call.kind == "module":
            return self.results[source]
        return self.interpreter.call(index, call, self, ())

    def __iter__(self) -> Any:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


def _qparams(region: Quantized, plan: Plan) -> list[Qparams]:
    found = []
    for edge, activations in enumerate(plan.edges):
        scale, zero_point = region.edge_qparams(edge)
        found.append(Qparams(float(scale), int(zero_point), *activations.range))
    return found


def _without_unsupported(region: Quantized, plan: Plan) -> Plan:
    """The plan without the steps that no program can run; their calls run in Python."""
    qparams = _qparams(region, plan)
    kept: dict[int, Group] = {}
    for end, group in plan.groups.items():
        segment = Segment((group,), (), ())
        numbers = Numbers(region.trace, region.root).of
        made = make_steps(segment, plan, qparams, region.root.get_submodule, numbers)
        if all(map(Program.supports, made)):
            kept[end] = group
    return replace(plan, groups=kept)


def _inner(interpreter: Interpreter) -> list[nn.Module]:
    return [module for _, module in interpreter.scopes]


def _entries(
    root: nn.Module, interpreter: Interpreter, plan: Plan
) -> list[tuple[dict[str, Any], str, Any]]:
    """What has to stay for the programs to hold."""
    entries: list[tuple[dict[str, Any], str, Any]] = []
    modules = {
        id(module): module for module in (*interpreter.modules.values(), *_inner(interpreter))
    }
    for module in modules.values():
        entries += ((module.__dict__, name, module.__dict__[name]) for name in _HOOK_DICTIONARIES)
    entries += (
        (vars(global_hooks), name, getattr(global_hooks, name))
        for name in _GLOBAL_HOOKS
        if isinstance(getattr(global_hooks, name), dict)
    )
    places: list[dict[str, Any]] = [root._buffers]
    calls = interpreter.trace.calls
    paths = {call.target.rpartition(".")[0] for call in calls if call.kind == "tensor"}
    owners = [root.get_submodule(path) for path in sorted(paths)]
    for call, operation in zip(calls, plan.operations, strict=True):
        if isinstance(operation, (Affine, Norm)) and call.kind == "module":
            owners.append(interpreter.modules[call.target])
    for module in (*owners, *(interpreter.modules[path] for path in plan.layers)):
        places += [module._buffers, module._parameters]
    for place in places:
        entries += (
            (place, name, tensor)
            for name, tensor in place.items()
            if tensor is not None and tensor.numel()
        )
    return entries
