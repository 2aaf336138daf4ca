"""Processes of later tests, started while earlier tests run.

Some tests only wait for a long process: a script, a compiler, tests on another path. The module of
such tests has a function ``processes_ahead``, which says what its tests will ask for. All of these
processes run one after the other beside the tests, from the session's first test on; a test whose
process has not begun runs it itself. The function takes the environment and the folder of the
processes when it is called: tests change those of this process for a moment.
"""

import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import Any, TypeVar

import pytest

K = TypeVar("K", bound=Hashable)
MOST = 4  # processes at a time: each takes hundreds of megabytes
Run = Callable[[Any], "CompletedProcess[str]"]
NewFolder = Callable[[str], Path]


class Selection:
    """The tests of one module that this session runs."""

    def __init__(self, items: Iterable[pytest.Item], module: ModuleType) -> None:
        self.items = [item for item in items if getattr(item, "module", None) is module]

    def values(self, name: str) -> list[Any]:
        """The values that the tests have for parameter `name`, each once."""
        calls = (getattr(item, "callspec", None) for item in self.items)
        found = (call.params[name] for call in calls if call is not None and name in call.params)
        return list(dict.fromkeys(found))

    def has(self, test: Callable[..., Any]) -> bool:
        """Whether the test is among them."""
        name = test.__name__
        return any(getattr(item, "originalname", item.name) == name for item in self.items)


class Processes:
    """The results of the processes of all modules, by module and key."""

    def __init__(self, session: pytest.Session, new_folder: NewFolder, pool: ThreadPoolExecutor):
        modules = dict.fromkeys(getattr(item, "module", None) for item in session.items)
        self._runs: dict[ModuleType, Run] = {}
        self._futures: dict[tuple[ModuleType, Hashable], Future[CompletedProcess[str]]] = {}
        for module in modules:
            if hasattr(module, "processes_ahead"):
                run, keys = module.processes_ahead(Selection(session.items, module), new_folder)
                self._runs[module] = run
                for key in keys:
                    self._futures[module, key] = pool.submit(run, key)

    def keys(self, module: ModuleType) -> list[Any]:
        """What the tests of the module will ask for."""
        return [key for owner, key in self._futures if owner is module]

    def result(self, module: ModuleType, key: Hashable) -> "CompletedProcess[str]":
        """The ended process; it runs now, in this thread, if it has not begun."""
        future = self._futures[module, key]
        if future.cancel():
            future = self._futures[module, key] = Future()
            future.set_result(self._runs[module](key))
        return future.result()


@contextmanager
def processes_of(session: pytest.Session, new_folder: NewFolder) -> Iterator[Processes]:
    """Start the processes of all modules; at the end nothing more is started.

    One core is left for the tests themselves.
    """
    with ThreadPoolExecutor(max(1, min((os.cpu_count() or 1) - 1, MOST))) as pool:
        try:
            yield Processes(session, new_folder, pool)
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def ahead(
    run: Callable[[K], "CompletedProcess[str]"], keys: Iterable[K]
) -> Iterator[Callable[[K], "CompletedProcess[str]"]]:
    """Call `run` on every key, in order, on as many threads as there are cores.

    Yields a function that waits for the result of one key. At the end nothing more is started.
    """
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST)) as pool:
        futures: dict[K, Future[CompletedProcess[str]]] = {
            key: pool.submit(run, key) for key in keys
        }
        try:
            yield lambda key: futures[key].result()
        finally:
            pool.shutdown(cancel_futures=True)
