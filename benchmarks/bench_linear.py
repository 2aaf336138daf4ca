"""Dynamic int8 linear layers against every peer, side by side in one run.

    python benchmarks/bench_linear.py             every shape, the default peers
    python benchmarks/bench_linear.py --save      and write benchmarks/results/linear-*
    python benchmarks/bench_linear.py --shapes '1x*' '*x768x768' --peers torchquant onnxruntime

A call is what a model does: a module applied to an fp32 `[M, K]` tensor under `inference_mode`,
fp32 `[M, N]` with bias out, activation quantized inside the call. The same layer is called again
and again, so its weights come from whichever cache holds them. Every peer has its own process; they
take turns in short blocks, several rounds, in changing order, and the medians of the blocks are
compared. README.md says why.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import machine
import results as reporting
from figures import save_linear_figure
from peak import Peaks, measure_peaks
from peers import LINEAR_PEERS, OURS
from results import ShapeResult
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from shapes import SMOKE_SHAPES, LinearShape, linear_shapes, select
from workers import Worker, WorkerError

MAX_ERROR = 0.05  # relative to float; 8-bit layers stay near 0.02
SLOW_FACTOR, SLOW_ROUNDS = (
    3.0,
    2,
)  # a peer that is this far behind the best gets only so many rounds
BUSY_PERCENT = 10  # others using more than this of the machine make the figures doubtful
SMOKE_PEERS = (OURS, "fp32", "ao-x86", "onnxruntime")
RESULTS = Path(__file__).resolve().parent / "results"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked before minutes are spent."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of every peer (default 2)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=[],
        metavar="MxNxK",
        help="only shapes that match, e.g. '1x*'",
    )
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME", choices=LINEAR_PEERS, help=", ".join(LINEAR_PEERS)
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="blocks per peer and shape (default 5)"
    )
    parser.add_argument(
        "--block",
        type=float,
        default=0.04,
        metavar="SECONDS",
        help="length of a block (default 0.05)",
    )
    parser.add_argument("--isa", help="instruction set of torchquant (TORCHQUANT_ISA)")
    parser.add_argument("--output", type=Path, help="write JSON lines to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--figure", type=Path, help="write a figure to this file")
    parser.add_argument("--save", action="store_true", help="write all three to benchmarks/results")
    parser.add_argument(
        "--smoke", action="store_true", help="two shapes, few peers, seconds: does it run at all?"
    )
    options = parser.parse_args(arguments)
    if options.threads < 1 or options.rounds < 1 or options.block <= 0:
        parser.error("--threads and --rounds must be at least 1, --block more than 0")
    try:
        options.selected = (
            list(SMOKE_SHAPES) if options.smoke else select(linear_shapes(), options.shapes)
        )
    except ValueError as error:
        parser.error(str(error))
    if options.save:
        isa = f"-{options.isa}" if options.isa else ""
        stem = f"linear-{machine.today()}-{machine.cpu_slug()}-{options.threads}threads{isa}"
        options.output = options.output or RESULTS / f"{stem}.jsonl"
        options.markdown = options.markdown or RESULTS / f"{stem}.md"
        options.figure = options.figure or RESULTS / f"{stem}.png"
        RESULTS.mkdir(exist_ok=True)
    if options.figure and find_spec("matplotlib") is None:
        parser.error("--figure needs matplotlib: pip install matplotlib")
    if options.smoke:
        options.rounds, options.block = 1, 0.005
    return options


class Bench:
    """The workers, and the shapes they have been through."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        self.results: list[ShapeResult] = []
        self.about: dict[str, dict[str, str]] = {}
        self.workers: dict[str, Worker] = {}

    def start(self) -> None:
        """Start a process per peer, all at once, and drop those that cannot run."""
        chosen = self.options.peers or [
            name
            for name, info in LINEAR_PEERS.items()
            if (name in SMOKE_PEERS if self.options.smoke else info.default)
        ]
        for name in chosen:
            if missing := LINEAR_PEERS[name].missing():
                self._drop(name, f"not installed: {', '.join(missing)}")
                continue
            environment = (
                {"TORCHQUANT_ISA": self.options.isa} if name == OURS and self.options.isa else None
            )
            self.workers[name] = Worker(name, self.options.threads, environment)
            self.workers[name].send(do="about")
        for name, worker in list(self.workers.items()):
            try:
                self.about[name] = worker.receive()
            except WorkerError as error:
                self._drop(name, str(error))

    def run(self, progress: Progress) -> None:
        """Measure every selected shape, layer by layer."""
        task = progress.add_task("shapes", total=len(self.options.selected))
        for (n, k), shapes in groupby(self.options.selected, key=lambda shape: (shape.n, shape.k)):
            failures = self._ask_all(self.workers, do="load", n=n, k=k)
            ready = {name: worker for name, worker in self.workers.items() if name not in failures}
            for shape in shapes:
                progress.update(task, description=str(shape))
                self.results.append(self._measure(shape, ready, dict(failures)))
                progress.advance(task)

    def cpu_seconds(self) -> float:
        """Processor time of all workers."""
        return sum(worker.cpu_seconds() for worker in self.workers.values())

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers.values():
            worker.close()

    def _drop(self, name: str, reason: str) -> None:
        self.console.print(f"[yellow]without {name}:[/yellow] {escape(reason)}", highlight=False)
        if worker := self.workers.pop(name, None):
            worker.close()

    def _ask_all(self, workers: dict[str, Worker], **request: Any) -> dict[str, str]:
        """The same request to all at the same time; returns the failures."""
        failures = {}
        for worker in workers.values():
            worker.send(**request)
        for name, worker in workers.items():
            try:
                worker.receive()
            except WorkerError as error:
                failures[name] = str(error)
        return failures

    def _measure(
        self, shape: LinearShape, workers: dict[str, Worker], failures: dict[str, str]
    ) -> ShapeResult:
        result = ShapeResult(shape, failures=failures)
        active = {name: w for name, w in workers.items() if self._prepare(name, w, result)}
        for index in range(self.options.rounds):
            if index == SLOW_ROUNDS:
                shortest = {name: result.shortest_block(name) for name in active}
                limit = SLOW_FACTOR * min(shortest.values(), default=0.0)
                active = {
                    name: w for name, w in active.items() if name == OURS or shortest[name] <= limit
                }
            order = list(active) if index % 2 == 0 else list(reversed(active))
            for name in order:
                try:
                    answer = active[name].ask(do="block", seconds=self.options.block)
                except WorkerError as failure:
                    result.failures[name] = str(failure)
                    del active[name]
                    continue
                result.add(name, answer["seconds"])
                active[name].wait_until_asleep()
        for name, reason in result.failures.items():
            self.console.print(f"[yellow]{shape}, {name}:[/yellow] {escape(reason)}")
        return result

    def _prepare(self, name: str, worker: Worker, result: ShapeResult) -> bool:
        """Give the worker its input, and see that it computes the layer; a failure is noted."""
        try:
            error = worker.ask(do="input", m=result.shape.m)["error"]
        except WorkerError as failure:
            result.failures[name] = str(failure)
            return False
        worker.wait_until_asleep()
        if not error <= MAX_ERROR:  # NaN as well
            result.failures[name] = f"relative error {error:.3f} against float"
            return False
        return True


def measure_limits(options: argparse.Namespace, console: Console) -> Peaks | None:
    """The machine's peaks, or None and a line that says why not."""
    weights = [shape.n * shape.k for shape in options.selected]
    try:
        return measure_peaks(options.threads, weights, seconds=0.02 if options.smoke else 0.2)
    except RuntimeError as error:
        console.print(f"[yellow]peaks not measured:[/yellow] {escape(str(error))}", highlight=False)
        return None


def warn_if_busy(console: Console, percent: float | None, verb: str) -> None:
    """A loaded machine does not only blur figures: who synchronises threads loses most."""
    if percent is not None and percent > BUSY_PERCENT:
        console.print(
            f"[red]others {verb} {percent:.0f} % of this machine's CPUs: believe no ratio[/red]"
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 if torchquant was measured or not asked for, 1 otherwise."""
    options = parse_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else 180)
    busy = machine.busy_neighbours()
    warn_if_busy(console, busy, "use")
    peaks = measure_limits(options, console)
    bench, start = Bench(options, console), time.monotonic()
    use, own_start = machine.CpuUse(), time.process_time()
    try:
        bench.start()
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bench.run(progress)
        cpu = use.percent(own_seconds=time.process_time() - own_start + bench.cpu_seconds())
    finally:
        bench.close()
    if peaks:
        peaks = peaks.best_of(measure_limits(options, console))
    isa = bench.about.get(OURS, {}).get("isa", "-")
    for result in bench.results:
        shape = result.shape
        result.limit_seconds = (
            peaks.seconds(shape.operations, shape.n * shape.k, isa) if peaks else None
        )
    header = {
        "kind": "run",
        **machine.describe(),
        "threads": options.threads,
        "isa": isa,
        "peers": bench.about,
        "peaks": {"gops": peaks.gops, "read_gb_per_s_by_mib": peaks.read} if peaks else None,
        "busy_before": busy,
        "busy_during": cpu.get("others"),
        "steal": cpu.get("steal"),
        "seconds": round(time.monotonic() - start, 1),
    }
    report(options, console, header, bench.results, peaks.gops.get(isa) if peaks else None)
    warn_if_busy(console, cpu.get("others"), "used")
    return 0 if OURS in bench.about or (options.peers and OURS not in options.peers) else 1


def report(
    options: argparse.Namespace,
    console: Console,
    header: dict[str, Any],
    results: list[ShapeResult],
    peak_gops: float | None,
) -> None:
    """Print the table and write the files that were asked for."""
    console.print(reporting.rich_table(results, peak_gops))
    for line in reporting.summary_lines(reporting.summarise(results)):
        console.print(line, highlight=False)
    title = (
        f"torchquant int8 linear, {header['cpu']}, {header['threads']} threads, {header['date']}"
    )

    def write(output: Path | None, table: Path | None, figure: Path | None) -> None:
        if output:
            reporting.write_json_lines(output, header, results)
        if table:
            table.write_text(reporting.markdown(header, results, peak_gops))
        if figure:
            save_linear_figure(figure, results, title, peak_gops)

    write(options.output, options.markdown, options.figure)
    if options.smoke:  # the writers must not go stale either
        with tempfile.TemporaryDirectory() as name:
            figure = Path(name) / "figure.png" if find_spec("matplotlib") else None
            write(Path(name) / "lines.jsonl", Path(name) / "table.md", figure)


if __name__ == "__main__":
    sys.exit(main())
