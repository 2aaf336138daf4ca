"""``torchquant bench``: options, their errors, and where output goes.

The work is in the modules beside. Results go to standard output, progress and complaints to
standard error.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from torchquant import cpu
from torchquant.bench import machine, tables
from torchquant.bench.isa import isa_table, run_isa
from torchquant.bench.linear import Options, Progress, run_linear
from torchquant.bench.overhead import overhead_table, run_overhead
from torchquant.bench.peers import OURS, SUITES, all_peer_names
from torchquant.bench.results import Run
from torchquant.bench.roofline import DEFAULT_MEBIBYTES, MEBIBYTE, measure_roofline

app = typer.Typer(
    name="bench",
    help="Measure torchquant against this machine's limits and against other libraries.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
REPOSITORY_RESULTS = Path("benchmarks") / "results"


def split(values: list[str] | None) -> tuple[str, ...]:
    """Options may be repeated or hold several values between commas or spaces.

    >>> split(["1x*,4x*", "16x768x768"])
    ('1x*', '4x*', '16x768x768')
    """
    return tuple(part for value in values or [] for part in value.replace(",", " ").split())


def check_names(option: str, names: tuple[str, ...], known: list[str]) -> tuple[str, ...]:
    """Refuse a name that is not known, and list those that are."""
    for name in names:
        if name not in known:
            raise typer.BadParameter(
                f"must be of {', '.join(known)}, got {name!r}", param_hint=option
            )
    return names


def parse_threads(values: list[str] | None) -> tuple[int, ...]:
    """`["1,2"]` as (1, 2); 2 and 1 without."""
    numbers = split(values) or ("2", "1")
    if not all(number.isdigit() and int(number) >= 1 for number in numbers):
        raise typer.BadParameter(
            f"must be numbers of at least 1, got {' '.join(numbers)!r}", param_hint="--threads"
        )
    return tuple(dict.fromkeys(int(number) for number in numbers))


def check_isa(name: str | None) -> str | None:
    """Callback of ``--isa``: refuse what cannot run here; the message lists what can."""
    if name is not None:
        try:
            cpu.check_isa("the name", name)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return name


ThreadsOption = Annotated[
    list[str] | None,
    typer.Option("--threads", metavar="1,2", help="Threads of every peer; 2, then 1."),
]
IsaOption = Annotated[
    str | None,
    typer.Option(callback=check_isa, metavar="NAME", help="Instruction set of torchquant."),
]
RoundsOption = Annotated[int, typer.Option(min=1, help="Blocks per peer and shape.")]
BlockOption = Annotated[
    float, typer.Option(min=0.0001, metavar="SECONDS", help="Length of a block.")
]
MinutesOption = Annotated[
    float | None,
    typer.Option(min=0.0, help="About so long for all of it: rounds give way, shapes do not."),
]
OutputOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write JSON lines to this file.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
ProgressOption = Annotated[
    bool, typer.Option("--progress/--no-progress", help="Show a progress bar on a terminal.")
]
SaveOption = Annotated[
    bool,
    typer.Option(
        "--save", help="Write all files, named by date and CPU, to benchmarks/results or to here."
    ),
]
SmokeOption = Annotated[
    bool, typer.Option("--smoke", help="A few tiny blocks, seconds: does it run at all?")
]


@app.command("linear")
def linear_command(
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MxNxK,...",
            help="Only shapes that match ('1x*', '*x768x768'), or shapes of your own.",
        ),
    ] = None,
    suite: Annotated[
        list[str] | None, typer.Option(metavar="NAME,...", help=f"Of {', '.join(SUITES)}.")
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help=f"Of {', '.join(all_peer_names())}."),
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
        typer.Option(metavar="FILE", help="Write a figure; several runs: one file each."),
    ] = None,
    save: SaveOption = False,
    as_json: JsonOption = False,
    progress: ProgressOption = True,
    smoke: SmokeOption = False,
) -> None:
    """int8 linear layers against other libraries: table, roofline figure, files.

    Peers that are not installed are named and left out. Exits with code 1 if torchquant itself was
    asked for and could not be measured.
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
            lines, page, picture = (result_file(end, *parts) for end in (".jsonl", ".md", ".png"))
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
            complain(errors, f"{name}, {run.suite}, {count} shapes", reason)
    write(runs, drawn=True)
    if smoke:  # the writers must not go stale either
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
        typer.Option("--mib", metavar="1,43", help="Sizes of the buffers that are read, in MiB."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="Time for each figure.")] = 0.2,
    output: OutputOption = None,
    as_json: JsonOption = False,
    smoke: SmokeOption = False,
) -> None:
    """What this machine can do at most: multiply-adds per second, bytes read per second."""
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
    write_lines(output, records)


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
    """The integer product on every instruction set, against that instruction set's own peak."""
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
    write_lines(output, records)
    if save:
        write_lines(result_file(".jsonl", "isa"), records)


@app.command("overhead")
def overhead_command(
    seconds: Annotated[float, typer.Option(min=0.0001, help="Time for each figure.")] = 0.2,
    output: OutputOption = None,
    save: SaveOption = False,
    as_json: JsonOption = False,
    smoke: SmokeOption = False,
) -> None:
    """What a call of a tiny layer costs beside its kernel, piece by piece."""
    result = run_overhead(0.002 if smoke else seconds)
    if as_json:
        print_json(result)
    else:
        print_table(output_console(), overhead_table(result))
    write_lines(output, [result])
    if save:
        write_lines(result_file(".jsonl", "overhead"), [result])


def print_runs(runs: list[Run]) -> None:
    """Tables, then the summaries together, where they can be compared."""
    console = output_console()
    for run in runs:
        print_table(console, tables.rich_table(run))
    for run in runs:
        console.print(f"\n[bold]{escape(run.title)}[/bold]")
        for line in run.lines():
            console.print(line)


def print_table(console: Console, table: Table) -> None:
    """The title on lines of its own: rich would break it at the width of a narrow table."""
    if table.title:
        console.print(f"\n{table.title}", style="italic", soft_wrap=True)
    table.title = None
    console.print(table)


def write_files(
    runs: list[Run],
    output: Path | None,
    markdown: Path | None,
    figure: Path | None,
    errors: Console,
) -> None:
    """The files that were asked for; a figure per run."""
    if output:
        tables.write_json_lines(output, runs)
    if markdown:
        markdown.write_text(tables.markdown(runs))
    if not figure:
        return
    if find_spec("matplotlib") is None:
        complain(errors, "no figure", "matplotlib is not installed; pip install matplotlib")
        return
    from torchquant.bench.figures import save_linear_figure

    several_threads = len({run.threads for run in runs}) > 1
    for run in runs:
        suffix = f"-{run.suite}" if len({other.suite for other in runs}) > 1 else ""
        suffix += f"-{run.threads}threads" if several_threads else ""
        save_linear_figure(figure.with_name(f"{figure.stem}{suffix}{figure.suffix}"), run)


def write_lines(path: Path | None, records: list[dict[str, Any]]) -> None:
    """A record a line, where a file was asked for."""
    if path:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


def result_file(ending: str, kind: str, *parts: str | None) -> Path:
    """Where `--save` writes: the repository's folder of results where it is there, else here."""
    folder = REPOSITORY_RESULTS if REPOSITORY_RESULTS.is_dir() else Path()
    stem = "-".join([kind, machine.today(), machine.cpu_slug(), *filter(None, parts)])
    return folder / f"{stem}{ending}"


def complain(errors: Console, what: str, why: str) -> None:
    """One line on standard error."""
    errors.print(f"[yellow]{escape(what)}:[/yellow] {escape(why)}", soft_wrap=True)


def print_json(data: Any) -> None:
    """JSON on standard output, and nothing else there."""
    typer.echo(json.dumps(data, indent=2))


def output_console() -> Console:
    """Standard output; wide where it is no terminal, so that tables in files are not cut."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=240)


def error_console() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False)


@contextmanager
def progress_bar(console: Console, *, shown: bool) -> Iterator[Progress]:
    """A bar on a terminal that goes away when the block ends."""
    columns = (  # the description last, so that the bar does not jump with its length
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    hidden = not (shown and console.is_terminal)
    with Bar(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda description, done: bar.update(task, description=description, completed=done)
