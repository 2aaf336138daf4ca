"""Observers of calibration: time per batch, time of the search for a range, and memory.

    python benchmarks/bench_calibration.py             every observer, three tensor sizes
    python benchmarks/bench_calibration.py --threads 1 --sizes 100352 --save
    python benchmarks/bench_calibration.py --smoke     only shows that it works

The first table has, for each observer and tensor size, the time in which it observes one tensor and
the time in which it then chooses the range: the least of several rounds, of the thread's own time,
because a search of milliseconds is interrupted on a busy machine. The values are normal numbers
with outliers, so that ranges have two ends and something to clip. The bars are 2 ms a tensor, and 5
ms for the search of the entropy observer over 2048 bins.

The second table has the memory of the observers of a model after 1, 10 and 100 batches, counted as
the bytes of their tensors and as what Python allocated in between.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import torchquant
from torchquant.bench import machine
from torchquant.bench.files import results_file, write_json_lines
from torchquant.configs import Static
from torchquant.convert.calibration_hooks import prepared_layers
from torchquant.observers import Observer, observer_for

OBSERVERS = ("minmax", "moving_average", "percentile", "histogram", "entropy")
CALLS = (1, 10, 100)
Record = dict[str, Any]


def observer_named(name: str) -> Observer:
    """An observer of 8 bits with zero point."""
    config = torchquant.Int8StaticActivationInt8WeightConfig(observer=name)
    assert isinstance(config.activations, Static)
    return observer_for(config.activations)


def milliseconds(call: Callable[[], Any], rounds: int) -> float:
    """The least time of a call, of this thread alone where the work is single-threaded."""
    best = float("inf")
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(rounds):
        start = clock()
        call()
        best = min(best, clock() - start)
    return best * 1e3


def values(size: int) -> Tensor:
    """Normal numbers, one in 10,000 of them 20 times as large."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, generator=generator)
    return torch.where(torch.rand(size, generator=generator) < 1e-4, 20 * x, x)


def times(sizes: Sequence[int], rounds: int) -> list[Record]:
    """One record for each observer and size."""
    records = []
    for size in sizes:
        x = values(size)
        for name in OBSERVERS:
            observer = observer_named(name)
            observer(x)
            records.append(
                {
                    "kind": "time",
                    "observer": name,
                    "elements": size,
                    "observe_ms": milliseconds(lambda o=observer, x=x: o(x), rounds),  # type: ignore[misc]
                    "search_ms": milliseconds(observer.calculate_qparams, rounds),
                }
            )
    return records


def memory(batches: Sequence[int], width: int) -> list[Record]:
    """One record for each observer and number of batches, on a model of eight layers."""
    records = []
    for name in OBSERVERS:
        layers = [nn.Linear(width, width) for _ in range(8)]
        model = nn.Sequential(*layers)
        config = torchquant.Int8StaticActivationInt8WeightConfig(observer=name)
        torchquant.prepare_(model, config, filter_fn="*")
        torchquant.calibrate(model, [torch.randn(4, width)], progress=False)
        done = 1
        tracemalloc.start()
        for count in batches:
            generator = torch.Generator().manual_seed(count)
            stream = (
                torch.randn(8 + index % 5, width, generator=generator) * (1 + index)
                for index in range(count - done)
            )
            if count > done:
                torchquant.calibrate(model, stream, progress=False)
            done = max(done, count)
            observers = [hook.observer for hook in prepared_layers(model).values()]
            records.append(
                {
                    "kind": "memory",
                    "observer": name,
                    "batches": int(observers[0].num_batches),
                    "bytes_per_layer": sum(
                        b.numel() * b.element_size() for o in observers for b in o.buffers()
                    )
                    // len(observers),
                    "python_bytes": tracemalloc.get_traced_memory()[0],
                }
            )
        tracemalloc.stop()
    return records


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table with numbers to the right."""
    result = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for place, heading in enumerate(headings):
        result.add_column(heading, justify="right" if place else "left")
    for row in rows:
        result.add_row(*row)
    return result


def show(console: Console, records: Sequence[Record]) -> None:
    """Both tables."""
    timed = [record for record in records if record["kind"] == "time"]
    console.print(
        table(
            "Milliseconds per tensor",
            ("observer", "elements", "observe", "choose the range", "together"),
            [
                (
                    r["observer"],
                    f"{r['elements']:,}",
                    f"{r['observe_ms']:.3f}",
                    f"{r['search_ms']:.3f}",
                    f"{r['observe_ms'] + r['search_ms']:.3f}",
                )
                for r in timed
            ],
        )
    )
    kept = [record for record in records if record["kind"] == "memory"]
    console.print(
        table(
            "Memory of the observers",
            ("observer", "batches", "bytes per layer", "allocated by Python"),
            [
                (
                    r["observer"],
                    str(r["batches"]),
                    f"{r['bytes_per_layer']:,}",
                    f"{r['python_bytes']:,}",
                )
                for r in kept
            ],
        )
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[25_088, 200_704, 1_605_632])
    parser.add_argument("--rounds", type=int, default=30, help="of which the least counts")
    parser.add_argument("--output", type=Path, help="a file of JSON lines to write")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    parser.add_argument("--smoke", action="store_true", help="only show that the script works")
    options = parser.parse_args()
    calls, width = CALLS, 256
    if options.smoke:
        options.sizes, options.rounds, calls, width = [1000], 2, (1, 3), 64
    if options.save and options.output is None:
        options.output = results_file("calibration")
    torch.set_num_threads(options.threads)
    records = times(options.sizes, options.rounds) + memory(calls, width)
    console = Console(width=100)
    console.print(
        f"{torchquant.cpu.cpu_name()}, {options.threads} thread(s), torch {torch.__version__}"
    )
    show(console, records)
    if options.output is not None:
        header = {"kind": "header", **machine.describe(), "threads": options.threads}
        write_json_lines(options.output, [header, *records])
        console.print(f"results: {options.output}", highlight=False)


if __name__ == "__main__":
    main()
