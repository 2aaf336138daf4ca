"""Linear layers with weights of 2 to 8 bits against every peer, side by side in one run.

A call is a layer without bias applied to a fp32 `[M, K]` tensor under `inference_mode`. In suite
`lowbit` the activations are quantized to int8 inside the call, in `lowbit-float` they stay floats.
Every peer has its own process; the peers take turns in short blocks, in several rounds and changing
order, and the medians of the blocks are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console

from torchquant.bench.lowbit_results import LowbitRun
from torchquant.bench.lowbit_shapes import SMOKE_CASES, LowbitCase, lowbit_cases, select
from torchquant.bench.peers import LOWBIT_SUITES, OURS
from torchquant.bench.session import run_suite
from torchquant.bench.side_by_side import Entry, Pace, Progress, chosen_entries

SMOKE_PEERS = (OURS, "torchquant-int8", "fp32")
NO_LIMIT = float("inf")  # the worker refuses errors, because they depend on the bits


@dataclass(frozen=True)
class LowbitOptions:
    """What to measure. No `peers`: the default ones. `minutes`: approximate time for everything."""

    shapes: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    suites: tuple[str, ...] = tuple(LOWBIT_SUITES)
    peers: tuple[str, ...] = ()
    threads: tuple[int, ...] = (2,)
    isa: str | None = None
    rounds: int = 5
    block: float = 0.04
    minutes: float | None = None
    smoke: bool = False

    def selected(self) -> list[LowbitCase]:
        """The cases.

        Raises:
            ValueError: a pattern matches none, or a text is no format.
        """
        if self.smoke and not self.shapes and not self.formats:
            return list(SMOKE_CASES)
        return select(lowbit_cases(), self.shapes, self.formats)

    def entries(self, suite: str) -> dict[str, Entry]:
        """The processes of a suite, by their names in the tables."""
        return chosen_entries(suite, self.peers, SMOKE_PEERS, self.smoke, self.isa)


def run_lowbit(
    options: LowbitOptions,
    console: Console,
    on_step: Progress,
    on_run: Callable[[list[LowbitRun]], None] = lambda runs: None,
) -> list[LowbitRun]:
    """Every case in every suite on every number of threads.

    Args:
        options: what to measure.
        console: for warnings and failures, not for results.
        on_step: called with a description and the fraction done.
        on_run: called with all runs so far when one is complete, to write them to files.
    """
    cases = options.selected()
    # Copies of large layers take memory: every layer has processes of its own.
    groups = [list(group) for _, group in groupby(cases, key=lambda c: (c.shape.layer, c.cold))]
    total = len(options.threads) * len(options.suites) * len(cases)
    pace, done = Pace(options.minutes, total), 0
    runs: list[LowbitRun] = []
    for threads in options.threads:
        for suite in options.suites:

            def on_case(case: LowbitCase, suite: str = suite, threads: int = threads) -> None:
                nonlocal done
                on_step(f"{suite} {case}, threads: {threads}", done / total)
                done += 1

            run = run_suite(
                LowbitRun,
                suite,
                options.entries(suite),
                groups,
                threads,
                options,
                console,
                pace,
                on_case,
                NO_LIMIT,
            )
            run.take_limits()
            runs.append(run)
            on_run(runs)
    return runs
