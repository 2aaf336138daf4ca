"""One suite on one number of threads: the machine's limits, the peers, and what was around."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rich.console import Console

from torchquant.bench import machine
from torchquant.bench.case import C
from torchquant.bench.peers import OURS
from torchquant.bench.results import CaseResult
from torchquant.bench.roofline import Roofline, measure_roofline
from torchquant.bench.side_by_side import MAX_ERROR, Bench, Blocks, Entry, Pace

R = TypeVar("R")


def run_suite(
    run_type: Callable[[str, int, str, dict[str, Any], list[CaseResult[C]], Roofline], R],
    suite: str,
    entries: dict[str, Entry],
    groups: Sequence[Sequence[C]],
    threads: int,
    options: Blocks,
    console: Console,
    pace: Pace,
    on_case: Callable[[C], None],
    max_error: float = MAX_ERROR,
) -> R:
    """Measure all cases between two measurements of the machine's limits.

    Args:
        run_type: the class of the result.
        suite, entries: the peers.
        groups: cases; each group has processes of its own.
        threads: of every peer.
        options: how long to measure.
        console: for warnings and failures.
        pace: divides a time among the cases.
        on_case: called before each case.
        max_error: the relative error against float at which a peer computes something else.
    """
    start, load = time.monotonic(), machine.describe()
    busy = machine.busy_neighbours()
    machine.warn_if_busy(console, busy)
    seconds = 0.01 if options.smoke else 0.1
    sizes = [case.cycle_bytes for cases in groups for case in cases]
    before = measure_roofline(threads, sizes, seconds)
    results: list[CaseResult[C]] = []
    about: dict[str, dict[str, str]] = {}
    missing: dict[str, str] = {}
    use, own_start, peers_seconds = machine.CpuUse(), time.process_time(), 0.0
    for cases in groups:
        bench: Bench[C] = Bench(
            entries, threads, options, console, pace, max_error=max_error, known_missing=missing
        )
        try:
            bench.start()
            bench.run(cases, on_case)
            peers_seconds += bench.cpu_seconds()
        finally:
            bench.close()
        results += bench.results
        about |= bench.about
        missing |= bench.missing
    cpu = use.percent(own_seconds=time.process_time() - own_start + peers_seconds)
    after = measure_roofline(threads, sizes, seconds)
    roofline = before.best_of(after)
    isa = about.get(OURS, {}).get("isa", "-")
    for result in results:
        result.limit = roofline.limit_of(result.shape, isa)
    machine.warn_if_busy(console, cpu.get("others"))
    header: dict[str, Any] = {
        "kind": "run",
        "suite": suite,
        **load,
        "threads": threads,
        "isa": isa,
        "peers": about,
        "missing": missing,
        "roofline_before": before.to_dict(),
        "roofline_after": after.to_dict(),
        "rounds": options.rounds,
        "block_seconds": options.block,
        "busy_before": busy,
        "busy_during": cpu.get("others"),
        "steal": cpu.get("steal"),
        "seconds": round(time.monotonic() - start, 1),
    }
    return run_type(suite, threads, isa, header, results, roofline)
