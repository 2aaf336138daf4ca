"""References to modules from plain Python objects: lists, dictionaries, bound methods, functions.

``nn.Module`` registers only the modules that are attributes. ``self.again = [self.fc]`` holds the
same layer a second time; when a verb replaces the layer, the list has to be changed as well.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_DEPTH = 3  # of attributes of attributes
_CONTAINERS = (dict, list, deque, tuple, set, frozenset)
_BASE = frozenset(vars(nn.Module()))
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, Tensor)


@dataclass(frozen=True)
class Held:
    """A reference to a module.

    Attributes:
        name: where it is: ``encoder.again[0]``.
        module: the module.
        container: the list or dictionary that has it, or None if it cannot be replaced there.
        key: index or key in the container.
    """

    name: str
    module: nn.Module
    container: Any = None
    key: Any = None

    def replace(self, new: nn.Module) -> bool:
        """Put ``new`` in the module's place; False if this is impossible."""
        if self.container is None:
            return False
        value = _swapped(self.container[self.key], self.module, new)
        if value is None:
            return False
        self.container[self.key] = value
        return True


def held_modules(model: nn.Module) -> dict[int, list[Held]]:
    """The references from plain Python objects to modules, by the module's id.

    Modules that are registered nowhere in the model are included. No code of the user runs: only
    ``__dict__`` and the items of Python's own containers are read.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> model.again = [model[0]]
        >>> [held.name for held in held_modules(model)[id(model[0])]]
        ['again[0]']
    """
    found: dict[int, list[Held]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if _is_ours(type(module)):
            continue
        values = vars(module)
        for attribute, value in [*values.items()]:
            if attribute in _BASE or _is(value, _PLAIN):
                continue
            where = f"{name}.{attribute}" if name else attribute
            for held in _visit(value, where, values, attribute, seen, _DEPTH):
                if held.module is not module:  # not a method of its own
                    found.setdefault(id(held.module), []).append(held)
    return found


def _visit(
    value: Any, where: str, container: Any, key: Any, seen: set[int], depth: int
) -> Iterator[Held]:
    if _is(value, nn.Module):
        yield Held(where, value, container, key)
        return
    if _is(value, types.MethodType):
        if _is(value.__self__, nn.Module):
            yield Held(where, value.__self__, container, key)
        return
    if _is(value, _PLAIN) or depth == 0 or id(value) in seen:
        return
    if _is_ours(value if _is(value, types.FunctionType) else type(value)):
        return  # an object of this library, which follows its layers by itself
    seen.add(id(value))
    deeper = depth if _is(value, _CONTAINERS) else depth - 1
    for text, item, inside, at in _parts(value, container, key):
        if not _is(item, _PLAIN):
            yield from _visit(item, f"{where}{text}", inside, at, seen, deeper)


def _parts(value: Any, container: Any, key: Any) -> Iterator[tuple[Any, Any, Any, Any]]:
    """What an object holds: its place there, the item, and where the item can be replaced."""
    inside: Any
    if _is(value, dict):
        inside = value if type(value) in (dict, OrderedDict, defaultdict) else None
        yield from ((_place(at), item, inside, at) for at, item in [*dict.items(value)])
    elif _is(value, (list, deque)):
        inside = value if type(value) in (list, deque) else None
        items = [*(list.__iter__(value) if _is(value, list) else deque.__iter__(value))]
        yield from ((_place(at), item, inside, at) for at, item in enumerate(items))
    elif _is(value, tuple):  # replaced as a whole, where its container is known
        inside = container if type(value) is tuple else None
        items = [*tuple.__iter__(value)]
        yield from ((_place(at), item, inside, key) for at, item in enumerate(items))
    elif type(value) in (set, frozenset):
        yield from (("", item, None, None) for item in [*value])
    elif _is(value, functools.partial):
        parts = (value.func, *value.args, *value.keywords.values())
        yield from (("", item, None, None) for item in parts)
    elif _is(value, types.FunctionType):
        held = (*_cells(value), *(value.__defaults__ or ()))
        yield from (("", item, None, None) for item in held)
    else:
        with suppress(AttributeError):
            attributes = object.__getattribute__(value, "__dict__")
            if type(attributes) is dict:
                yield from ((f".{at}", item, None, None) for at, item in [*attributes.items()])


def _is_ours(thing: type | types.FunctionType) -> bool:
    """True for classes and functions of this library."""
    return str(thing.__module__).partition(".")[0] == __name__.partition(".")[0]


def _place(key: Any) -> str:
    """An index or key as text; a key of the user's own class is not asked for its text."""
    return f"[{key!r}]" if type(key) in (int, str) else f"[{type(key).__name__}]"


def _is(value: Any, types: Any) -> bool:
    """Like isinstance, which would read ``value.__class__`` and so may run code of the user."""
    return issubclass(type(value), types)


def _cells(function: types.FunctionType) -> Iterator[Any]:
    """The values of a function's free variables."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # the variable has no value yet
            yield cell.cell_contents


def _swapped(value: Any, old: nn.Module, new: nn.Module) -> Any:
    """``value`` with ``new`` in place of ``old``, or None if it holds ``old`` in another way."""
    if value is old:
        return new
    if _is(value, types.MethodType) and value.__self__ is old:
        name = value.__name__
        same = getattr(type(old), name, None) is value.__func__
        return getattr(new, name, None) if same else None
    if type(value) is tuple:
        parts = [_swapped(item, old, new) for item in value]
        kept = [item if part is None else part for item, part in zip(value, parts, strict=True)]
        return None if all(part is None for part in parts) else tuple(kept)
    return None


__all__ = ["Held", "held_modules"]
