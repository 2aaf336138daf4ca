"""The Python functions of a module: its methods and what decorators hide in them. None is run."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

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
        for name, value in list(place.items()):
            if name in overridden:
                continue
            codes = list(_codes(value, _MAX_DEPTH))
            if codes and not any("super" in code.co_names for code in codes):
                overridden.add(name)
            for code in codes:
                if id(code) not in seen:
                    seen.add(id(code))
                    yield name, code


def forward_codes(module: nn.Module) -> list[CodeType]:
    """The code of the module's forward; first its wrappers, if it is decorated.

    Example:
        >>> [code.co_name for code in forward_codes(nn.ReLU())]
        ['forward']
    """
    if isinstance(module, torch.jit.ScriptModule):
        return []
    return list(_codes(module.__dict__.get("forward", type(module).forward), _MAX_DEPTH))


def _codes(value: Any, depth: int) -> Iterator[CodeType]:
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        value = value.__func__
    if isinstance(value, property):
        for function in (value.fget, value.fset):
            yield from _codes(function, depth)
        return
    if not isinstance(value, FunctionType) or depth == 0:
        return
    yield value.__code__
    hidden = [cell.cell_contents for cell in value.__closure__ or () if _has_contents(cell)]
    for inner in [getattr(value, "__wrapped__", None), *hidden]:
        if isinstance(inner, (FunctionType, MethodType)):
            yield from _codes(inner, depth - 1)


def _has_contents(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
