"""int8 linear layers against every peer, side by side in one run.

A call is a module (or operator) applied to an `[M, K]` tensor under `inference_mode`, as in a
model, with an fp32 `[M, N]` result with bias. The same layer is called again and again, so its
weights are read from a cache if they fit. Every peer has its own process; the peers take turns in
short blocks, in several rounds and changing order, and the medians of the blocks are compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape

from torchquant.bench import machine
from torchquant.bench.layer_worker import start_layer_worker
from torchquant.bench.peers import OURS, SUITES
from torchquant.bench.results import Run, ShapeResult
from torchquant.bench.roofline import measure_roofline
from torchquant.bench.shapes import SMOKE_SHAPES, SUITE_SHAPES, LinearShape, select
from torchquant.bench.workers import Worker, WorkerError

MAX_ERROR = 0.05  # relative to float; 8-bit layers stay near 0.02
SMOKE_PEERS = (OURS, "fp32", "ao-x86", "onednn", "onnxruntime")
# Rounds -> factor: after so many rounds, a peer this many times slower than the best is not
# measured in later rounds.
SIT_OUT = {1: 2.0, 2: 1.3}
# A peer whose first call takes this many times as long as the best peer's, and longer than a block,
# is not measured further.
SCREENED = 4.0
LEAST_ROUNDS = 2  # even if no time is left

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Entry:
    """One process of a benchmark: its suite and peer, and variables of its environment."""

    suite: str
    peer: str
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What to measure. No `peers`: the default ones. `minutes`: approximate time for everything."""

    suites: tuple[str, ...] = ("dynamic", "prequantized")
    shapes: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    threads: tuple[int, ...] = (2, 1)
    isa: str | None = None
    rounds: int = 5
    block: float = 0.04
    minutes: float | None = None
    smoke: bool = False

    def selected(self) -> dict[str, list[LinearShape]]:
        """Shapes by suite; suites without any are left out.

        Raises:
            ValueError: a pattern matches none in any suite.
        """
        if self.smoke and not self.shapes:
            return {suite: list(SMOKE_SHAPES) for suite in self.suites}
        every = {suite: SUITE_SHAPES[suite]() for suite in self.suites}
        if not self.shapes:
            return every
        found: dict[str, list[LinearShape]] = {suite: [] for suite in every}
        for pattern in self.shapes:
            failures = []
            for suite, shapes in every.items():
                try:
                    found[suite] += select(shapes, [pattern])
                except ValueError as error:
                    failures.append(error)
            if len(failures) == len(every):
                raise failures[0]
        return {suite: sorted(set(shapes)) for suite, shapes in found.items() if shapes}

    def entries(self, suite: str) -> dict[str, Entry]:
        """The processes of a suite, by their names in the tables."""
        environment = {"TORCHQUANT_ISA": self.isa} if self.isa else {}
        chosen = {}
        for name, info in SUITES[suite].items():
            wanted = name in self.peers if self.peers else info.default
            if self.smoke and not self.peers:
                wanted = name in SMOKE_PEERS
            if wanted:
                own = name == OURS or info.ours
                chosen[name] = Entry(suite, name, environment if own else {})
        return chosen


class Pace:
    """Divides a time among shapes: the more time is left, the more rounds per shape."""

    def __init__(self, minutes: float | None, shapes: int) -> None:
        self._stop = None if minutes is None else time.monotonic() + 60 * minutes
        self._left = shapes

    @contextmanager
    def shape(self) -> Iterator[Callable[[], bool]]:
        """A block for one shape. Yields a function that returns True when its time is up."""
        start = time.monotonic()
        allowed = float("inf")
        if self._stop is not None:
            # Twice the even share: most shapes are small and do not use theirs.
            allowed = 2 * max(0.0, self._stop - start) / max(1, self._left)
        yield lambda: time.monotonic() - start > allowed
        self._left -= 1


class Bench:
    """The workers of one suite and number of threads, and the results so far."""

    def __init__(
        self,
        entries: dict[str, Entry],
        threads: int,
        options: Options,
        console: Console,
        pace: Pace | None = None,
        all_to_the_end: bool = False,  # measure all peers in all rounds
    ) -> None:
        self.entries, self.threads = entries, threads
        self.all_to_the_end = all_to_the_end
        self.options, self.console = options, console
        self.pace = pace or Pace(None, 0)
        self.results: list[ShapeResult] = []
        self.about: dict[str, dict[str, str]] = {}
        self.missing: dict[str, str] = {}
        self.workers: dict[str, Worker] = {}
        self.uncompared = frozenset(
            label for label, e in entries.items() if SUITES[e.suite][e.peer].ours
        )

    def start(self) -> None:
        """Start all processes, one per peer, and drop peers that cannot run."""
        for label, entry in self.entries.items():
            info = SUITES[entry.suite][entry.peer]
            if info.missing():
                self._drop(label, f"not installed; {info.how_to_install()}")
                continue
            self.workers[label] = start_layer_worker(
                entry.suite, entry.peer, self.threads, entry.environment
            )
            self.workers[label].send("about")
        for label, worker in list(self.workers.items()):
            try:
                self.about[label] = worker.receive()
            except WorkerError as error:
                self._drop(label, str(error))

    def run(self, shapes: list[LinearShape], on_shape: Callable[[LinearShape], None]) -> None:
        """Measure every shape, layer by layer."""
        for (n, k), group in groupby(shapes, key=lambda shape: (shape.n, shape.k)):
            failures = self._ask_all(self.workers, "load", n=n, k=k)
            ready = {name: worker for name, worker in self.workers.items() if name not in failures}
            for shape in group:
                on_shape(shape)
                with self.pace.shape() as time_is_up:
                    self.results.append(self._measure(shape, ready, dict(failures), time_is_up))

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
        shape: LinearShape,
        workers: dict[str, Worker],
        failures: dict[str, str],
        time_is_up: Callable[[], bool],
    ) -> ShapeResult:
        result = ShapeResult(shape, failures=failures, uncompared=self.uncompared)
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
                result.add(name, answer["seconds"])
                active[name].wait_until_asleep()
        return result

    def _screen(self, result: ShapeResult, workers: dict[str, Worker]) -> dict[str, Worker]:
        """Prepare the input in all workers. Returns those that are correct and not far too slow."""
        first: dict[str, dict[str, float]] = {}
        for name, worker in workers.items():
            try:
                answer = worker.ask("input", m=result.shape.m)
            except WorkerError as failure:
                result.failures[name] = str(failure)
                continue
            worker.wait_until_asleep()
            if not answer["error"] <= MAX_ERROR:  # NaN as well
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
        self, result: ShapeResult, active: dict[str, Worker], factor: float
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


def run_linear(
    options: Options,
    console: Console,
    on_step: Progress,
    on_run: Callable[[list[Run]], None] = lambda runs: None,
) -> list[Run]:
    """Every suite on every number of threads.

    Args:
        console: for warnings and failures, not for results.
        on_step: called with a description and the fraction done.
        on_run: called with all runs so far when one is complete, to write them to files.
    """
    selected = options.selected()
    total = len(options.threads) * sum(len(shapes) for shapes in selected.values())
    pace, done = Pace(options.minutes, total), 0
    runs: list[Run] = []
    for threads in options.threads:
        for suite, shapes in selected.items():

            def on_shape(shape: LinearShape, suite: str = suite, threads: int = threads) -> None:
                nonlocal done
                on_step(f"{suite} {shape}, threads: {threads}", done / total)
                done += 1

            runs.append(_run_suite(options, suite, shapes, threads, pace, console, on_shape))
            on_run(runs)
    return runs


def _run_suite(
    options: Options,
    suite: str,
    shapes: list[LinearShape],
    threads: int,
    pace: Pace,
    console: Console,
    on_shape: Callable[[LinearShape], None],
) -> Run:
    start, load = time.monotonic(), machine.describe()
    busy = machine.busy_neighbours()
    machine.warn_if_busy(console, busy)
    seconds = 0.01 if options.smoke else 0.1
    sizes = [shape.weight_bytes for shape in shapes]
    before = measure_roofline(threads, sizes, seconds)
    bench = Bench(options.entries(suite), threads, options, console, pace)
    use, own_start = machine.CpuUse(), time.process_time()
    try:
        bench.start()
        bench.run(shapes, on_shape)
        cpu = use.percent(own_seconds=time.process_time() - own_start + bench.cpu_seconds())
    finally:
        bench.close()
    after = measure_roofline(threads, sizes, seconds)
    roofline = before.best_of(after)
    isa = bench.about.get(OURS, {}).get("isa", "-")
    for result in bench.results:
        result.limit = roofline.limit(result.shape.operations, result.shape.weight_bytes, isa)
    machine.warn_if_busy(console, cpu.get("others"))
    header = {
        "kind": "run",
        "suite": suite,
        **load,
        "threads": threads,
        "isa": isa,
        "peers": bench.about,
        "missing": bench.missing,
        "roofline_before": before.to_dict(),
        "roofline_after": after.to_dict(),
        "rounds": options.rounds,
        "block_seconds": options.block,
        "busy_before": busy,
        "busy_during": cpu.get("others"),
        "steal": cpu.get("steal"),
        "seconds": round(time.monotonic() - start, 1),
    }
    return Run(suite, threads, isa, header, bench.results, roofline)
