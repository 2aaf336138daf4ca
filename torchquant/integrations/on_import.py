"""Run a function when another library is imported, without importing it.

``import torchquant`` does not import peft, transformers or diffusers, which take seconds. Where
torchquant extends such a library, it does so when the program imports it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, extend: Callable[[ModuleType], None]) -> None:
    """Call ``extend`` with the module ``name``: now if it is imported, otherwise when it is.

    An error of ``extend`` becomes a warning, so that it cannot break the import of the library.

    Example:
        >>> when_imported("sys", lambda module: print(module.__name__))
        sys
    """
    module = sys.modules.get(name)
    if module is not None:
        _extend(module, extend)
        return
    _FINDER.waiting.setdefault(name, []).append(extend)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


class _Finder(MetaPathFinder):
    """Finds no module itself. It lets the loader of a module that is waited for run functions."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(name, path, target)
            if spec is not None:
                self._wrap(spec.loader, name)
                return spec
        return None

    def _wrap(self, loader: Any, name: str) -> None:
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for extend in self.waiting.pop(name, []):
                _extend(module, extend)

        try:
            loader.exec_module = exec_module
        except (AttributeError, TypeError):  # a loader of another kind, without attributes
            return


def _extend(module: ModuleType, extend: Callable[[ModuleType], None]) -> None:
    try:
        extend(module)
    except Exception as error:
        version = getattr(module, "__version__", "")
        warnings.warn(
            f"torchquant cannot extend {f'{module.__name__} {version}'.strip()}: "
            f"{type(error).__name__}: {error}; install a version that torchquant supports",
            stacklevel=2,
        )


_FINDER = _Finder()
