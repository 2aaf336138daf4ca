"""The order in which a model's forward mentions its layers, read from bytecode; no code runs."""

from __future__ import annotations

import dis
from collections.abc import Iterable
from types import CodeType

from torch import nn

from torchquant.graph.functions import forward_codes
from torchquant.graph.modules import is_container


def in_order(model: nn.Module, layers: Iterable[nn.Module]) -> tuple[list[nn.Module], str | None]:
    """``layers`` in the order in which the forward of each module mentions its children.

    Modules in containers are taken in the order of the container.

    Returns:
        The layers, each once, and why some of them are in the order of registration instead; None
        if there are no such layers.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.head, self.body = nn.Linear(4, 2), nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return self.head(self.body(x))
        >>> net = Net()
        >>> order, problem = in_order(net, [net.head, net.body])
        >>> order == [net.body, net.head], problem
        (True, None)
    """
    wanted = {id(layer) for layer in layers}
    order: list[nn.Module] = []
    seen: set[int] = set()
    problems: list[str] = []

    def visit(module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if id(module) in wanted:
            order.append(module)
            return
        children = {name: child for name, child in module._modules.items() if child is not None}
        below = [c for c in children.values() if any(id(m) in wanted for m in c.modules())]
        if not below:
            return
        if is_container(module) or type(module).forward is nn.Sequential.forward:
            first = list(children.values())
        else:
            first = [children[name] for name in _mentioned(module) if name in children]
        missed = [child for child in below if not any(child is known for known in first)]
        if missed:
            names = ", ".join(name for name, c in children.items() if any(c is m for m in missed))
            problems.append(f"{type(module).__name__}.forward does not name {names}")
        for child in [*first, *missed]:
            visit(child)

    visit(model)
    if is_container(model):
        problems.append(f"{type(model).__name__} has no forward")
    return order, problems[0] if problems else None


def _mentioned(module: nn.Module) -> list[str]:
    """The attributes that the forward and the methods that it calls read, in order of evaluation.

    In ``self.head(self.body(x))``, the call of ``body`` comes first. The order of calls is that of
    the call instructions, which come after their arguments.
    """
    return _names(module, "forward", 0)


def _names(module: nn.Module, method: str, depth: int) -> list[str]:
    names: list[str] = []
    codes = forward_codes(module) if method == "forward" else _method_codes(module, method)
    for code in codes:
        pending: list[str] = []
        for instruction in dis.get_instructions(code):
            name = instruction.opname
            if name in ("LOAD_ATTR", "LOAD_METHOD"):
                pending.append(str(instruction.argval))
            elif name.startswith("CALL"):
                if pending:
                    names += _expanded(module, pending.pop(), depth)
            elif name in ("STORE_FAST", "POP_TOP", "RETURN_VALUE", "FOR_ITER", "GET_ITER"):
                for read in pending:
                    names += _expanded(module, read, depth)
                pending.clear()
        for read in pending:
            names += _expanded(module, read, depth)
    return names


def _expanded(module: nn.Module, name: str, depth: int) -> list[str]:
    """The name of a child; for a method of the module, the names that the method mentions."""
    if name in module._modules or depth >= 3:
        return [name]
    return _names(module, name, depth + 1) if _method_codes(module, name) else []


def _method_codes(module: nn.Module, name: str) -> list[CodeType]:
    function = getattr(type(module), name, None)
    code = getattr(function, "__code__", None)
    library = str(getattr(function, "__module__", "")).startswith("torch.nn.")
    return [] if code is None or library else [code]
