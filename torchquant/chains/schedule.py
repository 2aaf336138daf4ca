"""The order in which a region runs: programs of int8 steps, and calls in Python between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from torchquant.chains import operations as known
from torchquant.chains import steps
from torchquant.chains.plan import Group, Plan
from torchquant.chains.steps import Qparams, Step, Value
from torchquant.graph.randomness import is_random
from torchquant.graph.trace import Trace, refs


@dataclass(frozen=True)
class Segment:
    """The steps of one program.

    Args:
        groups: the calls of each step.
        reads: the indices of the results that the program takes, in the order of its arguments.
        writes: the indices of the results that other calls read, in the order of its results.
        rows: True if all values are ``[..., c]``; the program runs on ``[n, c]``.
    """

    groups: tuple[Group, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    rows: bool = False


NumbersOf: TypeAlias = Callable[
    [int, "known.Affine | known.Norm"], tuple[Tensor | None, Tensor | None]
]
Item: TypeAlias = Segment | int  # an int: the index of a call that runs in Python


def make_schedule(trace: Trace, plan: Plan) -> list[Item]:
    """Divide the calls of a region into programs and calls in Python.

    A call in Python that needs no result of the program before it runs before the program, so that
    programs are as long as possible. Calls whose results nothing needs do not run, except those
    that draw random numbers.
    """
    count = len(trace.calls)
    stepped = {call for group in plan.groups.values() for call in group.calls}
    ends = {group.end: group for group in plan.groups.values()}
    needed = _needed(trace, plan, stepped)
    items: list[Item | list[Group]] = []
    open_groups: list[Group] = []
    made: set[int] = set()  # by the open program

    def close() -> None:
        if open_groups:
            items.append(list(open_groups))
            open_groups.clear()
            made.clear()

    for index in range(count):
        group = ends.get(index)
        if group is not None:
            if open_groups and open_groups[-1].rows != group.rows:
                close()
            open_groups.append(group)
            made.add(index)
        elif index in needed and index not in stepped:
            if made & _behind(trace, plan, trace.calls[index].reads()):
                close()
            items.append(index)
    close()
    return _with_borders(trace, plan, items)


def _needed(trace: Trace, plan: Plan, stepped: set[int]) -> set[int]:
    """The calls that run in Python or in a program."""
    waiting = [*_behind(trace, plan, refs(trace.result))]
    waiting += (index for index, call in enumerate(trace.calls) if is_random(call))
    by_call = {call: group for group in plan.groups.values() for call in group.calls}
    needed: set[int] = set()
    while waiting:
        index = waiting.pop()
        if index in needed:
            continue
        needed.add(index)
        if index in stepped:
            waiting += by_call[index].reads
        else:
            waiting += _behind(trace, plan, trace.calls[index].reads())
    return needed


def read_by_python(trace: Trace, plan: Plan, schedule: Iterable[Item]) -> set[int]:
    """The results that calls in Python read, or the forward returns."""
    found = _behind(trace, plan, refs(trace.result))
    for item in schedule:
        if isinstance(item, int):
            found |= _behind(trace, plan, trace.calls[item].reads())
    return found


def _behind(trace: Trace, plan: Plan, reads: Iterable[int]) -> set[int]:
    """The results that Python needs for some results, of which identities have none of their own.

    ``x.view(n, -1)`` that changes nothing is an identity to a step; Python runs it with its sizes.
    """
    found: set[int] = set()
    for read in reads:
        found.add(plan.sources[read])
        call = trace.calls[read]
        if plan.sources[read] != read and call.kind != "module":
            found |= _behind(trace, plan, call.reads())
    return found


def _with_borders(trace: Trace, plan: Plan, items: Sequence[Item | list[Group]]) -> list[Item]:
    reads: list[set[int]] = []
    for item in items:
        if isinstance(item, int):
            reads.append(_behind(trace, plan, trace.calls[item].reads()))
        elif isinstance(item, list):
            reads.append({read for group in item for read in group.reads})
    results = _behind(trace, plan, refs(trace.result))
    found: list[Item] = []
    for place, item in enumerate(items):
        if not isinstance(item, list):
            found.append(item)
            continue
        own = {group.end for group in item}
        outside = results.union(*reads[:place], *reads[place + 1 :])
        found.append(
            Segment(
                tuple(item),
                tuple(sorted(reads[place] - own)),
                tuple(sorted(own & outside)),
                item[0].rows,
            )
        )
    return found


def make_steps(
    segment: Segment,
    plan: Plan,
    qparams: Sequence[Qparams],
    module_of: Callable[[str], nn.Module],
    numbers_of: NumbersOf,
) -> list[Step]:
    """The steps of a program.

    Args:
        segment: its calls.
        plan: the plan of the region.
        qparams: scale and integers of each edge.
        module_of: returns the layer at a path.
        numbers_of: returns the numbers of a call by its index.
    """
    values: dict[tuple[int, bool], Value] = {}

    def value(index: int, inside: bool = False) -> Value:
        """The value of a result, or one inside of its step."""
        if (index, inside) not in values:
            edge = plan.edge_of.get(index)
            q = None if edge is None else qparams[edge]
            values[index, inside] = Value(len(values), q)
        return values[index, inside]

    found: list[Step] = [
        steps.Input(value(index), place) for place, index in enumerate(segment.reads)
    ]
    for group in segment.groups:
        found += _steps(group, plan, value, module_of, numbers_of)
    found += (
        steps.Output(value(index), place, index in plan.last)
        for place, index in enumerate(segment.writes)
    )
    return found


def _steps(
    group: Group,
    plan: Plan,
    value: Callable[..., Value],
    module_of: Callable[[str], nn.Module],
    numbers_of: NumbersOf,
) -> list[Step]:
    operation = plan.operations[group.calls[0]]
    operands = [value(index) for index in group.operands]
    residual = None if group.residual is None else value(group.residual)
    output = value(group.end)
    if isinstance(operation, known.Layer):
        kind = steps.Linear if operation.linear else steps.Conv
        layer = module_of(operation.path)
        return [kind(operands[0], output, layer, group.activation, residual)]
    if isinstance(operation, known.Concat):
        return [steps.Concat(tuple(operands), output)]
    if isinstance(operation, (known.Add, known.Mul)):
        left, right = operands if len(operands) == 2 else operands * 2
        if isinstance(operation, known.Add):
            return [steps.Add(left, right, output, group.activation)]
        if operation.left_is_factor:
            left, right = right, left
        return [steps.Mul(left, right, output, group.activation)]
    if isinstance(operation, (known.Affine, known.Norm)):
        numbers = numbers_of(group.calls[0], operation)
        if isinstance(operation, known.Norm):
            sizes = operation.channels, operation.eps
            return [steps.Norm(operands[0], output, *sizes, *numbers)]
        rest = (*numbers, group.activation, residual)
        return [steps.Affine(operands[0], output, operation.channels, *rest)]
    if isinstance(operation, known.AdaptiveAvgPool) and operation.flat:
        whole = value(group.end, inside=True)
        pool = steps.AdaptiveAvgPool(operands[0], whole, operation.size)
        return [pool, steps.Flatten(whole, output)]
    return _unary(operation, operands[0], output)


def _unary(operation: known.Operation, input: Value, output: Value) -> list[Step]:
    if isinstance(operation, known.AdaptiveMaxPool):
        return [steps.AdaptiveMaxPool(input, output, operation.size)]
    if isinstance(operation, known.Channels):
        return [steps.Channels(input, output, operation.index)]
    if isinstance(operation, known.Crop):
        return [steps.Crop(input, output, operation.begin, operation.end)]
    if isinstance(operation, known.Pad):
        return [steps.Pad(input, output, operation.before, operation.after)]
    if isinstance(operation, known.PixelShuffle):
        return [steps.PixelShuffle(input, output, operation.factor, operation.inverse)]
    if isinstance(operation, known.Activate):
        return [steps.Map(input, output, operation.function)]
    if isinstance(operation, known.MaxPool):
        return [steps.MaxPool(input, output, **vars(operation))]
    if isinstance(operation, known.AvgPool):
        return [steps.AvgPool(input, output, **vars(operation))]
    if isinstance(operation, known.Upsample):
        return [steps.Upsample(input, output, **vars(operation))]
    if isinstance(operation, known.AdaptiveAvgPool):
        return [steps.AdaptiveAvgPool(input, output, operation.size)]
    assert isinstance(operation, known.Flatten)
    return [steps.Flatten(input, output)]
