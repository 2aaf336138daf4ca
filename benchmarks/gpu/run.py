"""What all parts share: device, options, results file, and timing on a GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from torchquant.bench.timing import medians
from torchquant.bench.workers import in_turns

PEERS = {"bf16", "bf16 compiled", "bf16 autocast", "float32", "_int_mm", "_int_mm compiled"}
PEERS |= {"torch", "compiled", "torchao compiled", "int8", "copy", "read"}
Call = Callable[[], Any]


@dataclass
class Run:
    """Device, options, time limit and results of a run."""

    device: torch.device
    smoke: bool
    deadline: float
    console: Console
    file: Path | None = None
    ceilings: dict[str, float] = field(default_factory=dict)
    failed: bool = False  # a measurement of torchquant did not run

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def keep(self, kind: str, **facts: Any) -> None:
        """Append a line to the results file at once: an interrupted run keeps its results."""
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps({"kind": kind, **facts}) + "\n")


def out_of_time(run: Run, part: str, needed: float) -> bool:
    """True if less than ``needed`` seconds are left; then prints that the rest is left out."""
    if run.smoke or run.left() >= needed:
        return False
    run.console.print(f"{part}: out of time, the rest is left out", style="yellow")
    return True


def share_of(run: Run, ceiling: str, value: float) -> str:
    """The percentage of a measured ceiling."""
    return f"{value / run.ceilings[ceiling]:.0%}" if ceiling in run.ceilings else "-"


class Timed:
    """Calls that run one after the other; on a GPU as a CUDA graph."""

    def __init__(self, run: Run, calls: list[Call], graph: bool = True) -> None:
        self.run, self.calls, self.graph = run, calls, None
        for call in calls[:1] * 3 + calls:  # compile, tune, allocate
            call()
        if not run.on_gpu:
            return
        torch.cuda.synchronize()
        if graph:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.kept = [call() for call in calls]
        self.repeats = max(1, round(0.01 / max(self.seconds(1) * len(calls), 1e-6)))

    def seconds(self, repeats: int | None = None) -> float:
        """Seconds of one call: the mean over `repeats` rounds of all calls."""
        repeats = repeats or getattr(self, "repeats", 1)
        if not self.run.on_gpu:
            start = time.perf_counter()
            for call in self.calls:
                call()
            return (time.perf_counter() - start) / len(self.calls)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            if self.graph is not None:
                self.graph.replay()
            else:
                for call in self.calls:
                    call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / repeats / len(self.calls)


def compare(
    run: Run, makers: dict[str, Callable[[], list[Call]]], rounds: int = 5, graph: bool = True
) -> dict[str, float]:
    """Median seconds of a call by name; the calls take turns.

    A peer that cannot run is named and left out. If torchquant cannot run, the benchmark fails.
    """
    timed: dict[str, Timed] = {}
    for name, make in makers.items():
        stream = torch.cuda.current_stream() if run.on_gpu else None
        try:
            timed[name] = Timed(run, make(), graph)
        except Exception as error:  # a peer can raise any exception
            ours = name not in PEERS
            run.failed |= ours
            text = f"{name} {'FAILED' if ours else 'left out'}: {error}".partition("\n")[0]
            run.console.print(text[:200], style="bold red" if ours else "yellow", markup=False)
            if stream is not None:  # a capture that fails leaves its own stream behind
                torch.cuda.set_stream(stream)
                torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for name in in_turns(list(timed), 1 if run.smoke else rounds):
        samples[name].append(timed[name].seconds())
    return medians(samples)


_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through `torch.compile`, once for all shapes."""
    if function not in _compiled:
        _compiled[function] = torch.compile(function, dynamic=True)
    return _compiled[function]
