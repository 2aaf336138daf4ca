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
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
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
IN_PLACE_OPERATORS = (
    *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)


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
        copies: True if the call works in place on its first argument and has to get a copy of it.
    """

    kind: str
    target: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    copies: bool = False

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
        order: the names of the arguments that a call can give by position.
    """

    calls: tuple[Call, ...]
    result: Any
    inputs: tuple[str, ...]
    defaults: Mapping[str, Any]
    scopes: tuple[Scope, ...]
    order: tuple[str, ...] = ()

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


def trace(
    module: nn.Module, is_leaf: Callable[[nn.Module], bool], *, training: bool = False
) -> Trace:
    """Record the forward of a module in evaluation mode, or in training mode.

    The forward runs once, without tensors, if it and those of the modules that it calls only
    compute (:func:`torchquant.graph.purity.effect_of`).

    Args:
        module: the module; its training mode is restored.
        is_leaf: takes a module below it; True if a call of it is one entry of the record.
        training: whether to record training mode.

    Raises:
        Untraceable: the forward may have effects, what it does depends on values of its inputs, or
            it is no list of calls.

    Example:
        >>> found = trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), lambda module: True)
        >>> [(call.kind, call.target) for call in found.calls]
        [('input', 'input'), ('module', '0'), ('module', '1')]
    """
    tracer = _Tracer(is_leaf)
    tracer.require_pure(module)
    tracer.signature = _signature(module)
    modes = [(child, child.training) for child in module.modules()]
    try:
        module.train(training)
        graph = tracer.trace(module)
    except Untraceable:
        raise
    except Exception as error:  # user code may raise anything when it meets a placeholder
        raise Untraceable(_reason(error)) from None
    finally:
        for child, mode in modes:
            child.training = mode
    return _record(graph, tracer)


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


def called(call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the call of a function or a method gives for these arguments.

    Example:
        >>> called(Call("method", "relu"), (torch.tensor([-1.0, 2.0]),), {})
        tensor([0., 2.])
    """
    if call.kind == "method":
        return getattr(args[0], call.target)(*args[1:], **kwargs)
    return function_named(call.target)(*args, **kwargs)


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


@dataclass(frozen=True)
class _Signature:
    """The arguments of a forward: tensors, of which some come by position, and those left out."""

    inputs: tuple[str, ...] = ()
    positional: int = 0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    order: tuple[str, ...] = ()


def _signature(module: nn.Module) -> _Signature:
    inputs: list[str] = []
    positional, defaults = 0, {}
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    for parameter in parameters:
        name, default = parameter.name, parameter.default
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Untraceable(f"its forward takes *{name}")
        if default is parameter.empty:
            inputs.append(name)
            positional += parameter.kind is not parameter.KEYWORD_ONLY
        elif isinstance(default, (list, dict, set, bytearray)):
            raise Untraceable(f"the default of its argument {name} can change")
        else:
            defaults[name] = default
    if not inputs:
        raise Untraceable("its forward takes no tensor")
    order = [one.name for one in parameters if one.kind is not one.KEYWORD_ONLY]
    return _Signature(tuple(inputs), positional, defaults, tuple(order))


class _Proxy(torch.fx.Proxy):
    """A placeholder for a result, which tells ``x += y`` from ``x = x + y``."""

    def __getattr__(self, k: str) -> Any:
        return _Attribute(self, k)


class _Attribute(_Proxy, torch.fx.proxy.Attribute):
    """A placeholder for an attribute of a result."""


def _in_place_operator(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)

    def operate(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return operate


for _name in IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_name}__", _in_place_operator(_name))


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True  # so that work on a buffer is recorded and not done

    def __init__(self, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.is_leaf = is_leaf
        self.signature = _Signature()
        self.result: Any = None  # of the forward, with placeholders
        # (path, the number of nodes before and after, arguments, result), inner modules first
        self.scopes_found: list[tuple[str, int, int, Any, Any, Any]] = []

    def require_pure(self, module: nn.Module) -> None:
        """Raise if following the module's forward may have effects."""
        effect = effect_of(module)
        if effect is not None:
            raise Untraceable(effect)

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """The forward with its tensor arguments only; the others keep their defaults."""
        names, count = self.signature.inputs, self.signature.positional

        def forward(*given: Any) -> Any:
            by_name = dict(zip(names[count:], given[count:], strict=True))
            self.result = _copied(root_fn(self.root, *given[:count], **by_name))
            return self.result

        return forward, [self.create_proxy("placeholder", name, (), {}) for name in names]

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


def _record(graph: torch.fx.Graph, tracer: _Tracer) -> Trace:
    indices: dict[torch.fx.Node, int] = {}
    counts = [0]  # for each number of nodes, how many of them are calls
    calls: list[Call] = []

    def plain(value: Any) -> Any:
        if isinstance(value, torch.fx.Proxy):
            value = value.node
        if isinstance(value, torch.fx.Node):
            return Ref(indices[value])
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(plain, value))
        if isinstance(value, (tuple, list)):
            items = [plain(item) for item in value]
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, Mapping):
            table = OrderedDict if isinstance(value, OrderedDict) else dict
            return table((key, plain(item)) for key, item in value.items())
        if isinstance(value, slice):
            return slice(plain(value.start), plain(value.stop), plain(value.step))
        return value

    kinds = {"call_module": "module", "call_method": "method", "get_attr": "tensor"}
    for node in graph.nodes:
        if node.op == "placeholder":
            indices[node] = len(calls)
            calls.append(Call("input", str(node.target)))
        elif node.op != "output":
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
    signature, result = tracer.signature, plain(tracer.result)
    arguments = signature.inputs, signature.defaults
    return Trace(tuple(calls), result, *arguments, tuple(scopes), signature.order)


def _copied(value: Any) -> Any:
    """A copy of containers, which the forward may change later."""
    if isinstance(value, tuple):
        items = [_copied(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if isinstance(value, Mapping):
        if type(value) not in (dict, OrderedDict):
            raise Untraceable(f"it passes on a {type(value).__name__}")
        return type(value)({key: _copied(item) for key, item in value.items()})  # type: ignore[call-arg]
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, torch.fx.proxy.TraceError):
        return "what its forward does depends on values or shapes of its input"
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"torch.fx cannot follow its forward ({type(error).__name__}: {first})"
