"""Runs the calls of a recorded forward one by one, in plain Python.

This is the meaning of a region. Modules are called as modules, so their hooks run, those of inner
modules too. A call can be replaced by a function with the bits that the kernels compute, and a
result can be passed through a function that observes or rounds it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from torchquant.chains.hooked_call import run_as
from torchquant.graph.modules import has_hooks
from torchquant.graph.trace import Call, Ref, Scope, Trace, filled, function_named, refs

Substitute = Callable[..., Any]


class Interpreter:
    """The calls of one region, and the modules that they call.

    Args:
        trace: the calls.
        root: the module that was recorded.
        substitutes: functions of the tensor arguments that replace a call, by its index; one that
            returns ``NotImplemented`` leaves the arguments to the call.
        points: functions that a result passes through, by the index of its call.
        seen: is told the index and the result of every call.

    Example:
        >>> import torch
        >>> from torchquant.graph.trace import trace
        >>> net = nn.Sequential(nn.Flatten(), nn.ReLU())
        >>> run = Interpreter(trace(net, lambda module: True), net, points={1: lambda x: x + 1})
        >>> run([torch.tensor([[-2.0, 1.0]])])
        tensor([[0., 2.]])
    """

    def __init__(
        self,
        trace: Trace,
        root: nn.Module,
        substitutes: Mapping[int, Substitute] | None = None,
        points: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
        seen: Callable[[int, Any], None] | None = None,
    ) -> None:
        self.trace = trace
        self.modules = {
            call.target: root.get_submodule(call.target)
            for call in trace.calls
            if call.kind == "module"
        }
        self.root = root
        self.scopes = [(scope, root.get_submodule(scope.path)) for scope in trace.scopes]
        self.substitutes = dict(substitutes or {})
        self.points = dict(points or {})
        self.seen = seen
        self.functions = {
            call.target: function_named(call.target)
            for call in trace.calls
            if call.kind == "function"
        }
        self.inputs = {
            index: place
            for place, index in enumerate(
                index for index, call in enumerate(trace.calls) if call.kind == "input"
            )
        }
        self.ends = _last_reads(trace)

    def __call__(self, inputs: Sequence[Any]) -> Any:
        """The result of the forward on its tensor arguments."""
        hooked = any(runs_hooks(module) for _, module in self.scopes)
        results: dict[int, Any] = {}
        if hooked:
            self._run(0, len(self.trace.calls), results, inputs, None)
        else:
            for index, call in enumerate(self.trace.calls):
                results[index] = self.call(index, call, results, inputs)
                for read in self.ends[index]:
                    del results[read]
        return self.result(results, inputs)

    def result(self, results: Mapping[int, Any], inputs: Sequence[Any]) -> Any:
        """The result of the forward; an input in it is the argument itself, not rounded."""
        places = self.inputs
        return filled(
            self.trace.result,
            lambda index: inputs[places[index]] if index in places else results[index],
        )

    def with_observer(self, seen: Callable[[int, Any], None]) -> Interpreter:
        """The same interpreter that tells each result to a function."""
        other = copy.copy(self)
        other.seen = seen
        return other

    def call(
        self, index: int, call: Call, results: Mapping[int, Any], inputs: Sequence[Any]
    ) -> Any:
        """The result of one call, passed through its point."""
        value = self._value(index, call, results, inputs)
        point = self.points.get(index)
        if point is not None:
            value = point(value)
        if self.seen is not None:
            self.seen(index, value)
        return value

    def _value(
        self, index: int, call: Call, results: Mapping[int, Any], inputs: Sequence[Any]
    ) -> Any:
        if call.kind == "input":
            return inputs[self.inputs[index]]
        if call.kind == "tensor":
            return _tensor(self.root, call.target)
        substitute = self.substitutes.get(index)
        if substitute is not None:
            arguments = [results[read] for read in call.reads()]
            hooked = call.kind == "module" and runs_hooks(self.modules[call.target])
            if not hooked and (made := substitute(*arguments)) is not NotImplemented:
                return made
            if hooked:
                module = self.modules[call.target]
                forward = _either(substitute, module.forward)
                return run_as(module, forward, tuple(arguments), {})
        args = filled(call.args, results.__getitem__)
        kwargs = filled(call.kwargs, results.__getitem__) if call.kwargs else {}
        if call.copies and isinstance(args[0], Tensor):
            args = (args[0].clone(), *args[1:])
        if call.kind == "module":
            return self.modules[call.target](*args, **kwargs)
        if call.kind == "method":
            return getattr(args[0], call.target)(*args[1:], **kwargs)
        return self.functions[call.target](*args, **kwargs)

    # ------------------------------------------------------------ with hooks of inner modules

    def _run(
        self,
        start: int,
        end: int,
        results: dict[int, Any],
        inputs: Sequence[Any],
        inside: Scope | None,
    ) -> None:
        """Run the calls from start to end, and the modules around them that have hooks."""
        places = [place for place, (scope, _) in enumerate(self.scopes) if scope is inside]
        next_scope = places[0] + 1 if places else 0
        index = start
        while index <= end:
            scope, module = (
                self.scopes[next_scope] if next_scope < len(self.scopes) else (None, None)
            )
            if scope is not None and scope.start == index and scope.end <= end:
                next_scope += 1
                if module is not None and runs_hooks(module):
                    self._run_scope(scope, module, results, inputs)
                    if scope.end > index:
                        index = scope.end
                        while (
                            next_scope < len(self.scopes)
                            and self.scopes[next_scope][0].start < index
                        ):
                            next_scope += 1
                continue
            if index < end:
                results[index] = self.call(index, self.trace.calls[index], results, inputs)
            index += 1

    def _run_scope(
        self, scope: Scope, module: nn.Module, results: dict[int, Any], inputs: Sequence[Any]
    ) -> None:
        inner = dict(results)

        def forward(*args: Any, **kwargs: Any) -> Any:
            _bind((scope.args, dict(scope.kwargs)), (args, kwargs), inner)
            self._run(scope.start, scope.end, inner, inputs, scope)
            return filled(scope.result, inner.__getitem__)

        args = filled(scope.args, results.__getitem__)
        kwargs = filled(dict(scope.kwargs), results.__getitem__)
        output = run_as(module, forward, args, kwargs)
        for index in range(scope.start, scope.end):
            if index in inner:
                results[index] = inner[index]
        _bind(scope.result, output, results)


def _either(substitute: Substitute, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A substitute, or the forward of its module for arguments that it does not take."""

    def run(*args: Any) -> Any:
        made = substitute(*args)
        return forward(*args) if made is NotImplemented else made

    return run


def runs_hooks(module: nn.Module) -> bool:
    """True if a call of the module runs hooks, its own or those of all modules.

    Example:
        >>> runs_hooks(nn.ReLU())
        False
    """
    return has_hooks(module) or bool(
        global_hooks._global_forward_hooks
        or global_hooks._global_forward_pre_hooks
        or global_hooks._global_backward_hooks
        or global_hooks._global_backward_pre_hooks
    )


def _bind(names: Any, values: Any, results: dict[int, Any]) -> None:
    """Store values at the refs that stand in their places."""
    if isinstance(names, Ref):
        results[names.index] = values
    elif isinstance(names, (tuple, list)) and isinstance(values, (tuple, list)):
        for name, value in zip(names, values, strict=False):
            _bind(name, value, results)
    elif isinstance(names, Mapping) and isinstance(values, Mapping):
        for key, name in names.items():
            if key in values:
                _bind(name, values[key], results)


def _last_reads(trace: Trace) -> list[list[int]]:
    """For each call, the results that nothing reads after it."""
    kept = set(refs(trace.result))
    last: dict[int, int] = {}
    for index, call in enumerate(trace.calls):
        last[index] = index
        for read in call.reads():
            last[read] = index
    found: list[list[int]] = [[] for _ in trace.calls]
    for index, end in last.items():
        if index not in kept:
            found[end].append(index)
    return found


def _tensor(root: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    tensor: Tensor = getattr(root.get_submodule(owner), name)
    return tensor
