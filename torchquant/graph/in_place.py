"""Calls that work in place, in a record whose later calls shall not depend on that.

After ``y = relu_(x)``, a reader of ``x`` sees ``y``. In the record it reads ``y``, so that the call
can be replaced by one that leaves ``x`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from torchquant.graph.trace import Call, Ref, Trace, Untraceable

# Functions and modules whose result may share memory with their argument.
_VIEWS = frozenset(
    (
        *("view", "reshape", "flatten", "getitem", "chunk", "split", "transpose", "permute"),
        *("squeeze", "unsqueeze", "expand", "contiguous", "detach", "narrow", "select", "dropout"),
        *(
            "unbind",
            "movedim",
            "swapaxes",
            "to",
            "float",
            "type",
            "unflatten",
            "view_as",
            "T",
            "mT",
        ),
        *(
            "dropout1d",
            "dropout2d",
            "alpha_dropout",
            "tensor_split",
            "diagonal",
            "getattr",
            "expand_as",
        ),
    )
)
_VIEW_MODULES = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)


def without_in_place(trace: Trace, root: nn.Module) -> Trace:
    """The record with readers that do not depend on work in place.

    Raises:
        Untraceable: it works in place on an input, or on memory that other results share.

    Example:
        >>> from torchquant.graph.trace import trace
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
        >>> record = trace(net, lambda module: True)
        >>> without_in_place(record, net) == record
        True
    """
    modules = {
        index: root.get_submodule(call.target)
        for index, call in enumerate(trace.calls)
        if call.kind == "module"
    }
    changing = {
        index: call.reads()[0]
        for index, call in enumerate(trace.calls)
        if call.reads() and _works_in_place(call, modules.get(index))
    }
    if not changing:
        return trace
    views = {
        index: call.reads()[0]
        for index, call in enumerate(trace.calls)
        if call.reads() and _is_view(call, modules.get(index))
    }
    readers = trace.readers()
    for index, operand in changing.items():
        _check(trace, index, operand, views, readers)
    return _renamed(trace, {operand: index for index, operand in changing.items()})


def _works_in_place(call: Call, module: nn.Module | None) -> bool:
    if module is not None:
        return bool(getattr(module, "inplace", False)) and not isinstance(module, _VIEW_MODULES)
    if call.kwargs.get("inplace"):
        return True
    name = call.target.rpartition(":")[2] if call.kind == "function" else call.target
    return call.kind in ("function", "method") and name.endswith("_") and not name.endswith("__")


def _is_view(call: Call, module: nn.Module | None) -> bool:
    if module is not None:
        return isinstance(module, _VIEW_MODULES)
    return call.kind in ("function", "method") and call.target.rpartition(":")[2] in _VIEWS


def _check(
    trace: Trace,
    index: int,
    operand: int,
    views: Mapping[int, int],
    readers: list[list[int]],
) -> None:
    place = operand
    while place in views:  # a view that only this call reads is as good as its source
        if any(reader > index for reader in readers[place]):
            raise Untraceable("it works in place on a view of a value that is read later")
        place = views[place]
        if len(readers[place]) > 1:
            raise Untraceable("it works in place on a view of a value that others read")
    if trace.calls[place].kind in ("input", "tensor"):
        raise Untraceable("it works in place on its input or on a parameter")
    for reader in readers[operand]:
        if reader < index and reader in views and any(r > index for r in readers[reader]):
            raise Untraceable("it works in place on a value of which a view is read later")


def _renamed(trace: Trace, changed: Mapping[int, int]) -> Trace:
    """The record in which calls after a change read its result."""

    def current(index: int, position: int) -> int:
        while changed.get(index, position) < position:
            index = changed[index]
        return index

    def at(value: Any, position: int) -> Any:
        if isinstance(value, Ref):
            return Ref(current(value.index, position))
        if isinstance(value, tuple):
            items = [at(item, position) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, list):
            return [at(item, position) for item in value]
        if isinstance(value, Mapping):
            return {key: at(item, position) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(at(one, position) for one in (value.start, value.stop, value.step)))
        return value

    calls = tuple(
        replace(call, args=at(call.args, place), kwargs=at(call.kwargs, place))
        for place, call in enumerate(trace.calls)
    )
    scopes = tuple(
        replace(
            scope,
            args=at(scope.args, scope.start),
            kwargs=at(scope.kwargs, scope.start),
            result=at(scope.result, scope.end),
        )
        for scope in trace.scopes
    )
    return replace(trace, calls=calls, result=at(trace.result, len(calls)), scopes=scopes)
