"""Which names the forwards of some modules may read: attributes, and variables of Python modules.

The functions that a forward can reach are found by name, in the classes of all the modules, so that
a name is never missed; some of the names are read by none of them. Nothing is run.
"""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

# Methods that Python calls without naming them.
_IMPLICIT = ("__call__", "__contains__", "__getattr__", "__getattribute__", "__getitem__")
_STARTS = ("forward", "__iter__", "__len__", "__bool__", *_IMPLICIT)
# With these, a function can read attributes whose names are not in its code.
_OPEN_NAMES = """getattr vars __dict__ __getattribute__ children named_children modules _modules
    named_modules get_submodule get_parameter get_buffer _parameters _buffers parameters buffers
    named_parameters named_buffers attrgetter"""
_OPEN = frozenset(_OPEN_NAMES.split())


@dataclass(frozen=True)
class Names:
    """What the forwards of some modules may read.

    Args:
        attributes: the names of attributes, and all texts in the code, which may be names too.
        texts: the texts alone.
        every: True if the code can also read attributes that it does not name.
        variables: the variables of Python modules: the dictionary of the module, and the name.
        classes: the classes in which the functions were looked for.
    """

    attributes: frozenset[str]
    texts: frozenset[str]
    every: bool
    variables: tuple[tuple[dict[str, Any], str], ...]
    classes: tuple[type, ...]


def names_read(modules: Iterable[nn.Module]) -> Names:
    """The names that the forwards of modules may read, with all functions that they can reach.

    Functions of ``torch`` are not looked at.

    Example:
        >>> class Net(nn.Module):
        ...     def forward(self, x):
        ...         return self.act(x) * SCALE if self.flag else x
        ...     def act(self, x):
        ...         return x + self.offset
        >>> sorted(names_read([Net()]).attributes - {"forward"})
        ['SCALE', 'act', 'flag', 'offset']
    """
    modules = list(modules)
    classes = tuple(dict.fromkeys(cls for module in modules for cls in own_classes(type(module))))
    search = _Search(classes, modules)
    search.run()
    return Names(
        frozenset(search.names),
        frozenset(search.texts),
        bool(_OPEN & search.names),
        tuple(search.variables.values()),
        classes,
    )


def own_classes(cls: type) -> Iterator[type]:
    """The class and its bases, but for ``nn.Module``, what is below it, and classes of torch.

    Example:
        >>> class Net(nn.Sequential):
        ...     pass
        >>> [cls.__name__ for cls in own_classes(Net)]
        ['Net']
    """
    for base in cls.__mro__:
        if base is nn.Module:
            return
        if not _is_of_torch(base.__module__) and base is not object:
            yield base


class _Search:
    def __init__(self, classes: tuple[type, ...], modules: list[nn.Module]) -> None:
        self.places: list[Any] = [*map(vars, classes), *(vars(module) for module in modules)]
        self.names: set[str] = set()
        self.texts: set[str] = set()
        self.variables: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
        self.seen: set[int] = set()
        self.waiting: list[FunctionType] = []

    def run(self) -> None:
        """Follow the forwards until no new function is found."""
        self._add_names(_STARTS)
        self.names = {"forward"}
        while self.waiting:
            function = self.waiting.pop()
            for code in _with_inner(function.__code__):
                self._add_names(code.co_names)
                texts = [text for text in _texts(code.co_consts) if text.isidentifier()]
                self.texts.update(texts)
                self._add_names(texts)
                for name in _variables(code):
                    if name in function.__globals__:
                        self._add_variable(function.__globals__, name)
            for cell in function.__closure__ or ():
                try:
                    self._add_functions(cell.cell_contents)
                except ValueError:  # the cell is empty
                    continue

    def _add_names(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self.names:
                continue
            self.names.add(name)
            for place in self.places:
                if name in place:
                    self._add_functions(place[name])

    def _add_variable(self, place: dict[str, Any], name: str) -> None:
        if (id(place), name) not in self.variables:
            self.variables[id(place), name] = (place, name)
            self._add_functions(place[name])

    def _add_functions(self, value: Any) -> None:
        if isinstance(value, property):
            for part in (value.fget, value.fset):
                self._add_functions(part)
            return
        if isinstance(value, (staticmethod, classmethod, MethodType)):
            value = value.__func__
        if isinstance(value, FunctionType) and id(value) not in self.seen:
            self.seen.add(id(value))
            if not _is_of_torch(value.__module__):
                self.waiting.append(value)


def _is_of_torch(module: Any) -> bool:
    return str(module).partition(".")[0] == "torch"


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


def _texts(constants: Iterable[Any]) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, (tuple, frozenset)):
            yield from _texts(constant)


def _variables(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield str(instruction.argval)


__all__ = ["names_read"]
