"""``torchquant bench``: options, their errors, and files.

The measurements are in :mod:`torchquant.bench`.
"""

from __future__ import annotations

from typing import Annotated

import typer

from torchquant.bench import machine, tables
from torchquant.bench.files import results_file, write_json_lines
from torchquant.bench.isa import isa_table, run_isa
from torchquant.bench.linear import Options, run_linear
from torchquant.bench.overhead import overhead_table, run_overhead
from torchquant.bench.peers import OURS, SUITES, all_peer_names
from torchquant.bench.roofline import DEFAULT_MEBIBYTES, MEBIBYTE, measure_roofline
from torchquant.cli.bench_files import save_linear_figure
from torchquant.cli.comparison import Comparison, with_common_options
from torchquant.cli.options import (
    BlockOption,
    JsonOption,
    MinutesOption,
    OutputOption,
    ProgressOption,
    RoundsOption,
    SaveOption,
    SmokeOption,
    ThreadsOption,
    check_names,
    parse_threads,
    split,
)
from torchquant.cli.output import (
    error_console,
    output_console,
    print_json,
    print_table,
    progress_bar,
)

app = typer.Typer(
    name="bench",
    help="Measure torchquant against this machine's limits and against other libraries.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command("linear")
@with_common_options(block=0.04)
def linear_command(
    common: Comparison,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MxNxK,...",
            help="Only shapes that match ('1x*', '*x768x768'), or your own shapes.",
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help=f"One or more of {', '.join(SUITES)}."),
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help=f"One or more of {', '.join(all_peer_names())}."),
    ] = None,
) -> None:
    """Compare int8 linear layers with other libraries: table, roofline figure, files.

    Peers that are not installed are named and left out. The exit code is 1 if torchquant was
    requested and could not be measured.
    """
    suites = check_names("--suite", split(suite), list(SUITES)) or tuple(SUITES)
    options = Options(
        suites=suites,
        shapes=split(shapes),
        peers=check_names("--peers", split(peers), all_peer_names()),
        **common.amounts(smoke_block=0.005),
    )
    try:
        options.selected()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--shapes") from None
    runs = common.run("linear", run_linear, options, save_linear_figure)
    wanted = not options.peers or OURS in options.peers
    if wanted and any(OURS in run.header["missing"] for run in runs):
        raise typer.Exit(1)


@app.command("roofline")
def roofline_command(
    threads: ThreadsOption = None,
    mebibytes: Annotated[
        list[str] | None,
        typer.Option("--mib", metavar="MIB,...", help="Sizes of the buffers to read, in MiB."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="Time per measurement.")] = 0.2,
    output: OutputOption = None,
    as_json: JsonOption = False,
    smoke: SmokeOption = False,
) -> None:
    """Measure this machine's limits: multiply-adds per second, bytes read per second."""
    try:
        sizes = [float(size) for size in split(mebibytes)] or list(DEFAULT_MEBIBYTES)
    except ValueError:
        raise typer.BadParameter("must be numbers of MiB", param_hint="--mib") from None
    if not all(0 < size <= 1 << 14 for size in sizes):
        raise typer.BadParameter("must be more than 0 and at most 16384", param_hint="--mib")
    if smoke:
        sizes, seconds = sizes[:1], 0.005
    measured = [
        measure_roofline(number, [round(size * MEBIBYTE) for size in sizes], seconds)
        for number in parse_threads(threads)
    ]
    records = [
        {"kind": "roofline", **machine.describe(), **roofline.to_dict()} for roofline in measured
    ]
    if as_json:
        print_json(records)
    else:
        for roofline in measured:
            for table in tables.roofline_tables(roofline):
                print_table(output_console(), table)
    if output:
        write_json_lines(output, records)


@app.command("isa")
def isa_command(
    threads: ThreadsOption = None,
    rounds: RoundsOption = 5,
    block: BlockOption = 0.04,
    minutes: MinutesOption = None,
    output: OutputOption = None,
    save: SaveOption = False,
    as_json: JsonOption = False,
    progress: ProgressOption = True,
    smoke: SmokeOption = False,
) -> None:
    """Compare the integer product on every instruction set with that instruction set's peak."""
    options = Options(
        threads=(1,) if smoke and not threads else parse_threads(threads),
        rounds=1 if smoke else rounds,
        block=0.005 if smoke else block,
        minutes=minutes,
        smoke=smoke,
    )
    errors = error_console()
    with progress_bar(errors, shown=progress) as on_step:
        records = run_isa(options, errors, on_step)
    if as_json:
        print_json(records)
    else:
        for record in records:
            print_table(output_console(), isa_table(record))
            for words, value in record["answers"].items():
                output_console().print(f"{words}: {value:.2f}")
    if output:
        write_json_lines(output, records)
    if save:
        write_json_lines(results_file("isa"), records)


@app.command("overhead")
def overhead_command(
    seconds: Annotated[float, typer.Option(min=0.0001, help="Time per measurement.")] = 0.2,
    output: OutputOption = None,
    save: SaveOption = False,
    as_json: JsonOption = False,
    smoke: SmokeOption = False,
) -> None:
    """Measure what a call of a tiny layer costs in addition to its kernel, piece by piece."""
    result = run_overhead(0.002 if smoke else seconds)
    if as_json:
        print_json(result)
    else:
        print_table(output_console(), overhead_table(result))
    if output:
        write_json_lines(output, [result])
    if save:
        write_json_lines(results_file("overhead"), [result])
