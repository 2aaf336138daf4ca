"""Extend a function of another library: the extension gets the original as its first argument."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

_MARK = "_torchquant_extends"


def extend(owner: Any, name: str, extension: Callable[..., Any]) -> None:
    """Replace a function of a class or module by ``extension(original, *args, **kwargs)``, once.

    Raises:
        AttributeError: there is no such function.

    Example:
        >>> class Greeter:
        ...     def greet(self, name):
        ...         return f"hello {name}"
        >>> extend(Greeter, "greet", lambda original, self, name: original(self, name).upper())
        >>> Greeter().greet("you")
        'HELLO YOU'
    """
    original = getattr(owner, name)
    if is_extended(owner, name) and name in vars(owner):
        return

    @functools.wraps(original)
    def extended(*args: Any, **kwargs: Any) -> Any:
        return extension(original, *args, **kwargs)

    setattr(extended, _MARK, True)
    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(extended) if static else extended)


def is_extended(owner: Any, name: str) -> bool:
    """True if :func:`extend` has replaced the method, in the class or in a base class.

    Example:
        >>> is_extended(dict, "items")
        False
    """
    return getattr(getattr(owner, name, None), _MARK, False) is True
