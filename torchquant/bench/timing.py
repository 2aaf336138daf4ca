"""How a short call is timed, and how the numbers of several blocks become one."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

BATCH_SECONDS = 100e-6  # reading the clock costs about 0.1 us, a thousandth of this


def seconds_per_call(call: Callable[[], Any], seconds: float, min_batches: int = 2) -> float:
    """Median time of one call, over batches that fill `seconds`.

    Short calls are timed in batches, so that reading the clock does not count; a batch is one call
    if that takes longer than `BATCH_SECONDS`. The first fifth of the time is a warm-up and does not
    count: caches hold another peer's weights, threads sleep, clocks are low. A call that alone
    takes longer than `seconds` is timed once.
    """
    batch, shortest = _warm_up(call, seconds / 5)
    if shortest > seconds:
        min_batches = 1
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < min_batches or time.perf_counter() < stop:
        start = time.perf_counter()
        for _ in range(batch):
            call()
        times.append((time.perf_counter() - start) / batch)
    return statistics.median(times)


def _warm_up(call: Callable[[], Any], seconds: float) -> tuple[int, float]:
    """Call for `seconds`, at least once. How many calls fill `BATCH_SECONDS`, and the shortest
    time.
    """
    shortest = math.inf
    stop = time.perf_counter() + seconds
    while math.isinf(shortest) or time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - start)
    return max(1, math.ceil(BATCH_SECONDS / shortest)), shortest


def medians(blocks: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each name's blocks."""
    return {name: statistics.median(values) for name, values in blocks.items()}


def geometric_mean(values: Iterable[float]) -> float:
    """The mean for ratios: twice as fast and half as fast cancel. `nan` for no values."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else math.nan
