"""``torchquant bench lowbit``: options, their errors, and files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from torchquant.bench.lowbit import LowbitOptions, run_lowbit
from torchquant.bench.peers import LOWBIT_SUITES, OURS, all_peer_names
from torchquant.cli.bench import (
    BlockOption,
    FigureOption,
    MarkdownOption,
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
from torchquant.cli.bench_files import Files
from torchquant.cli.options import IsaOption, JsonOption, ProgressOption
from torchquant.cli.output import error_console, progress_bar


def lowbit_command(
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MxNxK,...",
            help="Only shapes that match ('1x*', '*x4096x4096'; '*c': weights out of the caches), "
            "or your own shapes ('7x500x300').",
        ),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMAT,...",
            help="Only these formats: '4g128' has 4 bits and a scale for 128 inputs, '4' a scale "
            "for each output.",
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help="lowbit (activations are quantized to int8 in the call), lowbit-float, or both.",
        ),
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...", help=f"One or more of {', '.join(all_peer_names(LOWBIT_SUITES))}."
        ),
    ] = None,
    threads: ThreadsOption = None,
    isa: IsaOption = None,
    rounds: RoundsOption = 5,
    block: BlockOption = 0.04,
    minutes: MinutesOption = None,
    output: OutputOption = None,
    markdown: MarkdownOption = None,
    figure: FigureOption = None,
    save: SaveOption = False,
    as_json: JsonOption = False,
    progress: ProgressOption = True,
    smoke: SmokeOption = False,
) -> None:
    """Compare layers with weights of 2 to 8 bits with other libraries, at 1 to 256 rows.

    Peers that are not installed are named and left out. The exit code is 1 if torchquant was
    requested and could not be measured.
    """
    options = LowbitOptions(
        shapes=split(shapes),
        formats=split(formats),
        suites=check_names("--suite", split(suite), list(LOWBIT_SUITES)) or tuple(LOWBIT_SUITES),
        peers=check_names("--peers", split(peers), all_peer_names(LOWBIT_SUITES)),
        threads=(1,) if smoke and not threads else parse_threads(threads or ["2"]),
        isa=isa,
        rounds=1 if smoke else rounds,
        block=0.002 if smoke else block,
        minutes=minutes,
        smoke=smoke,
    )
    try:
        options.selected()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--shapes, --formats") from None
    errors = error_console()
    kind = options.suites[0] if len(options.suites) == 1 else "lowbit"
    files = Files(kind, save_lowbit_figure, output, markdown, figure, save, isa, errors)
    with progress_bar(errors, shown=progress) as on_step:
        runs = run_lowbit(options, errors, on_step, on_run=files.write)
    files.finish(runs, as_json=as_json, smoke=smoke)
    measured = all(any(OURS in result.blocks for result in run.results) for run in runs)
    if (not options.peers or OURS in options.peers) and not measured:
        raise typer.Exit(1)


def save_lowbit_figure(path: Path, run: Any) -> None:
    """Draw a run; needs matplotlib."""
    from torchquant.bench.lowbit_figures import save_lowbit_figure as save

    save(path, run)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("lowbit")(lowbit_command)
