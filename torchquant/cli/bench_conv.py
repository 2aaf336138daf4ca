"""``torchquant bench conv`` and ``cnn``: options, their errors, and files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from torchquant.bench import tables
from torchquant.bench.conv import CnnOptions, ConvOptions, run_cnn, run_conv
from torchquant.bench.conv_results import CnnRun, ConvRun
from torchquant.bench.files import results_file, write_json_lines
from torchquant.bench.networks import NETWORKS
from torchquant.bench.peers import CNN, CONV, OURS
from torchquant.cli.bench import (
    BlockOption,
    MinutesOption,
    OutputOption,
    RoundsOption,
    SaveOption,
    SmokeOption,
    ThreadsOption,
    check_names,
    parse_threads,
    split,
)
from torchquant.cli.options import IsaOption, JsonOption, ProgressOption
from torchquant.cli.output import (
    error_console,
    output_console,
    print_json,
    print_table,
    progress_bar,
    warn,
)

MarkdownOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the tables to this file.")
]
FigureOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Write a figure to this file; for several runs one file each."
    ),
]
AnyOfTheRuns = ConvRun | CnnRun


@dataclass(frozen=True)
class Files:
    """What to write, and where."""

    kind: str
    output: Path | None
    markdown: Path | None
    figure: Path | None
    save: bool
    isa: str | None
    errors: Console

    def write(self, runs: Sequence[AnyOfTheRuns], drawn: bool = False) -> None:
        """Write all files of the runs; figures only if `drawn`."""
        self._write(runs, self.output, self.markdown, self.figure if drawn else None)
        for threads in {run.threads for run in runs} if self.save else ():
            mine = [run for run in runs if run.threads == threads]
            parts = (self.kind, f"{threads}thread{'s' if threads > 1 else ''}", self.isa)
            lines, page, picture = (
                results_file(*parts, suffix=suffix) for suffix in (".jsonl", ".md", ".png")
            )
            self._write(mine, lines, page, picture if drawn else None)

    def try_all(self, runs: Sequence[AnyOfTheRuns]) -> None:
        """Run what writes files, in a folder that goes away."""
        with tempfile.TemporaryDirectory() as name:
            self._write(runs, *(Path(name) / f"a{suffix}" for suffix in (".jsonl", ".md", ".png")))

    def _write(
        self,
        runs: Sequence[AnyOfTheRuns],
        lines: Path | None,
        page: Path | None,
        figure: Path | None,
    ) -> None:
        if lines:
            write_json_lines(lines, [record for run in runs for record in tables.records(run)])
        if page:
            page.write_text("\n".join(tables.markdown([run]) for run in runs))
        if not figure:
            return
        if find_spec("matplotlib") is None:
            warn(self.errors, "no figure", "matplotlib is not installed; pip install matplotlib")
            return
        from torchquant.bench.conv_figures import save_figure

        several = len({run.threads for run in runs}) > 1
        for run in runs:
            suffix = f"-{run.threads}threads" if several else ""
            save_figure(figure.with_name(f"{figure.stem}{suffix}{figure.suffix}"), run)


def conv_command(
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN,...",
            help="Only shapes that match ('8x*', '*k3'), a family ('depthwise', '1x1', 'stem'), a "
            "network ('vgg*'), or your own shapes ('1x64x56x56-128k3s2').",
        ),
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help=f"One or more of {', '.join(CONV)}."),
    ] = None,
    threads: ThreadsOption = None,
    isa: IsaOption = None,
    rounds: RoundsOption = 5,
    block: BlockOption = 0.02,
    minutes: MinutesOption = None,
    curve: Annotated[
        bool, typer.Option("--curve/--no-curve", help="Measure time over pixels and batch, too.")
    ] = True,
    output: OutputOption = None,
    markdown: MarkdownOption = None,
    figure: FigureOption = None,
    save: SaveOption = False,
    as_json: JsonOption = False,
    progress: ProgressOption = True,
    smoke: SmokeOption = False,
) -> None:
    """Compare int8 convolutions with other libraries: the layers of four networks, batch 1 and 8.

    Peers that are not installed are named and left out. The exit code is 1 if torchquant was
    requested and could not be measured.
    """
    options = ConvOptions(
        shapes=split(shapes),
        peers=check_names("--peers", split(peers), list(CONV)),
        threads=(1,) if smoke and not threads else parse_threads(threads or ["2"]),
        isa=isa,
        rounds=1 if smoke else rounds,
        block=0.002 if smoke else block,
        minutes=minutes,
        curve=curve,
        smoke=smoke,
    )
    try:
        options.selected()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--shapes") from None
    files = Files("conv", output, markdown, figure, save, isa, error_console())
    with progress_bar(files.errors, shown=progress) as on_step:
        runs = run_conv(options, files.errors, on_step, on_run=files.write)
    _finish(runs, files, as_json, smoke, options.peers)


def cnn_command(
    networks: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help=f"One or more of {', '.join(NETWORKS)}."),
    ] = None,
    batches: Annotated[
        list[str] | None, typer.Option(metavar="N,...", help="Images of a call (default: 1, 8).")
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help=f"One or more of {', '.join(CNN)}."),
    ] = None,
    threads: ThreadsOption = None,
    isa: IsaOption = None,
    rounds: RoundsOption = 5,
    block: BlockOption = 0.25,
    minutes: MinutesOption = None,
    output: OutputOption = None,
    markdown: MarkdownOption = None,
    figure: FigureOption = None,
    save: SaveOption = False,
    as_json: JsonOption = False,
    progress: ProgressOption = True,
    smoke: SmokeOption = False,
) -> None:
    """Compare whole networks, static int8, with other libraries: latency and memory.

    Weights are random. Networks and peers whose package is not installed are named and left out.
    The exit code is 1 if torchquant was requested and could not be measured.
    """
    options = CnnOptions(
        networks=check_names("--networks", split(networks), list(NETWORKS)),
        peers=check_names("--peers", split(peers), list(CNN)),
        batches=parse_numbers("--batches", batches or ["1,8"]),
        threads=(1,) if smoke and not threads else parse_threads(threads or ["2"]),
        isa=isa,
        rounds=1 if smoke else rounds,
        block=0.002 if smoke else block,
        minutes=minutes,
        smoke=smoke,
    )
    files = Files("cnn", output, markdown, figure, save, isa, error_console())
    with progress_bar(files.errors, shown=progress) as on_step:
        runs = run_cnn(options, files.errors, on_step, on_run=files.write)
    _finish(runs, files, as_json, smoke, options.peers)


def parse_numbers(option: str, values: list[str]) -> tuple[int, ...]:
    """Numbers of at least 1: `["1,8"]` gives (1, 8)."""
    numbers = split(values)
    if not all(number.isdigit() and int(number) >= 1 for number in numbers):
        raise typer.BadParameter(
            f"must be numbers of at least 1, got {' '.join(numbers)!r}", param_hint=option
        )
    return tuple(dict.fromkeys(int(number) for number in numbers))


def _finish(
    runs: Sequence[AnyOfTheRuns],
    files: Files,
    as_json: bool,
    smoke: bool,
    peers: tuple[str, ...],
) -> None:
    """Print, write, and end with the command's status."""
    if as_json:
        print_json([record for run in runs for record in tables.records(run)])
    else:
        console = output_console()
        for run in runs:
            print_table(console, tables.rich_table(run))
            for table in tables.extra_tables(run):
                print_table(console, table)
            console.print(f"\n[bold]{escape(run.title)}[/bold]")
            for line in run.lines():
                console.print(line)
    for run in runs:
        for name, reason, count in tables.grouped_failures(run):
            warn(files.errors, f"{name}, {count} cases", reason)
    files.write(runs, drawn=True)
    if smoke:
        files.try_all(runs)
    measured = all(any(OURS in result.blocks for result in run.results) for run in runs)
    if (not peers or OURS in peers) and runs and not measured:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add both commands."""
    commands: dict[str, Callable[..., Any]] = {"conv": conv_command, "cnn": cnn_command}
    for name, command in commands.items():
        app.command(name)(command)
