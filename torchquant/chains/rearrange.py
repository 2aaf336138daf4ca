"""Recognises calls that only move elements by what they do to numbered elements.

``x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)`` shuffles channels,
``x.chunk(2, 1)[0]`` takes half of them, ``x.permute(0, 2, 3, 1)`` moves none in memory. The calls
run on small tensors of several sizes, whose elements are numbers; what they do to all of them is
what they do. Calls that hold for the size of the first batch only do not run, and stay unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.chains.arguments import arguments_of
from torchquant.chains.operations import Channels, Flatten, Operation, Other, Same, Shape
from torchquant.chains.recognize import MOVING
from torchquant.graph.trace import Trace, called, filled

_MOST_CALLS = 24  # of one rearrangement, those that compute sizes among them
_SIZES = frozenset(
    ("size", "getattr", "floordiv", "mul", "add", "sub", "mod", "neg", "int", "len", "dim", "shape")
)
_PROBES = ((2, 3, 5), (1, 4, 2))  # batch, height, width


def with_rearrangements(
    trace: Trace,
    modules: Sequence[nn.Module | None],
    operations: Sequence[Operation],
    shapes: Sequence[Shape],
) -> list[Operation]:
    """The operations, in which calls that move elements are known.

    Args:
        trace: the calls.
        modules: the module that each of them calls, or None.
        operations: what they compute, as far as it is known.
        shapes: the shapes of their results.
    """
    names = [
        "" if call.kind in ("input", "tensor") else arguments_of(call, module)[0]
        for call, module in zip(trace.calls, modules, strict=True)
    ]
    found = list(operations)
    for index, operation in enumerate(operations):
        moves = names[index] in MOVING and shapes[index] is not None
        if isinstance(operation, Other) and moves:
            found[index] = _recognized(index, trace, modules, names, shapes) or operation
    return found


def _recognized(
    index: int,
    trace: Trace,
    modules: Sequence[nn.Module | None],
    names: Sequence[str],
    shapes: Sequence[Shape],
) -> Operation | None:
    for start in _starts(index, trace, names, shapes):
        calls = _between(start, index, trace, names, shapes)
        shape = shapes[start]
        if calls is None or shape is None:
            continue
        seen: list[Operation | None] = []
        for batch, height, width in _PROBES:
            sizes = (batch, shape[1], height, width)[: len(shape)]
            x = torch.arange(float(torch.Size(sizes).numel()), dtype=torch.float64).view(sizes)
            try:
                y = _run(start, x, calls, trace, modules)
            except Exception:  # sizes that are constants
                break
            seen.append(_what(start, x, y))
        agreed = len(seen) == len(_PROBES) and seen.count(seen[0]) == len(seen)
        direct = start == trace.calls[index].reads()[0]
        if agreed and (isinstance(seen[0], Channels) or (direct and seen[0] is not None)):
            return seen[0]
    return None


def _starts(
    index: int, trace: Trace, names: Sequence[str], shapes: Sequence[Shape]
) -> Iterator[int]:
    """Results from which a call may make its own, the nearest first."""
    for _ in range(_MOST_CALLS):
        reads = trace.calls[index].reads()
        if not reads:
            return
        index = reads[0]
        shape = shapes[index]
        if shape is not None and len(shape) in (2, 3, 4):
            yield index
        if names[index] not in MOVING:
            return


def _between(
    start: int, index: int, trace: Trace, names: Sequence[str], shapes: Sequence[Shape]
) -> list[int] | None:
    """The calls that lead from one result to another, in order; None if they read more."""
    found: set[int] = set()
    waiting = [index]
    while waiting:
        current = waiting.pop()
        if current == start or current in found:
            continue
        call = trace.calls[current]
        size = shapes[current] is None and names[current] in _SIZES
        if call.kind in ("input", "tensor") or not (size or names[current] in MOVING):
            return None
        found.add(current)
        if len(found) > _MOST_CALLS or current < start:
            return None
        waiting += call.reads()
    return sorted(found)


def _run(
    start: int, x: Tensor, calls: Sequence[int], trace: Trace, modules: Sequence[nn.Module | None]
) -> Any:
    results: dict[int, Any] = {start: x}
    for index in calls:
        call, module = trace.calls[index], modules[index]
        args = filled(call.args, results.__getitem__)
        kwargs = filled(dict(call.kwargs), results.__getitem__)
        if module is not None:
            results[index] = type(module).forward(module, *args, **kwargs)
        else:
            results[index] = called(call, args, kwargs)
    return results[calls[-1]]


def _what(start: int, x: Tensor, y: Any) -> Operation | None:
    """What took x, whose elements are their places in memory, to y."""
    if not isinstance(y, Tensor):
        return None
    if y.shape == x.shape and torch.equal(x, y):
        return Same()
    if x.dim() == 4 and y.dim() == 4:
        for last, order in ((True, (0, 2, 3, 1)), (False, (0, 3, 1, 2))):
            if torch.equal(x.permute(order), y):
                return Same(last)
    if x.dim() > 2 and y.dim() == 2:
        return Flatten() if torch.equal(x.flatten(1), y) else None
    if y.dim() != x.dim() or y.shape[0] != x.shape[0] or y.shape[2:] != x.shape[2:]:
        return None
    channels = x.shape[1]
    places = y.flatten(2)[0, :, 0] if y.dim() > 2 else y[0]
    index = (places.long() // (x[0, 0].numel())) % channels
    if not torch.equal(x[:, index], y):
        return None
    return Channels(start, tuple(index.tolist()))
