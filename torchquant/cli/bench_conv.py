"""``torchquant bench conv`` and ``cnn``: options, their errors, and files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from torchquant.bench.conv import CnnOptions, ConvOptions, run_cnn, run_conv
from torchquant.bench.networks import NETWORKS
from torchquant.bench.peers import CNN, CONV, OURS
from torchquant.bench.results import AnyRun
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
    parse_numbers,
    parse_threads,
    split,
)
from torchquant.cli.bench_files import Files, save_conv_figure
from torchquant.cli.options import IsaOption, JsonOption, ProgressOption
from torchquant.cli.output import error_console, progress_bar


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
    errors = error_console()
    files = Files("conv", save_conv_figure, output, markdown, figure, save, isa, errors)
    with progress_bar(errors, shown=progress) as on_step:
        runs = run_conv(options, errors, on_step, on_run=files.write)
    files.finish(runs, as_json=as_json, smoke=smoke)
    _fail_without_ours(runs, options.peers)


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
    errors = error_console()
    files = Files("cnn", save_conv_figure, output, markdown, figure, save, isa, errors)
    with progress_bar(errors, shown=progress) as on_step:
        runs = run_cnn(options, errors, on_step, on_run=files.write)
    files.finish(runs, as_json=as_json, smoke=smoke)
    _fail_without_ours(runs, options.peers)


def _fail_without_ours(runs: Sequence[AnyRun[Any]], peers: tuple[str, ...]) -> None:
    """End with status 1 if torchquant was requested and a run has no time of it."""
    measured = all(any(OURS in result.blocks for result in run.results) for run in runs)
    if (not peers or OURS in peers) and runs and not measured:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add both commands."""
    commands: dict[str, Callable[..., Any]] = {"conv": conv_command, "cnn": cnn_command}
    for name, command in commands.items():
        app.command(name)(command)
