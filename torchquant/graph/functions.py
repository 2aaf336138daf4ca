"""The Python functions of a module: its methods and what decorators hide in them. None is run."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

_OF_CLASSES = (staticmethod, classmethod)
_MAX_DEPTH = 4  # decorators around a function


def codes_of(module: nn.Module) -> Iterator[tuple[str, CodeType]]:
    """The name and the code of each function that can run as a method of ``module``.

    Functions of ``torch`` itself are left out. A decorated function yields its wrapper and itself.

    Example:
        >>> class Net(nn.Module):
        ...     def forward(self, x):
        ...         return x
        >>> [name for name, _ in codes_of(Net())]
        ['forward']
    """
    for name, function, _ in functions_of(module):
        yield name, function.__code__


def functions_of(module: nn.Module) -> Iterator[tuple[str, FunctionType, bool]]:
    """The name of each function of :func:`codes_of`, the function, and if the module is its owner.

    The owner is the first argument. A static method has none, nor has a function that was assigned
    to an attribute of the module.

    Example:
        >>> [*functions_of(nn.ReLU())]
        []
    """
    if isinstance(module, torch.jit.ScriptModule):
        return
    seen: set[int] = set()
    overridden: set[str] = set()
    places = [vars(module), *map(vars, type(module).__mro__)]
    for place in places:
        if (
            place.get("__module__", "").startswith("torch.nn.")
            or place.get("__module__") == "builtins"
        ):
            continue
        own = place is vars(module)
        for name, value in list(place.items()):
            if name in overridden:
                continue
            functions = list(_functions(value, _MAX_DEPTH))
            if functions and not any("super" in one.__code__.co_names for one in functions):
                overridden.add(name)
            for function in functions:
                if id(function.__code__) not in seen:
                    seen.add(id(function.__code__))
                    plain = isinstance(value, FunctionType) and own
                    yield name, function, not plain and not isinstance(value, _OF_CLASSES)


def forward_codes(module: nn.Module) -> list[CodeType]:
    """The code of the module's forward; first its wrappers, if it is decorated.

    Example:
        >>> [code.co_name for code in forward_codes(nn.ReLU())]
        ['forward']
    """
    if isinstance(module, torch.jit.ScriptModule):
        return []
    forward = module.__dict__.get("forward", type(module).forward)
    return [function.__code__ for function in _functions(forward, _MAX_DEPTH)]


def _functions(value: Any, depth: int) -> Iterator[FunctionType]:
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        value = value.__func__
    if isinstance(value, property):
        for function in (value.fget, value.fset):
            yield from _functions(function, depth)
        return
    if not isinstance(value, FunctionType) or depth == 0:
        return
    yield value
    hidden = [cell.cell_contents for cell in value.__closure__ or () if _has_contents(cell)]
    for inner in [getattr(value, "__wrapped__", None), *hidden]:
        if isinstance(inner, (FunctionType, MethodType)):
            yield from _functions(inner, depth - 1)


def _has_contents(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
