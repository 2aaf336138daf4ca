"""Which layers of a model have their weight read by the code of other modules.

torchvision's Swin computes ``F.linear(x, self.qkv.weight)`` itself, T5 asks for
``self.wo.weight.dtype``. The code of all modules is inspected, without running it. Code outside of
modules is not inspected, so such code may read a layer that has no entry.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from weakref import WeakKeyDictionary

import torch
from torch import nn

from torchquant.graph.attribute_reads import ELEMENT, AttributeRead, Path, attribute_reads

# Words in the names of methods that are not part of a forward: they create, load or tie weights.
_SETUP = frozenset(
    ("extra", "init", "initialize", "load", "prune", "reset", "resize", "save", "set", "tie")
)
# Methods of containers whose results are their elements.
_VIEWS = frozenset(("children", "items", "modules", "values"))

MethodReads = tuple[tuple[str, AttributeRead], ...]


@dataclass(frozen=True)
class Reads:
    """How the code of other modules uses the weight of a layer.

    Args:
        reader: the method, such as ``T5LayerFF.forward``.
        values: False if only the weight's shape, dtype, device or type is asked for.
        changes: True if the method assigns the weight or changes it in place.

    Example:
        >>> Reads("Swin.forward", values=True).remark
        'Swin.forward reads its weight'
    """

    reader: str
    values: bool
    changes: bool = False

    @property
    def remark(self) -> str:
        """A remark for a report."""
        if self.changes:
            return f"{self.reader} changes its weight"
        if self.values:
            return f"{self.reader} reads its weight"
        return f"{self.reader} reads the dtype, device or shape of its weight"


def weight_reads(model: nn.Module) -> dict[int, Reads]:
    """The layers of a model whose weight the methods of other modules read, by the layer's id.

    If several methods use a weight, the result names the one that does most: change, read, ask.

    Example:
        >>> class Tied(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return nn.functional.linear(x, self.fc.weight)
        >>> model = Tied()
        >>> weight_reads(model)[id(model.fc)]
        Reads(reader='Tied.forward', values=True, changes=False)
    """
    found: dict[int, Reads] = {}
    for module in model.modules():
        for method, read in _reads_of(type(module)):
            for layer in _at(module, read.path):
                if layer is module:
                    continue
                new = Reads(f"{type(module).__name__}.{method}", read.values, read.changes)
                old = found.get(id(layer))
                if old is None or (new.changes, new.values) > (old.changes, old.values):
                    found[id(layer)] = new
    return found


def names_in_code(model: nn.Module) -> dict[int, set[str]]:
    """The names of attributes and variables in the methods of each module, by the module's id.

    Example:
        >>> class Net(nn.Module):
        ...     def forward(self, x):
        ...         return x @ self.matrix
        >>> net = Net()
        >>> "matrix" in names_in_code(net)[id(net)]
        True
    """
    return {
        id(module): {name for _, code in _methods(type(module)) for name in _names(code)}
        for module in model.modules()
    }


_known: WeakKeyDictionary[type[nn.Module], MethodReads] = WeakKeyDictionary()


def _reads_of(cls: type[nn.Module]) -> MethodReads:
    """The methods of a class of modules that read a weight, and what they read."""
    if cls in _known:
        return _known[cls]
    reads: dict[tuple[str, AttributeRead], None] = {}
    for name, code in _methods(cls):
        if "weight" in _names(code):
            reads.update(dict.fromkeys((name, read) for read in attribute_reads(code, "weight")))
    _known[cls] = tuple(reads)
    return _known[cls]


def _methods(cls: type[nn.Module]) -> Iterator[tuple[str, CodeType]]:
    """The methods that instances of a class have, also those that ``super()`` may call."""
    covered: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module:
            return
        module = base.__module__
        if module.partition(".")[0] == "torch":  # torchquant.convert.plan has a list
            continue
        if module.startswith("torchquant.nn."):  # they read only what any layer has
            continue
        for name, value in vars(base).items():
            code = _code(value)
            if code is None or name in covered or is_setup(name):
                continue
            if "super" not in _names(code):
                covered.add(name)
            yield name, code


def _code(value: object) -> CodeType | None:
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, (staticmethod, classmethod)):
        return None
    try:
        value = inspect.unwrap(value) if callable(value) else value  # decorators
    except ValueError:  # a circle of decorators
        return None
    return value.__code__ if isinstance(value, FunctionType) else None


def is_setup(name: str) -> bool:
    if name.startswith("__"):
        return name != "__call__"
    words = name.strip("_").split("_")
    return words[0] != "forward" and not _SETUP.isdisjoint(words)


def _names(code: CodeType) -> set[str]:
    names = set(code.co_names) | {c for c in code.co_consts if isinstance(c, str)}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def _at(module: nn.Module, path: Path) -> list[nn.Module]:
    """The modules at a path of attributes, which are not run if they are properties."""
    found: list[object] = [module]
    for name in path:
        found = [below for one in found for below in _below(one, name)]
    return [one for one in found if isinstance(one, nn.Module)]


def _below(value: object, name: str) -> list[object]:
    if isinstance(value, torch.jit.ScriptModule):
        return []
    if name == ELEMENT:
        if isinstance(value, nn.Module):
            return list(value.children())
        if isinstance(value, dict):
            return list(value.values())
        return list(value) if isinstance(value, (list, tuple)) else []
    if isinstance(value, nn.Module):
        child = value._modules.get(name)
        if child is None:
            child = value.__dict__.get(name)
        if child is not None:
            return [child]
    return [value] if name in _VIEWS else []


__all__ = ["Reads", "names_in_code", "weight_reads"]
