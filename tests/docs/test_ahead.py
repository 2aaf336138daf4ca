"""Processes that run beside the tests (tests/support/ahead.py)."""

import subprocess
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.ahead import NewFolder, Run, Selection, processes_of


def ended(text: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.CompletedProcess([], 0, stdout=text, stderr="")


def module_of(run: Run, name: str = "name") -> ModuleType:
    """A module whose tests wait for one process for each value of a parameter."""
    module = ModuleType("waiting")

    def processes_ahead(tests: Selection, new_folder: NewFolder) -> tuple[Run, list[Any]]:
        assert new_folder("x") == Path("x")
        return run, tests.values(name)

    module.processes_ahead = processes_ahead  # type: ignore[attr-defined]
    return module


def session_of(module: ModuleType, values: list[str]) -> Any:
    tests = [
        SimpleNamespace(module=module, callspec=SimpleNamespace(params={"name": value}), name="t")
        for value in values
    ]
    without = SimpleNamespace(module=ModuleType("quick"), name="quick")
    return SimpleNamespace(items=[without, *tests])


def test_every_value_has_one_process_that_begins_before_it_is_asked_for() -> None:
    began = threading.Event()
    calls: list[str] = []

    def run(key: str) -> "subprocess.CompletedProcess[str]":
        calls.append(key)
        began.set()
        return ended(key)

    module = module_of(run)
    with processes_of(session_of(module, ["a", "b", "a"]), Path) as processes:
        assert began.wait(10)
        assert [processes.result(module, key).stdout for key in ("a", "b", "a")] == ["a", "b", "a"]
    assert sorted(calls) == ["a", "b"]


def test_what_has_not_begun_runs_in_the_thread_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)  # one process at a time
    began, go_on = threading.Event(), threading.Event()
    threads: dict[str, threading.Thread] = {}

    def run(key: str) -> "subprocess.CompletedProcess[str]":
        assert key not in threads, "once is enough"
        threads[key] = threading.current_thread()
        began.set()
        if key == "long":
            assert go_on.wait(10)
        return ended(key)

    module = module_of(run)
    with processes_of(session_of(module, ["long", "short"]), Path) as processes:
        assert began.wait(10)
        assert processes.result(module, "short").stdout == "short"
        assert threads["short"] is threading.main_thread()
        assert processes.result(module, "short").stdout == "short"  # also a second time
        go_on.set()
        assert processes.result(module, "long").stdout == "long"
        assert threads["long"] is not threading.main_thread()


def test_the_end_of_the_session_starts_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    calls: list[str] = []
    began, go_on = threading.Event(), threading.Event()

    def run(key: str) -> "subprocess.CompletedProcess[str]":
        calls.append(key)
        began.set()
        assert go_on.wait(10)
        return ended(key)

    with processes_of(session_of(module_of(run), ["a", "b", "c"]), Path):
        assert began.wait(10)
        threading.Timer(0.2, go_on.set).start()
    assert calls == ["a"]
