"""``torchquant bench``: options, their errors, and files.

The measurements are in :mod:`torchquant.bench`.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from torchquant.bench import machine, tables
from torchquant.bench.files import results_file, write_json_lines
from torchquant.bench.isa import isa_table, run_isa
from torchquant.bench.linear import Options, run_linear
from torchquant.bench.overhead import overhead_table, run_overhead
from torchquant.bench.peers import OURS, SUITES, all_peer_names
from torchquant.bench.results import Run
from torchquant.bench.roofline import DEFAULT_MEBIBYTES, MEBIBYTE, measure_roofline
from torchquant.cli.options import IsaOption, JsonOption, ProgressOption
from torchquant.cli.output import (
    error_console,
    output_console,
    print_json,
    print_table,
    progress_bar,
    warn,
)

app = typer.Typer(
    name="bench",
    help="Measure torchquant against this machine's limits and against other libraries.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def split(values: list[str] | None) -> tuple[str, ...]:
    """The values of an option that can be repeated, or have several values with commas or spaces.

    >>> split(["1x*,4x*", "16x768x768"])
    ('1x*', '4x*', '16x768x768')
    """
    return tuple(part for value in values or [] for part in value.replace(",", " ").split())


def check_names(option: str, names: tuple[str, ...], known: list[str]) -> tuple[str, ...]:
    """Refuse an unknown name; the message lists the known ones."""
    for name in names:
        if name not in known:
            raise typer.BadParameter(
                f"must be one of {', '.join(known)}, got {name!r}", param_hint=option
            )
    return names


def parse_threads(values: list[str] | None) -> tuple[int, ...]:
    """The numbers of threads: `["1,2"]` gives (1, 2), None gives (2, 1)."""
    numbers = split(values) or ("2", "1")
    if not all(number.isdigit() and int(number) >= 1 for number in numbers):
        raise typer.BadParameter(
            f"must be numbers of at least 1, got {' '.join(numbers)!r}", param_hint="--threads"
        )
    return tuple(dict.fromkeys(int(number) for number in numbers))


ThreadsOption = Annotated[
    list[str] | None,
    typer.Option("--threads", metavar="N,...", help="Threads of every peer (default: 2, then 1)."),
]
RoundsOption = Annotated[int, typer.Option(min=1, help="Blocks per peer and shape.")]
BlockOption = Annotated[
    float, typer.Option(min=0.0001, metavar="SECONDS", help="Length of a block.")
]
MinutesOption = Annotated[
    float | None,
    typer.Option(min=0.0, help="Time budget in minutes: fewer rounds, never fewer shapes."),
]
OutputOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write JSON lines to this file.")
]
SaveOption = Annotated[
    bool,
    typer.Option(
        "--save",
        help="Write all files, named by date and CPU, to benchmarks/results or the current folder.",
    ),
]
SmokeOption = Annotated[
    bool,
    typer.Option(
        "--smoke", help="Measure almost nothing, in seconds: only shows that the command works."
    ),
]


@app.command("linear")
def linear_command(
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
    threads: ThreadsOption = None,
    isa: IsaOption = None,
    rounds: RoundsOption = 5,
    block: BlockOption = 0.04,
    minutes: MinutesOption = None,
    output: OutputOption = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the tables to this file.")
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write a figure to this file; for several runs one file each."
        ),
    ] = None,
    save: SaveOption = False,
    as_json: JsonOption = False,
    progress: ProgressOption = True,
    smoke: SmokeOption = False,
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
        threads=(1,) if smoke and not threads else parse_threads(threads),
        isa=isa,
        rounds=1 if smoke else rounds,
        block=0.005 if smoke else block,
        minutes=minutes,
        smoke=smoke,
    )
    try:
        options.selected()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--shapes") from None
    errors = error_console()

    def write(runs: list[Run], drawn: bool = False) -> None:
        write_files(runs, output, markdown, figure if drawn else None, errors)
        for number in options.threads if save else ():
            mine = [run for run in runs if run.threads == number]
            parts = ("linear", f"{number}thread{'s' if number > 1 else ''}", isa)
            lines, page, picture = (
                results_file(*parts, suffix=suffix) for suffix in (".jsonl", ".md", ".png")
            )
            if mine:
                write_files(mine, lines, page, picture if drawn else None, errors)

    with progress_bar(errors, shown=progress) as on_step:
        runs = run_linear(options, errors, on_step, on_run=write)
    if as_json:
        print_json([record for run in runs for record in tables.records(run)])
    else:
        print_runs(runs)
    for run in runs:
        for name, reason, count in tables.grouped_failures(run):
            warn(errors, f"{name}, {run.suite}, {count} shapes", reason)
    write(runs, drawn=True)
    if smoke:  # also runs what writes the files
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_files(runs, folder / "a.jsonl", folder / "a.md", folder / "a.png", errors)
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


def print_runs(runs: list[Run]) -> None:
    """Print the tables, then all summaries together, where they can be compared."""
    console = output_console()
    for run in runs:
        print_table(console, tables.rich_table(run))
    for run in runs:
        console.print(f"\n[bold]{escape(run.title)}[/bold]")
        for line in run.lines():
            console.print(line)


def write_files(
    runs: list[Run],
    output: Path | None,
    markdown: Path | None,
    figure: Path | None,
    errors: Console,
) -> None:
    """Write the requested files; one figure per run."""
    if output:
        write_json_lines(output, [record for run in runs for record in tables.records(run)])
    if markdown:
        markdown.write_text(tables.markdown(runs))
    if not figure:
        return
    if find_spec("matplotlib") is None:
        warn(errors, "no figure", "matplotlib is not installed; pip install matplotlib")
        return
    from torchquant.bench.figures import save_linear_figure

    several_threads = len({run.threads for run in runs}) > 1
    for run in runs:
        suffix = f"-{run.suite}" if len({other.suite for other in runs}) > 1 else ""
        suffix += f"-{run.threads}threads" if several_threads else ""
        save_linear_figure(figure.with_name(f"{figure.stem}{suffix}{figure.suffix}"), run)
