"""Calls that work in place, in a record whose calls shall not depend on that.

After ``y = relu_(x)``, a reader of ``x`` sees ``y``. In the record it reads ``y``, and ``relu_``
gets a copy of ``x``. So each call of the record is a function of its arguments, which can run at
another time, or be replaced by one that computes the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from types import FunctionType
from typing import Any

from torch import nn

from torchquant.graph.sharing import DROPOUTS, name_of, numbers, shared
from torchquant.graph.trace import (
    IN_PLACE_OPERATORS,
    Call,
    Ref,
    Trace,
    Untraceable,
    function_named,
)

# Functions that change tensors which a call gives them by name, and the arguments that say so.
_KEEPS_STATISTICS = {
    "batch_norm": ("running_mean", "training"),
    "instance_norm": ("running_mean", "use_input_stats"),
    "embedding": ("max_norm", "max_norm"),
}


def without_in_place(trace: Trace, root: nn.Module) -> Trace:
    """The record with calls that do not depend on work in place.

    Raises:
        Untraceable: it works in place on an input, or on memory that other results share.

    Example:
        >>> from torchquant.graph.trace import trace
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
        >>> record = without_in_place(trace(net, lambda module: True), net)
        >>> record.calls[2].copies, record.calls[3].reads()
        (True, (2,))
    """
    return _Rewriter(trace, root).record()


class _Rewriter:
    """Goes through a record and knows which call holds the newest content of each object."""

    def __init__(self, trace: Trace, root: nn.Module) -> None:
        self.trace = trace
        self.readers = trace.readers()
        self.numbers = numbers(trace)
        self.memory: list[frozenset[int]] = []  # the results with which each may share memory
        self.object: list[int] = []  # the first result that is the same tensor object
        self.changes: dict[int, list[int]] = {}  # by the object, the calls that work on it in place
        for index, call in enumerate(trace.calls):
            module = root.get_submodule(call.target) if call.kind == "module" else None
            self._take(index, call, module)

    def _take(self, index: int, call: Call, module: nn.Module | None) -> None:
        _refuse_hidden_changes(call)
        operand = self._changed(call, module)
        same = index
        memory: frozenset[int] = frozenset()
        if operand is not None:
            self._check(index, operand)
            same, memory = self.object[operand], self.memory[operand]
            self.changes.setdefault(same, []).append(index)
        elif index not in self.numbers:
            memory = shared(call, module, self.memory)
            if isinstance(module, nn.Identity) and call.reads():
                same = self.object[call.reads()[0]]
        self.memory.append(memory | {index})
        self.object.append(same)

    def _changed(self, call: Call, module: nn.Module | None) -> int | None:
        """The result that a call changes, or None."""
        if not _works_in_place(call, module):
            return None
        operand = _operand(call)
        if not isinstance(operand, Ref):
            raise Untraceable(f"it works in place on an argument of {name_of(call)}")
        if isinstance(module, DROPOUTS) and self._is_external(operand.index):
            return None  # in evaluation it changes nothing
        return None if operand.index in self.numbers else operand.index

    def _is_external(self, index: int) -> bool:
        """True if a result may share memory with an input or a tensor of the model."""
        return any(self.trace.calls[one].kind in ("input", "tensor") for one in self.memory[index])

    def _check(self, index: int, operand: int) -> None:
        """Raise if anything but later readers of the object itself could see the change."""
        for other in range(index):
            if not self.memory[other] & self.memory[operand]:
                continue
            if self.trace.calls[other].kind in ("input", "tensor"):
                raise Untraceable("it works in place on its input or on a parameter")
            if self.object[other] == self.object[operand]:
                continue
            later = (reader for reader in self.readers[other] if reader > index)
            if any(reader not in self.numbers for reader in later):
                raise Untraceable("it works in place on a view of a value that is read later")

    def _newest(self, read: int, position: int) -> int:
        """The call that holds, before the one at ``position``, what a result holds then."""
        changes = self.changes.get(self.object[read], ())
        return max([read, *(change for change in changes if change < position)])

    def record(self) -> Trace:
        """The record in which calls after a change read its result."""
        if not self.changes:
            return self.trace
        copied = {index for indices in self.changes.values() for index in indices}
        calls = []
        for index, call in enumerate(self.trace.calls):
            args, kwargs = self._at(call.args, index), self._at(call.kwargs, index)
            if index in copied and not args:
                args = (kwargs.pop("input"),)
            calls.append(replace(call, args=args, kwargs=kwargs, copies=index in copied))
        scopes = tuple(
            replace(
                scope,
                args=self._at(scope.args, scope.start),
                kwargs=self._at(scope.kwargs, scope.start),
                result=self._at(scope.result, scope.end),
            )
            for scope in self.trace.scopes
        )
        result = self._at(self.trace.result, len(calls))
        return replace(self.trace, calls=tuple(calls), result=result, scopes=scopes)

    def _at(self, value: Any, position: int) -> Any:
        if isinstance(value, Ref):
            return Ref(self._newest(value.index, position))
        if isinstance(value, tuple):
            items = [self._at(item, position) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, list):
            return [self._at(item, position) for item in value]
        if isinstance(value, Mapping):
            return type(value)({key: self._at(item, position) for key, item in value.items()})  # type: ignore[call-arg]
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return slice(*(self._at(part, position) for part in parts))
        return value


def _operand(call: Call) -> Any:
    """The argument on which a call works in place."""
    return call.args[0] if call.args else call.kwargs.get("input")


def _works_in_place(call: Call, module: nn.Module | None) -> bool:
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = name_of(call)
    if call.kind == "method":
        return name.endswith("_") and not name.endswith("__")
    if call.kind != "function":
        return False
    if name in IN_PLACE_OPERATORS and call.target.startswith("operator:"):
        return True
    if name.endswith("_") and not name.endswith("__"):
        return True
    return bool(_arguments(call, "inplace").get("inplace", False))


def _refuse_hidden_changes(call: Call) -> None:
    """Raise if a call changes an argument that is not its first one."""
    if call.kwargs.get("out") is not None:
        raise Untraceable(f"it writes the result of {name_of(call)} into another tensor")
    if call.kind == "function" and name_of(call) in _KEEPS_STATISTICS:
        names = _KEEPS_STATISTICS[name_of(call)]
        given = _arguments(call, names[0])
        if all(given.get(name) not in (None, False) for name in names):
            raise Untraceable(f"its call of {name_of(call)} changes a tensor of the model")


def _arguments(call: Call, name: str) -> Mapping[str, Any]:
    """The arguments of a Python function by name, with defaults; if it has one with that name."""
    function = function_named(call.target)
    if not isinstance(function, FunctionType):
        return call.kwargs
    signature = inspect.signature(function)
    if name not in signature.parameters:
        return call.kwargs
    try:
        bound = signature.bind(*call.args, **call.kwargs)
    except TypeError:
        return call.kwargs
    bound.apply_defaults()
    return bound.arguments
