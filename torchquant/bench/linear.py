"""int8 linear layers against every peer, side by side in one run.

A call is a module (or operator) applied to an `[M, K]` tensor under `inference_mode`, as in a
model, with an fp32 `[M, N]` result with bias. The same layer is called again and again, so its
weights are read from a cache if they fit. Every peer has its own process; the peers take turns in
short blocks, in several rounds and changing order, and the medians of the blocks are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from torchquant.bench.peers import OURS
from torchquant.bench.results import Run
from torchquant.bench.session import run_suite
from torchquant.bench.shapes import SMOKE_SHAPES, SUITE_SHAPES, LinearShape, select
from torchquant.bench.side_by_side import Entry, Pace, Progress, chosen_entries

SMOKE_PEERS = (OURS, "fp32", "onednn")


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
        return chosen_entries(suite, self.peers, SMOKE_PEERS, self.smoke, self.isa)


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

            entries = options.entries(suite)
            runs.append(
                run_suite(Run, suite, entries, [shapes], threads, options, console, pace, on_shape)
            )
            on_run(runs)
    return runs
