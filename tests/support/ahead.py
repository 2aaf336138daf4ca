"""Processes of later tests, started while an earlier test waits for its own.

Some tests only wait for a long process that computes on one core: a script, a compiler, tests on
another path. A module of such tests starts as many of them at a time as there are cores.
"""

import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from subprocess import CompletedProcess
from typing import Any, TypeVar

import pytest

K = TypeVar("K", bound=Hashable)
MOST = 4  # processes at a time: each takes hundreds of megabytes


def selected(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """The values that the tests to run in this module have for parameter `name`, each once."""
    found = (
        item.callspec.params[name]
        for item in request.session.items
        if getattr(item, "module", None) is request.module
        and name in getattr(getattr(item, "callspec", None), "params", {})
    )
    return list(dict.fromkeys(found))


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
