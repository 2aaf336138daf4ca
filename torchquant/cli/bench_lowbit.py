"""``torchquant bench lowbit``: options, their errors, and files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from torchquant.bench.lowbit import LowbitOptions, run_lowbit
from torchquant.bench.peers import LOWBIT_SUITES, all_peer_names
from torchquant.cli.comparison import Comparison, fail_without_ours, with_common_options
from torchquant.cli.options import check_names, split


@with_common_options(block=0.04)
def lowbit_command(
    common: Comparison,
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
        **common.amounts(smoke_block=0.002, threads="2"),
    )
    try:
        options.selected()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--shapes, --formats") from None
    kind = options.suites[0] if len(options.suites) == 1 else "lowbit"
    runs = common.run(kind, run_lowbit, options, save_lowbit_figure)
    fail_without_ours(runs, options.peers)


def save_lowbit_figure(path: Path, run: Any) -> None:
    """Draw a run; needs matplotlib."""
    from torchquant.bench.lowbit_figures import save_lowbit_figure as save

    save(path, run)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("lowbit")(lowbit_command)
