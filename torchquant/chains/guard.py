"""What a region relies on: the modules below its root, their attributes, their training mode.

An expectation is a module, the name of one of its attributes, and the value. It is compared by
identity, and by value after a copy or a pickle, in which numbers become new objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchquant.chains.arguments import attributes_of
from torchquant.graph.modules import HOOKS
from torchquant.graph.trace import Trace
from torchquant.nn.base import QuantizedModule

_INTERNAL = frozenset(
    (
        *HOOKS,
        *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "forward"),
        *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"),
        *("_load_state_dict_post_hooks", "training", "_is_full_backward_hook"),
    )
)
_PLAIN = (bool, int, float, str, tuple, type(None))


@dataclass(eq=False)
class Expectation:
    """An attribute, or a child, of a module and its expected value."""

    module: nn.Module
    name: str
    value: Any
    child: bool = False

    @property
    def place(self) -> dict[str, Any]:
        """The dictionary that holds the attribute or the child."""
        return self.module._modules if self.child else self.module.__dict__

    def holds(self) -> bool:
        """True if the attribute has the value."""
        found = self.place.get(self.name, _MISSING)
        if found is self.value:
            return True
        same = type(found) is type(self.value) and isinstance(found, _PLAIN)
        return same and bool(found == self.value)


_MISSING = object()


def expectations(root: nn.Module, trace: Trace) -> list[Expectation]:
    """What has to stay as it is for a record of a module's forward to hold.

    Example:
        >>> from torchquant.graph.trace import trace
        >>> net = nn.Sequential(nn.ReLU()).eval()
        >>> expected = expectations(net, trace(net, lambda module: True))
        >>> net[0] = nn.GELU()
        >>> [one.name for one in expected if not one.holds()]
        ['0']
    """
    found: list[Expectation] = []
    followed = {"", *(scope.path for scope in trace.scopes)}
    called = {call.target for call in trace.calls if call.kind == "module"}
    paths = {path for full in (*followed, *called) for path in _prefixes(full)}
    seen: set[int] = set()
    for path in sorted(paths):
        module = root.get_submodule(path)
        if path:
            owner, _, name = path.rpartition(".")
            found.append(Expectation(root.get_submodule(owner), name, module, child=True))
        if id(module) in seen:
            continue
        seen.add(id(module))
        inside = [module] if path in followed else list(module.modules())
        found += (Expectation(one, "training", False) for one in inside if _reads_mode(one))
        names = _plain_names(module) if path in followed else attributes_of(module)
        found += (Expectation(module, name, module.__dict__[name]) for name in names)
    return found


def _reads_mode(module: nn.Module) -> bool:
    """True if a method of the module's class names the attribute ``training``."""
    if isinstance(module, (QuantizedModule, nn.Identity)):
        return False
    classes = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    functions = (value for cls in classes for value in vars(cls).values())
    codes = (getattr(value, "__code__", None) for value in functions)
    return any(code is not None and "training" in code.co_names for code in codes)


def _prefixes(path: str) -> Iterator[str]:
    """A path and those of the modules that hold it, but for the root."""
    yield path
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _plain_names(module: nn.Module) -> Iterator[str]:
    for name, value in module.__dict__.items():
        if name not in _INTERNAL and isinstance(value, _PLAIN):
            yield name
