"""Traces of a module's forward with the module's children as leaves.

``torch.fx.symbolic_trace`` patches ``nn.Module.__call__`` for the whole process while it runs, so
calls from a thread that serves another model would be recorded too, and fail. Nothing is patched
here: ``forward`` runs on a *shell* of the module, an object of the same class that holds stubs in
place of children and proxies in place of tensors. Attributes that the forward sets stay on the
shell.

One trace follows one side of a branch on a boolean argument, on ``self.training``, or on whether an
argument is None. So there is one trace for each combination of these values.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchquant.graph.modules import is_container

_MAX_BOOLEANS = 3  # arguments with a boolean default; each doubles the number of traces


@dataclass
class Trace:
    """One run of a module's forward on proxies: with gradients in training mode, otherwise without.

    Attributes:
        root: the module.
        graph: the calls, up to the failure if there is one.
        modules: for each call of a module, the module.
        code: for each call of a module, the code that made the call.
        modes: for each call of a module, torch's modes: gradients, inference mode, autocast on the
            CPU and on CUDA.
        failure: why the run ended early, or None.
    """

    root: nn.Module
    graph: fx.Graph = field(default_factory=fx.Graph)
    modules: dict[fx.Node, nn.Module] = field(default_factory=dict)
    code: dict[fx.Node, CodeType] = field(default_factory=dict)
    modes: dict[fx.Node, tuple[bool, ...]] = field(default_factory=dict)
    failure: str | None = None


def forward_traces(module: nn.Module) -> list[Trace]:
    """Traces of ``module``'s forward, one per choice of its optional arguments and its mode.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> [node.target for node in forward_traces(net)[0].graph.nodes]
        ['input', '0', '1', 'output']
    """
    refused = _refusal(module)
    if refused is not None:
        return [Trace(module, failure=refused)]
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    choices = list(_choices(parameters))
    if not choices:
        return [Trace(module, failure=f"more than {_MAX_BOOLEANS} boolean arguments")]
    modes = (module.training, not module.training)
    return [_trace(module, parameters, c, mode) for c in choices for mode in modes]


def called_by(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of ``model`` whose forward calls children: all except containers and leaves.

    Example:
        >>> block = nn.Sequential(nn.Linear(4, 4))
        >>> list(called_by(nn.ModuleList([block]))) == [block]
        True
    """
    for module in model.modules():
        if module._modules and not is_container(module):
            yield module


def _refusal(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "forward replaced on the instance"
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted"
    return None


def _choices(parameters: list[inspect.Parameter]) -> Iterator[dict[str, Any]]:
    """Values for the optional arguments that a forward may branch on; the others are proxies."""
    booleans = [p.name for p in parameters if isinstance(p.default, bool)]
    absent = dict.fromkeys(p.name for p in parameters if p.default is None)
    if len(booleans) > _MAX_BOOLEANS:
        return
    for values in itertools.product((True, False), repeat=len(booleans)):
        given = dict(zip(booleans, values, strict=True))
        yield {**given, **absent}
        if absent:
            yield given


def _trace(
    module: nn.Module, parameters: list[inspect.Parameter], choice: dict[str, Any], training: bool
) -> Trace:
    trace = Trace(module)
    tracer = _Tracer(trace)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        name = parameter.name
        value = choice[name] if name in choice else tracer.placeholder(name)
        if parameter.kind is parameter.KEYWORD_ONLY:
            kwargs[name] = value
        else:
            args.append(value)
    try:
        shell = tracer.shell(module)
        shell.training = training
        # Side effects of a forward (random numbers, warnings) must not leave the trace.
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(not training),
            torch.set_grad_enabled(training),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            warnings.simplefilter("ignore")
            result = type(module).forward(shell, *args, **kwargs)
        trace.graph.output(tracer.create_arg(result))
    except Exception as error:  # a forward may raise anything when it is given proxies
        first_line = str(error).strip().partition("\n")[0]
        trace.failure = f"{type(error).__name__}: {first_line}" if first_line else repr(error)
    return trace


class _Tracer(fx.proxy.GraphAppendingTracer):
    def __init__(self, trace: Trace) -> None:
        super().__init__(trace.graph)
        self.trace = trace
        self._shells: dict[int, nn.Module] = {}
        self._stubs: dict[int, Any] = {}
        self._names = {id(m): name for name, m in trace.root.named_modules()}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def placeholder(self, name: str) -> fx.Proxy:
        return self.create_proxy("placeholder", name, (), {})

    def create_arg(self, a: Any) -> Any:
        try:
            return super().create_arg(a)
        except NotImplementedError:  # the graph is never run, so a name is enough
            return f"<{type(a).__name__}>"

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        # `(*x.shape[:-1], -1)`: the number of sizes does not change which module is called.
        if is_shape(obj.node):
            return iter((operator.getitem(obj, 0),))
        return super().iter(obj)

    def call(self, module: nn.Module, code: CodeType, args: Any, kwargs: Any) -> Any:
        name = self._names.get(id(module), type(module).__name__)
        proxy = self.create_proxy("call_module", name, args, kwargs)
        self.trace.modules[proxy.node] = module
        self.trace.code[proxy.node] = code
        self.trace.modes[proxy.node] = (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_enabled("cuda"),
        )
        return proxy

    def wrap(self, module: nn.Module) -> Any:
        """The stub of a child, or a shell for a container or a plain Sequential."""
        if is_container(module) or type(module) is nn.Sequential:
            return self.shell(module)
        if id(module) not in self._stubs:
            self._stubs[id(module)] = _Stub(self, module)
        return self._stubs[id(module)]

    def shell(self, module: nn.Module) -> nn.Module:
        known = self._shells.get(id(module))
        if known is not None:
            return known
        shell: nn.Module = object.__new__(type(module))
        self._shells[id(module)] = shell
        for key, value in module.__dict__.items():
            if "hooks" in key and isinstance(value, (dict, OrderedDict)):
                value = OrderedDict()
            elif isinstance(value, Tensor):
                value = self.create_proxy("get_attr", key, (), {})
            elif type(value) in (list, dict, set, OrderedDict):
                value = value.copy()
            shell.__dict__[key] = value
        for place in ("_parameters", "_buffers"):
            tensors = shell.__dict__[place]
            for key, value in tensors.items():
                if value is not None:
                    tensors[key] = self.create_proxy("get_attr", key, (), {})
        children = shell.__dict__["_modules"]
        for key, child in children.items():
            if child is not None:
                children[key] = self.wrap(child)
        return shell


class _Proxy(fx.Proxy):
    def __getattr__(self, k: str) -> Any:
        return _Attribute(self, k)

    def __len__(self) -> int:
        raise TypeError("a proxy's length is not known")  # list() and * accept this error


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    target = getattr(operator, name)

    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


# torch's own proxies have no `+=`, so Python would compute an out-of-place addition.
for _name in (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class _Attribute(fx.proxy.Attribute):
    def __getattr__(self, k: str) -> Any:
        return _Attribute(self, k)

    __len__ = _Proxy.__len__

    def __iadd__(self, other: Any) -> Any:  # x.data += 1
        raise TypeError("an attribute is not changed in place")

    __isub__ = __imul__ = __itruediv__ = __iadd__


class _Stub:
    """Replaces a leaf: records calls and takes everything else from the module itself."""

    def __init__(self, tracer: _Tracer, module: nn.Module) -> None:
        self.__dict__["_tracer"], self.__dict__["_module"] = tracer, module

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # for isinstance(): the module's class
        return type(self.__dict__["_module"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        code = sys._getframe(1).f_code
        return self.__dict__["_tracer"].call(self.__dict__["_module"], code, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        code = sys._getframe(1).f_code
        return self.__dict__["_tracer"].call(self.__dict__["_module"], code, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        tracer, module = self.__dict__["_tracer"], self.__dict__["_module"]
        value = getattr(module, name)
        if isinstance(value, nn.Module):
            return tracer.wrap(value)
        if isinstance(value, MethodType) and value.__self__ is module:
            return MethodType(value.__func__, tracer.shell(module))
        return value

    def __getitem__(self, key: Any) -> Any:
        return self.__dict__["_tracer"].shell(self.__dict__["_module"])[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__dict__["_tracer"].shell(self.__dict__["_module"]))

    def __len__(self) -> int:
        return len(self.__dict__["_module"])

    def __bool__(self) -> bool:
        return bool(self.__dict__["_module"])


def is_shape(node: fx.Node) -> bool:
    """True if a node holds sizes, not values: ``x.shape``, ``x.size()``, or parts of them."""
    while node.op == "call_function" and node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] == "shape"
    return node.op == "call_method" and node.target == "size"
