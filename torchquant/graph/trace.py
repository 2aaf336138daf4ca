"""What a module's forward does with its inputs, recorded once as a list of calls.

``torch.fx`` runs the forward with placeholders. Modules of ``torch.nn`` (but not Sequential) and
layers of this library are single calls; other modules are followed into their own forward. The
record names modules by their paths, so it stays valid for a copy of the model.
"""

from __future__ import annotations

import importlib
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.nn import functional as F

from torchquant.graph.purity import effect_of

_NAMESPACES = (torch, F, operator, math, torch.Tensor, torch._C._nn)
_PATHS = ("torch", "torch.nn.functional", "operator", "math", "torch:Tensor", "torch._C:_nn")


@dataclass(frozen=True)
class Ref:
    """The result of the call with this index."""

    index: int


@dataclass(frozen=True)
class Call:
    """One call, or an input, or a tensor of the module.

    Args:
        kind: "input", "tensor", "module", "function" or "method".
        target: the name of the input; the path of the tensor or the module; the name of the
            function (:func:`function_named`); the name of the method of the first argument.
        args: the arguments, in which a :class:`Ref` stands for a result.
        kwargs: the same for arguments by name.
    """

    kind: str
    target: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def reads(self) -> tuple[int, ...]:
        """The indices of the results that the call takes, in the order of its arguments."""
        return tuple(refs([*self.args, *self.kwargs.values()]))


@dataclass(frozen=True)
class Scope:
    """The calls that a module below the traced one makes in its forward, in one of its calls.

    Args:
        path: the path of the module.
        start: the index of its first call.
        end: the index after its last call.
        args: its arguments, with a :class:`Ref` for each result.
        kwargs: its arguments by name.
        result: what it returns, with refs.
    """

    path: str
    start: int
    end: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any


@dataclass(frozen=True)
class Trace:
    """The calls of a module's forward in their order.

    Args:
        calls: the calls; inputs come first.
        result: what the forward returns: a :class:`Ref`, or tuples, lists and dictionaries of them.
        inputs: the names of the tensor arguments, in the order of the signature.
        defaults: the other arguments and their defaults, for which the record holds.
        scopes: the modules that were followed into, the outer before the inner.
    """

    calls: tuple[Call, ...]
    result: Any
    inputs: tuple[str, ...]
    defaults: Mapping[str, Any]
    scopes: tuple[Scope, ...]

    def readers(self) -> list[list[int]]:
        """For each call the indices of the calls that take its result, each once, in order.

        The result of the forward is read by the call with the index ``len(calls)``.
        """
        found: list[list[int]] = [[] for _ in self.calls]
        for index, call in enumerate(self.calls):
            for read in dict.fromkeys(call.reads()):
                found[read].append(index)
        for read in dict.fromkeys(refs(self.result)):
            found[read].append(len(self.calls))
        return found


class Untraceable(Exception):
    """The forward cannot be recorded; the message is the reason, as it stands in reports."""


def trace(module: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> Trace:
    """Record the forward of a module in evaluation mode.

    The forward runs once, without tensors, if it and those of the modules that it calls only
    compute (:func:`torchquant.graph.purity.effect_of`).

    Args:
        module: the module; its training mode is restored.
        is_leaf: takes a module below it; True if a call of it is one entry of the record.

    Raises:
        Untraceable: the forward may have effects, what it does depends on values of its inputs, or
            it is no list of calls.

    Example:
        >>> found = trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), lambda module: True)
        >>> [(call.kind, call.target) for call in found.calls]
        [('input', 'input'), ('module', '0'), ('module', '1')]
    """
    inputs, defaults = _signature(module)
    modes = [(child, child.training) for child in module.modules()]
    tracer = _Tracer(is_leaf)
    tracer.require_pure(module)
    try:
        module.eval()
        graph = tracer.trace(module, dict(defaults) or None)
    except Untraceable:
        raise
    except Exception as error:  # user code may raise anything when it meets a placeholder
        raise Untraceable(_reason(error)) from None
    finally:
        for child, mode in modes:
            child.training = mode
    return _record(graph, tracer, inputs, defaults)


def refs(value: Any) -> Iterator[int]:
    """The indices of all refs in an argument, in their order.

    Example:
        >>> list(refs([Ref(3), (1, {"a": Ref(5)})]))
        [3, 5]
    """
    if isinstance(value, Ref):
        yield value.index
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from refs(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from refs(item)
    elif isinstance(value, slice):
        yield from refs((value.start, value.stop, value.step))


def filled(value: Any, results: Callable[[int], Any]) -> Any:
    """An argument with the results in place of its refs.

    Example:
        >>> filled([Ref(0), 7], lambda index: "x")
        ['x', 7]
    """
    if isinstance(value, Ref):
        return results(value.index)
    if isinstance(value, tuple):
        items = [filled(item, results) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [filled(item, results) for item in value]
    if isinstance(value, Mapping):
        return type(value)({key: filled(item, results) for key, item in value.items()})  # type: ignore[call-arg]
    if isinstance(value, slice):
        return slice(*(filled(part, results) for part in (value.start, value.stop, value.step)))
    return value


def function_named(name: str) -> Callable[..., Any]:
    """The function that :class:`Call` names.

    Example:
        >>> function_named("torch.nn.functional:relu") is F.relu
        True
    """
    module, _, path = name.partition(":")
    value: Any = importlib.import_module(module)
    for part in path.split(":") if ":" in path else path.split("."):
        value = getattr(value, part)
    return value  # type: ignore[no-any-return]


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", "")
    for namespace, path in zip(_NAMESPACES, _PATHS, strict=True):
        if getattr(namespace, name, None) is function:
            return f"{path}:{name}" if ":" not in path else f"{path}.{name}"
    module, qualified = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    full = f"{module}:{qualified}"
    try:
        if function_named(full) is function:
            return full
    except (ImportError, AttributeError):
        pass
    raise Untraceable(f"it calls {name or function}, a function that no module holds by name")


def _signature(module: nn.Module) -> tuple[tuple[str, ...], dict[str, Any]]:
    inputs, defaults = [], {}
    for name, parameter in inspect.signature(type(module).forward).parameters.items():
        if name == next(iter(inspect.signature(type(module).forward).parameters)):
            continue  # self
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Untraceable(f"its forward takes *{name}")
        if parameter.default is parameter.empty:
            inputs.append(name)
        else:
            defaults[name] = parameter.default
    if not inputs:
        raise Untraceable("its forward takes no tensor")
    return tuple(inputs), defaults


class _Tracer(torch.fx.Tracer):
    def __init__(self, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.is_leaf = is_leaf
        # (path, the number of nodes before and after, arguments, result), inner modules first
        self.scopes_found: list[tuple[str, int, int, Any, Any, Any]] = []

    def require_pure(self, module: nn.Module) -> None:
        """Raise if following the module's forward may have effects."""
        effect = effect_of(module)
        if effect is not None:
            raise Untraceable(effect)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.is_leaf(m)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf(m):
            return super().call_module(m, forward, args, kwargs)
        self.require_pure(m)
        start, given = len(self.graph.nodes), (_copied(args), _copied(kwargs))
        result = type(m).forward(m, *args, **kwargs)  # without hooks, which are user code
        self.scopes_found.append((path, start, len(self.graph.nodes), *given, _copied(result)))
        return result

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *rest: Any,
        **options: Any,
    ) -> Any:
        wrapped = kind == "call_function" and isinstance(target, FunctionType)
        if wrapped and str(target.__module__).startswith("torchvision."):
            return target(*args, **kwargs)  # torch.fx.wrap hides it, but it can be followed
        return super().create_proxy(kind, target, args, kwargs, *rest, **options)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            known = any(a is buffer for buffer in self.root.buffers())
            if not known:
                raise Untraceable("its forward makes a tensor, or reads one that is no buffer")
        return super().create_arg(a)


def _record(
    graph: torch.fx.Graph, tracer: _Tracer, inputs: tuple[str, ...], defaults: dict[str, Any]
) -> Trace:
    nodes = list(graph.nodes)
    indices: dict[torch.fx.Node, int] = {}
    counts = [0]  # for each number of nodes, how many of them are calls
    calls: list[Call] = []
    result: Any = None

    def plain(value: Any) -> Any:
        if isinstance(value, torch.fx.Proxy):
            value = value.node
        if isinstance(value, torch.fx.Node):
            if value in bound:
                raise Untraceable(f"its forward reads the argument {value.target}")
            return Ref(indices[value])
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(plain, value))
        if isinstance(value, (tuple, list)):
            items = [plain(item) for item in value]
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(plain(value.start), plain(value.stop), plain(value.step))
        return value

    bound: set[torch.fx.Node] = set()  # arguments with defaults, and fx's tests that they hold
    kinds = {"call_module": "module", "call_method": "method", "get_attr": "tensor"}
    for node in nodes:
        if node.op == "output":
            result = plain(node.args[0])
        elif node.op == "placeholder":
            if node.target in inputs:
                indices[node] = len(calls)
                calls.append(Call("input", str(node.target)))
            else:
                bound.add(node)
        elif bound.intersection(node.all_input_nodes) and _is_test(node):
            bound.add(node)
        else:
            name = _name_of(node.target) if node.op == "call_function" else str(node.target)
            kind = kinds.get(node.op, "function")
            args, kwargs = plain(tuple(node.args)), plain(dict(node.kwargs))
            indices[node] = len(calls)
            calls.append(Call(kind, name, args, kwargs))
        counts.append(len(calls))
    scopes = [
        Scope(path, counts[start], counts[end], plain(tuple(args)), plain(kwargs), plain(value))
        for path, start, end, args, kwargs, value in tracer.scopes_found
    ]
    scopes.sort(key=lambda scope: (scope.start, -scope.end))
    return Trace(tuple(calls), result, inputs, defaults, tuple(scopes))


def _copied(value: Any) -> Any:
    """A copy of containers, which the forward may change later."""
    return torch.fx.node.map_aggregate(value, lambda item: item)


def _is_test(node: torch.fx.Node) -> bool:
    """True if torch.fx inserted the call to test that an argument has the value of the record."""
    name = getattr(node.target, "__name__", "")
    return name.startswith("_assert") or node.target is operator.eq


def _reason(error: Exception) -> str:
    if isinstance(error, torch.fx.proxy.TraceError):
        return "what its forward does depends on values or shapes of its input"
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"torch.fx cannot follow its forward ({type(error).__name__}: {first})"
