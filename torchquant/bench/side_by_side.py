"""Peers side by side: a process each, in turns, over the cases of a benchmark.

A case is a layer or a network with one input. All peers prepare at the same time; then one at a
time is measured, in short blocks, in several rounds and changing order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Generic, Protocol

from rich.console import Console
from rich.markup import escape

from torchquant.bench.case import C
from torchquant.bench.peers import EVERY_SUITE, OURS, PeerInfo, peer_info
from torchquant.bench.results import CaseResult
from torchquant.bench.workers import Worker, WorkerError

MAX_ERROR = 0.05  # relative to float; 8-bit layers stay near 0.02
# Rounds -> factor: after so many rounds, a peer this many times slower than the best is not
# measured in later rounds.
SIT_OUT = {1: 2.0, 2: 1.3}
# A peer whose first call takes this many times as long as the best peer's, and longer than a block,
# is not measured further.
SCREENED = 4.0
LEAST_ROUNDS = 2  # even if no time is left
# The module that a suite's processes run; suites of linear layers run the layer worker.
WORKERS = {
    "conv": "conv_worker",
    "cnn": "cnn_worker",
    "lowbit": "lowbit_worker",
    "lowbit-float": "lowbit_worker",
}

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Entry:
    """One process of a benchmark: its suite and peer, and variables of its environment."""

    suite: str
    peer: str
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def info(self) -> PeerInfo:
        """What is known of the peer without its library."""
        return peer_info(self.suite, self.peer)

    def start(self, threads: int) -> Worker:
        """The peer's process."""
        module = f"torchquant.bench.{WORKERS.get(self.suite, 'layer_worker')}"
        return Worker(["-m", module, self.suite, self.peer, str(threads)], self.environment)


class Blocks(Protocol):
    """How long to measure."""

    @property
    def smoke(self) -> bool:
        """Whether it is enough to show that everything works."""

    @property
    def rounds(self) -> int:
        """Blocks per peer and case."""

    @property
    def block(self) -> float:
        """Seconds of a block."""


def chosen_entries(
    suite: str, peers: tuple[str, ...], smoke_peers: tuple[str, ...], smoke: bool, isa: str | None
) -> dict[str, Entry]:
    """The processes of a suite, by their names in the tables.

    Args:
        peers: those that were asked for; the default ones without.
        smoke_peers: the default ones of a smoke run.
        smoke: whether it is one.
        isa: the instruction set of torchquant's own processes.
    """
    environment = {"TORCHQUANT_ISA": isa} if isa else {}
    chosen = {}
    for name, info in EVERY_SUITE[suite].items():
        wanted = name in peers if peers else info.default
        if smoke and not peers:
            wanted = name in smoke_peers
        if wanted:
            own = name == OURS or info.ours
            chosen[name] = Entry(suite, name, environment if own else {})
    return chosen


class Pace:
    """Divides a time among cases: the more time is left, the more rounds per case."""

    def __init__(self, minutes: float | None, cases: int) -> None:
        self._stop = None if minutes is None else time.monotonic() + 60 * minutes
        self._left = cases

    @contextmanager
    def case(self) -> Iterator[Callable[[], bool]]:
        """A block for one case. Yields a function that returns True when its time is up."""
        start = time.monotonic()
        allowed = float("inf")
        if self._stop is not None:
            # Twice the even share: most cases are small and do not use theirs.
            allowed = 2 * max(0.0, self._stop - start) / max(1, self._left)
        yield lambda: time.monotonic() - start > allowed
        self._left -= 1


class Bench(Generic[C]):
    """The workers of one suite and number of threads, and the results so far.

    Args:
        entries: a process each, by their names in the tables.
        threads: of every peer.
        options: how long to measure.
        console: for peers that are missing.
        pace: divides a time among the cases.
        all_to_the_end: measure all peers in all rounds.
        max_error: the relative error against float at which a peer computes something else.
        known_missing: peers that were found missing before, with the reasons.
    """

    def __init__(
        self,
        entries: dict[str, Entry],
        threads: int,
        options: Blocks,
        console: Console,
        pace: Pace | None = None,
        all_to_the_end: bool = False,
        max_error: float = MAX_ERROR,
        known_missing: Mapping[str, str] | None = None,
    ) -> None:
        self.entries, self.threads = entries, threads
        self.all_to_the_end, self.max_error = all_to_the_end, max_error
        self.options, self.console = options, console
        self.pace = pace or Pace(None, 0)
        self.results: list[CaseResult[C]] = []
        self.about: dict[str, dict[str, str]] = {}
        self.missing: dict[str, str] = dict(known_missing or {})
        self.workers: dict[str, Worker] = {}
        self.uncompared = frozenset(label for label, entry in entries.items() if entry.info.ours)

    def start(self) -> None:
        """Start all processes, one per peer, and drop peers that cannot run."""
        for label, entry in self.entries.items():
            if label in self.missing:
                continue
            if entry.info.missing():
                self._drop(label, f"not installed; {entry.info.how_to_install()}")
                continue
            self.workers[label] = entry.start(self.threads)
            self.workers[label].send("about")
        for label, worker in list(self.workers.items()):
            try:
                self.about[label] = worker.receive()
            except WorkerError as error:
                self._drop(label, str(error))

    def run(self, cases: Iterable[C], on_case: Callable[[C], None]) -> None:
        """Measure every case. What neighbours have in common is loaded once."""
        for request, group in groupby(cases, key=lambda case: case.load_request()):
            failures = self._ask_all(self.workers, "load", **request)
            ready = {name: worker for name, worker in self.workers.items() if name not in failures}
            for case in group:
                on_case(case)
                with self.pace.case() as time_is_up:
                    self.results.append(self._measure(case, ready, dict(failures), time_is_up))

    def cpu_seconds(self) -> float:
        """Processor time of all workers."""
        return sum(worker.cpu_seconds() for worker in self.workers.values())

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers.values():
            worker.close()

    def _drop(self, name: str, reason: str) -> None:
        self.missing[name] = reason
        self.console.print(f"[yellow]without {name}:[/yellow] {escape(reason)}", highlight=False)
        if worker := self.workers.pop(name, None):
            worker.close()

    def _ask_all(self, workers: dict[str, Worker], do: str, **arguments: Any) -> dict[str, str]:
        """Send the same request to all workers at the same time; returns the failures."""
        failures = {}
        for worker in workers.values():
            worker.send(do, **arguments)
        for name, worker in workers.items():
            try:
                worker.receive()
            except WorkerError as error:
                failures[name] = str(error)
        return failures

    def _measure(
        self,
        case: C,
        workers: dict[str, Worker],
        failures: dict[str, str],
        time_is_up: Callable[[], bool],
    ) -> CaseResult[C]:
        result = CaseResult(case, failures=failures, uncompared=self.uncompared)
        active = self._screen(result, workers)
        for index in range(self.options.rounds):
            if index >= LEAST_ROUNDS and time_is_up():
                break
            if index in SIT_OUT:
                active = self._still_in(result, active, SIT_OUT[index])
            order = list(active) if index % 2 == 0 else list(reversed(active))
            for name in order:
                try:
                    answer = active[name].ask("block", seconds=self.options.block)
                except WorkerError as failure:
                    result.failures[name] = str(failure)
                    del active[name]
                    continue
                result.add(name, answer["seconds"], answer.get("megabytes"))
                active[name].wait_until_asleep()
        return result

    def _screen(self, result: CaseResult[C], workers: dict[str, Worker]) -> dict[str, Worker]:
        """Prepare the input in all workers. Returns those that are correct and not far too slow."""
        first: dict[str, dict[str, float]] = {}
        for name, worker in workers.items():
            try:
                answer = worker.ask("input", **result.shape.input_request())
            except WorkerError as failure:
                result.failures[name] = str(failure)
                continue
            worker.wait_until_asleep()
            if not answer["error"] <= self.max_error:  # NaN as well
                result.failures[name] = f"relative error {answer['error']:.3f} against float"
                continue
            first[name] = answer["seconds"]
        shortest = {name: min(seconds.values()) for name, seconds in first.items()}
        limit = max(self.options.block, SCREENED * min(shortest.values(), default=0.0))
        for name in first:
            if shortest[name] > limit and not self._stays(name):
                result.add(name, first[name])
        return {name: workers[name] for name in first if name not in result.blocks}

    def _still_in(
        self, result: CaseResult[C], active: dict[str, Worker], factor: float
    ) -> dict[str, Worker]:
        shortest = {name: result.shortest_block(name) for name in active}
        limit = factor * min(shortest.values(), default=0.0)
        return {
            name: worker
            for name, worker in active.items()
            if self._stays(name) or shortest[name] <= limit
        }

    def _stays(self, name: str) -> bool:
        """True for peers that are measured in all rounds: those of torchquant."""
        return self.all_to_the_end or self.entries[name].peer == OURS or name in self.uncompared
