"""``torchquant bench conv`` and ``cnn``: options, their errors, and files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from torchquant.bench.conv import CnnOptions, ConvOptions, run_cnn, run_conv
from torchquant.bench.networks import NETWORKS
from torchquant.bench.peers import CNN, CONV
from torchquant.cli.bench_files import save_conv_figure
from torchquant.cli.comparison import Comparison, fail_without_ours, with_common_options
from torchquant.cli.options import check_names, parse_numbers, split


@with_common_options(block=0.02)
def conv_command(
    common: Comparison,
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
    curve: Annotated[
        bool, typer.Option("--curve/--no-curve", help="Measure time over pixels and batch, too.")
    ] = True,
) -> None:
    """Compare int8 convolutions with other libraries: the layers of four networks, batch 1 and 8.

    Peers that are not installed are named and left out. The exit code is 1 if torchquant was
    requested and could not be measured.
    """
    options = ConvOptions(
        shapes=split(shapes),
        peers=check_names("--peers", split(peers), list(CONV)),
        curve=curve,
        **common.amounts(smoke_block=0.002, threads="2"),
    )
    try:
        options.selected()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--shapes") from None
    runs = common.run("conv", run_conv, options, save_conv_figure)
    fail_without_ours(runs, options.peers)


@with_common_options(block=0.25)
def cnn_command(
    common: Comparison,
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
) -> None:
    """Compare whole networks, static int8, with other libraries: latency and memory.

    Weights are random. Networks and peers whose package is not installed are named and left out.
    The exit code is 1 if torchquant was requested and could not be measured.
    """
    options = CnnOptions(
        networks=check_names("--networks", split(networks), list(NETWORKS)),
        peers=check_names("--peers", split(peers), list(CNN)),
        batches=parse_numbers("--batches", batches or ["1,8"]),
        **common.amounts(smoke_block=0.002, threads="2"),
    )
    runs = common.run("cnn", run_cnn, options, save_conv_figure)
    fail_without_ours(runs, options.peers)


def register(app: typer.Typer) -> None:
    """Add both commands."""
    commands: dict[str, Callable[..., Any]] = {"conv": conv_command, "cnn": cnn_command}
    for name, command in commands.items():
        app.command(name)(command)
