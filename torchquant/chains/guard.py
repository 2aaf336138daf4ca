"""What a region relies on: modules, their classes, what their forwards read, their training mode.

An expectation is a place, a name in it, and the value. Values are compared by identity, and plain
ones by value too, because numbers become new objects in a copy or a pickle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, Literal

import torch
from torch import nn

from torchquant._extension import load
from torchquant.chains.arguments import attributes_of
from torchquant.chains.root import NAMES
from torchquant.graph.modules import HOOKS
from torchquant.graph.names import Names, names_read
from torchquant.graph.trace import Trace
from torchquant.nn.base import QuantizedModule

_Guard = load().Guard
_INTERNAL = frozenset(
    (
        *HOOKS,
        *NAMES,
        *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
        *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"),
        *("_load_state_dict_post_hooks", "training", "_is_full_backward_hook"),
    )
)
_PLAIN = (bool, int, float, str, tuple, type(None))
_OF_NORMS = "_torchquant_original_class"
_CODE = (type, ModuleType, FunctionType, nn.Module, torch.Tensor)

Where = Literal["attribute", "_modules", "_parameters", "_buffers", "class", "variable"]


class Absent:
    """Stands for no value; the class itself does, which pickles as what it is."""


@dataclass(eq=False)
class Expectation:
    """What is expected of an object.

    Args:
        owner: a module or another object with attributes; a class; the variables of a Python
            module; a list or a dictionary.
        name: the name of an attribute, a child, a variable; "" stands for the class of the owner,
            for the contents of a list or of a dictionary, or for all children.
        value: the expected value, or :class:`Absent`.
        where: in which of the owner's dictionaries the name is looked up.
        label: what a message calls it.
    """

    owner: Any
    name: str
    value: Any
    where: Where
    label: str

    @property
    def place(self) -> Any:
        """What holds the value: a dictionary, a class, a list."""
        if self.where in ("class", "variable"):
            return self.owner
        if self.where == "attribute":
            return vars(self.owner) if self.name else self.owner
        return vars(self.owner)[self.where]

    @property
    def is_mode(self) -> bool:
        """True if the training mode is expected."""
        return self.where == "attribute" and self.name == "training"

    def found(self) -> Any:
        """The value that is there."""
        place = vars(self.owner) if self.where == "class" else self.place
        if self.name:
            return place.get(self.name, Absent)
        return _contents(place) if isinstance(place, (list, dict)) else _class_of(place)

    def holds(self) -> bool:
        """True if the value is the expected one."""
        return _is_same(self.found(), self.value)

    def entry(self) -> tuple[Any, str | None, Any]:
        """The entry of the C++ guard, with the value that is there if it holds."""
        found, place = self.found(), self.place
        value = found if _is_same(found, self.value) else self.value
        if value is found and isinstance(value, type) and not self.name:
            value = type(place)
        value = _Guard.ABSENT if value is Absent else value
        return place, self.name or None, value


class Expected:
    """Everything that has to stay as it is for a record of a module's forward to hold.

    Copies and pickles expect the same of the modules, and of classes and variables what is there
    when they are made.

    Args:
        root: the module.
        trace: the record.

    Example:
        >>> from torchquant.graph.trace import trace
        >>> net = nn.Sequential(nn.ReLU()).eval()
        >>> expected = Expected(net, trace(net, lambda module: True))
        >>> net.append(nn.GELU())
        Sequential(
          (0): ReLU()
          (1): GELU(approximate='none')
        )
        >>> expected.change().label
        'a child of Sequential'
    """

    def __init__(self, root: nn.Module, trace: Trace) -> None:
        self.root, self.trace = root, trace
        self.lost: Expectation | None = None  # of a class or variable, before a copy was made
        names = names_read(_followed(root, trace).values())
        self.of_modules = _of_modules(root, trace, names)
        self._make(_of_code(root, trace, names))

    def _make(self, of_code: list[Expectation]) -> None:
        self.of_code: list[Expectation] | None = of_code
        self.every = [*self.of_modules, *of_code]
        self._guard: Any = _Guard(self.entries())

    def entries(self) -> list[tuple[Any, str | None, Any]]:
        """The entries of a C++ guard."""
        return [one.entry() for one in self.every]

    def change(self, *, modes: bool = True) -> Expectation | None:
        """What is not as it was, or None; ``modes=False`` leaves out the training modes."""
        if self.lost is not None:
            return self.lost
        if self._guard is None:  # a copy
            broken = [one for one in self.of_modules if not one.holds()]
            if broken:
                return next((one for one in broken if modes or not one.is_mode), None)
            names = names_read(_followed(self.root, self.trace).values())
            self._make(_of_code(self.root, self.trace, names))
        for _ in range(2):
            if self._guard.holds():
                return None
            broken = [self.every[index] for index in self._guard.broken()]
            broken = [one for one in broken if not one.holds()]
            if broken:
                return next((one for one in broken if modes or not one.is_mode), None)
            self._guard = _Guard(self.entries())  # equal values in the places of the old ones
        return None

    def __getstate__(self) -> dict[str, Any]:
        lost = self.lost
        if lost is None and self.of_code is not None:
            changed = next((one for one in self.of_code if not one.holds()), None)
            lost = changed and Expectation(None, changed.name, None, changed.where, changed.label)
        dropped = {"lost": lost, "of_code": None, "every": None, "_guard": None}
        return {**self.__dict__, **dropped}


def _contents(value: list[Any] | dict[Any, Any]) -> tuple[Any, ...]:
    if isinstance(value, list):
        return tuple(value)
    return tuple(part for item in value.items() for part in item)


def _class_of(owner: Any) -> type:
    """The class of an object; that of an activation which a layer computes is not its own."""
    cls = type(owner)
    original: type = getattr(cls, "original_class", getattr(cls, _OF_NORMS, cls))
    return original


def _is_same(found: Any, value: Any) -> bool:
    if found is value:
        return True
    if type(found) is not type(value) or not isinstance(found, _PLAIN):
        return False
    if isinstance(found, tuple):
        return len(found) == len(value) and all(map(_is_same, found, value))
    return bool(found == value)


def _followed(root: nn.Module, trace: Trace) -> dict[str, nn.Module]:
    """The modules whose forwards were followed, and those that hold what is called, by path."""
    paths = {"", *(scope.path for scope in trace.scopes)}
    for call in trace.calls:
        if call.kind in ("module", "tensor"):
            paths.update(_owners(call.target))
    for path in tuple(paths):
        paths.update(_owners(path))
    return {path: root.get_submodule(path) for path in sorted(paths)}


def _called(root: nn.Module, trace: Trace) -> dict[str, nn.Module]:
    paths = {call.target for call in trace.calls if call.kind == "module"}
    return {path: root.get_submodule(path) for path in sorted(paths)}


def _owners(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _of_modules(root: nn.Module, trace: Trace, names: Names) -> list[Expectation]:
    found: list[Expectation] = []
    followed, called = _followed(root, trace), _called(root, trace)
    for path in dict.fromkeys((*followed, *called)):
        owner, _, name = path.rpartition(".")
        if path:
            found.append(_child(followed[owner], name))
    attributes = frozenset(names.attributes - _INTERNAL)
    modules = {id(module): module for module in followed.values()}
    for module in modules.values():
        found += _of_followed(module, names, attributes, module is root)
    for module in {id(module): module for module in called.values()}.values():
        if id(module) not in modules:
            found += _of_called(module)
    return found


def _child(module: nn.Module, name: str) -> Expectation:
    label = f"{type(module).__name__}.{name}"
    return Expectation(module, name, module._modules.get(name, Absent), "_modules", label)


def _of_followed(
    module: nn.Module, names: Names, attributes: frozenset[str], is_root: bool
) -> Iterator[Expectation]:
    """What is expected of a module whose forward was followed."""
    kind = type(module).__name__
    yield Expectation(module, "", _class_of(module), "attribute", f"the class of a {kind}")
    if not is_root:
        yield Expectation(module, "forward", Absent, "attribute", f"{kind}.forward")
    if reads_mode(module):
        yield Expectation(module, "training", False, "attribute", f"{kind}.training")
    own = vars(module)
    children = module._modules
    if names.every or hasattr(type(module), "__iter__") or hasattr(type(module), "__getitem__"):
        yield Expectation(module, "", _contents(children), "_modules", f"a child of {kind}")
    else:
        yield from (_child(module, name) for name in children if name in attributes)
    read = own.keys() - _INTERNAL if names.every else own.keys() & attributes
    for name in sorted(read):
        yield from _of_value(module, name, own[name], attributes)
    for name in sorted(attributes - own.keys()):
        label = f"{kind}.{name}"
        if name in names.texts or hasattr(type(module), name):
            yield Expectation(module, name, Absent, "attribute", label)
        for where in ("_modules", "_parameters", "_buffers"):
            place = own[where]
            if (name in place and place[name] is None) or (
                name in names.texts and name not in place
            ):
                value = None if name in place else Absent
                yield Expectation(module, name, value, where, label)


def _of_value(
    owner: Any, name: str, value: Any, attributes: frozenset[str]
) -> Iterator[Expectation]:
    """What is expected of an attribute, of its contents, and of its own attributes."""
    label = f"{type(owner).__name__}.{name}"
    yield Expectation(owner, name, value, "attribute", label)
    if type(value) in (list, dict):
        yield Expectation(value, "", _contents(value), "attribute", label)
    elif not isinstance(value, (*_PLAIN, *_CODE)) and isinstance(
        getattr(value, "__dict__", 0), dict
    ):
        yield Expectation(value, "", _class_of(value), "attribute", f"the class of {label}")
        for inner in sorted(attributes):
            inside = vars(value).get(inner, Absent)
            if inside is not Absent or hasattr(type(value), inner):
                text = f"{label}.{inner}"
                yield Expectation(value, inner, inside, "attribute", text)


def _of_called(module: nn.Module) -> Iterator[Expectation]:
    """What is expected of a module whose call is one entry of the record."""
    kind = type(module).__name__
    yield Expectation(module, "", _class_of(module), "attribute", f"the class of a {kind}")
    yield Expectation(module, "forward", Absent, "attribute", f"{kind}.forward")
    for one in module.modules():
        if reads_mode(one):
            yield Expectation(one, "training", False, "attribute", f"{type(one).__name__}.training")
    names: Any = attributes_of(module)
    if isinstance(module, QuantizedModule):
        own = vars(module)
        names = [
            n for n in own if (n not in _INTERNAL and isinstance(own[n], _PLAIN)) or n == "config"
        ]
    for name in names:
        yield Expectation(module, name, vars(module)[name], "attribute", f"{kind}.{name}")


def _of_code(root: nn.Module, trace: Trace, names: Names) -> list[Expectation]:
    """What is expected of classes, and of the variables of Python modules."""
    found = []
    for cls in names.classes:
        for name in sorted(names.attributes):
            found.append(_of_class(cls, name))
    modules = [*_followed(root, trace).values(), *_called(root, trace).values()]
    every = dict.fromkeys(cls for module in modules for cls in type(module).__mro__)
    for cls in every:
        if cls not in names.classes and issubclass(cls, nn.Module) and "forward" in vars(cls):
            found.append(_of_class(cls, "forward"))
    for place, name in names.variables:
        label = f"{place.get('__name__', '')}.{name}"
        value = place.get(name, Absent)
        found.append(Expectation(place, name, value, "variable", label))
        if type(value) in (list, dict):
            found.append(Expectation(value, "", _contents(value), "attribute", label))
    return found


def _of_class(cls: type, name: str) -> Expectation:
    value = vars(cls).get(name, Absent)
    return Expectation(cls, name, value, "class", f"{cls.__name__}.{name}")


def reads_mode(module: nn.Module) -> bool:
    """True if a method of the module's class names the attribute ``training``.

    Example:
        >>> reads_mode(nn.Dropout()), reads_mode(nn.ReLU())
        (True, False)
    """
    if isinstance(module, (QuantizedModule, nn.Identity)):
        return False
    classes = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    functions = (value for cls in classes for value in vars(cls).values())
    codes = (getattr(value, "__code__", None) for value in functions)
    return any(code is not None and "training" in code.co_names for code in codes)


__all__ = ["Expected"]
