"""Traces of a whole model, indexed by its layers: where a module is called, and by which module."""

from __future__ import annotations

from collections.abc import Iterable
from types import CodeType

from torch import fx, nn

from torchquant.graph.modules import held_by
from torchquant.graph.trace import Trace, called_by, forward_traces

# Methods that may name a layer without calling it.
_SETUP_METHODS = ("init", "reset", "load", "state", "repr", "tie", "apply")


class Dataflow:
    """The traces of every module above some layers.

    Like torch's own tools, this class assumes that a module's children are called by its forward,
    by the forward of a module above it, or by methods that these forwards call.

    Args:
        model: the model.
        layers: modules of the model; the modules that contain them are traced.
    """

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        wanted = {id(layer) for layer in layers}
        self.names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self.callers: dict[int, list[nn.Module]] = {}
        self.traces: dict[int, list[Trace]] = {}
        self.calls: dict[int, list[tuple[Trace, fx.Node]]] = {}
        for module in called_by(model):
            for child in held_by(module):
                self.callers.setdefault(id(child), []).append(module)
            if any(id(below) in wanted for below in module.modules()):
                self.traces[id(module)] = forward_traces(module)
        for traces in self.traces.values():
            for trace in traces:
                for node, module in trace.modules.items():
                    self.calls.setdefault(id(module), []).append((trace, node))

    def name(self, module: nn.Module) -> str:
        """The module's path in the model."""
        return self.names.get(id(module), "?")

    def why_not_traced(self, module: nn.Module) -> str | None:
        """Why the traces do not show all uses of ``module``, or None if they do."""
        callers = self.callers.get(id(module), [])
        for caller in callers:
            for trace in self.traces.get(id(caller), []):
                if trace.failure is not None:
                    kind = type(caller).__name__
                    return f"{kind}.forward could not be traced ({trace.failure})"
        for trace, node in self.calls.get(id(module), []):
            # Another module calls this one, and its trace may miss calls. A Sequential inside that
            # module cannot miss any: its forward holds no branches.
            if trace.failure is not None and trace.code[node] is not nn.Sequential.forward.__code__:
                kind = type(trace.root).__name__
                return f"{kind}.forward calls it too, and could not be traced ({trace.failure})"
        return self._other_method(module, callers)

    def in_order(
        self, model: nn.Module, layers: Iterable[nn.Module]
    ) -> tuple[list[nn.Module], str | None]:
        """``layers`` in the order of their calls, one entry per call.

        Returns:
            The calls, and the reason why some of them are in the order of registration instead, or
            None.
        """
        wanted = {id(layer) for layer in layers}
        order: list[nn.Module] = []
        problems: list[str] = []

        def visit(module: nn.Module) -> None:
            if id(module) in wanted:
                order.append(module)
            elif any(id(below) in wanted for below in module.modules()):
                traces = self.traces.get(id(module), [])
                whole = next((trace for trace in traces if trace.failure is None), None)
                if whole is None:
                    failure = (
                        f"could not be traced ({traces[0].failure})" if traces else "was not traced"
                    )
                    problems.append(f"{type(module).__name__}.forward {failure}")
                for below in held_by(module) if whole is None else whole.modules.values():
                    visit(below)

        visit(model)
        return order, problems[0] if problems else None

    def _other_method(self, module: nn.Module, callers: list[nn.Module]) -> str | None:
        """A second method that uses the layer, whose use of it the traces do not show; or None."""
        seen = {trace.code[node] for trace, node in self.calls.get(id(module), [])}
        for caller in callers:
            attributes = {name for name, child in caller._modules.items() if child is module}
            for cls in type(caller).__mro__:
                if cls.__module__.startswith("torch."):
                    continue
                for name, method in vars(cls).items():
                    code = getattr(method, "__code__", None)
                    setup = any(word in name for word in _SETUP_METHODS)
                    if code is None or setup or code in seen or name == "forward":
                        continue
                    if attributes & set(_names_in(code)):
                        return f"{cls.__name__}.{name} uses it too, and is not called by forward"
        return None


def _names_in(code: CodeType) -> Iterable[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
