"""A comparison of engines: start each one and measure its accuracy, then all engines' speed."""

from __future__ import annotations

import argparse
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from harness.engines import Engine
from harness.report import Row
from harness.workers import Answer, Worker, WorkerError, engine_worker

REFERENCE = "fp32"  # the engine that all others are compared with


class Comparison(ABC):
    """All engines, and their measurements so far.

    Args:
        script: serves an engine if called with `--worker NAME --folder FOLDER`.
        options: of the command line.
        engines: by name.
        folder: temporary, shared with the workers.
        console: for messages about engines that are left out.
    """

    def __init__(
        self,
        script: str,
        options: argparse.Namespace,
        engines: dict[str, Engine],
        folder: Path,
        console: Console,
    ) -> None:
        self.script, self.options, self.engines = script, options, engines
        self.folder, self.console = folder, console
        self.rows: dict[str, Row] = {}
        self.workers: dict[str, Worker] = {}
        self.reports: dict[str, str] = {}

    @abstractmethod
    def prepare(self, names: Sequence[str]) -> Iterable[str]:
        """Write the workers' files into the folder; returns the engines that can continue."""

    @abstractmethod
    def accuracy(self, name: str, worker: Worker) -> Row:
        """Measure one engine's accuracy."""

    @abstractmethod
    def speed(self, workers: Mapping[str, Worker]) -> None:
        """Measure the speed of all engines, and add it to their rows."""

    def run(self) -> list[Row]:
        """Measure accuracy, then speed, then memory of the engines that run."""
        try:
            for name in self.prepare(self._installed()):
                self._begin(name)
            self.speed(self.workers)
            for name, worker in self.workers.items():
                self.rows[name] |= worker.ask("memory")
        finally:
            for worker in self.workers.values():
                worker.close()
        return list(self.rows.values())

    def start(self, name: str) -> Worker:
        """Start the engine's process."""
        return engine_worker(
            self.script,
            name,
            self.options.threads,
            "--folder",
            str(self.folder),
            keep_freed_memory=self.options.allocator == "keep",
        )

    def leave_out(self, name: str, reason: str) -> None:
        """Print why an engine is not in the table."""
        self.console.print(f"left out: {name} ({reason})", highlight=False)

    def _installed(self) -> list[str]:
        chosen = []
        for name in self.options.engines:
            if missing := self.engines[name].missing():
                self.leave_out(name, f"not installed: {', '.join(missing)}")
            else:
                chosen.append(name)
        return chosen

    def _begin(self, name: str) -> None:
        worker = self.start(name)
        try:
            loaded: Answer = worker.ask("load")
            row = self.accuracy(name, worker)
        except WorkerError as error:
            worker.close()
            if name == REFERENCE:
                raise
            self.leave_out(name, str(error))
            return
        worker.wait_until_asleep()
        self.workers[name] = worker
        if report := loaded.pop("report"):
            self.reports[name] = report
        self.rows[name] = {"kind": "engine", "engine": name, **row, **loaded}


def add_arguments(parser: argparse.ArgumentParser, engines: dict[str, Engine]) -> None:
    """Add the options that every comparison has."""
    parser.add_argument(
        "--engines", nargs="+", choices=engines, metavar="NAME", help=", ".join(engines)
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="blocks per engine and measurement")
    parser.add_argument("--seconds", type=float, default=0.4, help="length of a block")
    parser.add_argument(
        "--allocator",
        choices=("keep", "default"),
        default="keep",
        help="keep freed memory in the process, or return it to the system as glibc does by "
        "default; the same for every engine (default: keep)",
    )
    parser.add_argument("--output", type=Path, help="write JSON lines to this file")
    parser.add_argument("--report", action="store_true", help="print the reports of quantize_")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="only show that the script works",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)


def selected(chosen: Iterable[str]) -> list[str]:
    """The requested engines, the reference first."""
    return [REFERENCE, *(name for name in dict.fromkeys(chosen) if name != REFERENCE)]


def offline() -> None:
    """Keep transformers from contacting a model hub: the packages contain all files."""
    os.environ["HF_HUB_OFFLINE"] = "1"
