"""The ``torchquant`` command.

One function per subcommand; what it does stands in a module of its own, so that this file holds
options, their errors, and where the output goes: results to standard output, progress and errors to
standard error. Exit code 0: all well, 1: the command found a fault, 2: wrong usage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

import torchquant
from torchquant.bench.cli import app as bench_app
from torchquant.bench.cli import check_isa
from torchquant.cli import info
from torchquant.demo import run_demo
from torchquant.demo.steps import Listener
from torchquant.demo.tables import describe_failures
from torchquant.demo.tables import render as render_demo

app = typer.Typer(
    name="torchquant",
    help="Quantization for PyTorch with exact integer kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # library errors are written to be read as they are
)


app.add_typer(bench_app)


def print_version(wanted: bool) -> None:
    """Callback of ``--version``."""
    if wanted:
        typer.echo(f"torchquant {torchquant.__version__}")
        raise typer.Exit


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
IsaOption = Annotated[
    str | None,
    typer.Option(
        callback=check_isa,
        metavar="NAME",
        help="Instruction set to measure with; the active one if not given.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Threads to measure with; torch's setting if not given."),
]
ProgressOption = Annotated[
    bool, typer.Option("--progress/--no-progress", help="Show a progress bar on a terminal.")
]


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Quantization for PyTorch with exact integer kernels."""


@app.command("info")
def info_command(as_json: JsonOption = False) -> None:
    """Show CPU, instruction sets, threads and versions: what a bug report needs."""
    facts = info.collect()
    if as_json:
        print_json(facts.to_dict())
    else:
        Console(highlight=False).print(info.render(facts))


@app.command("demo")
def demo_command(
    isa: IsaOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    progress: ProgressOption = True,
) -> None:
    """Quantize a small transformer, and train it so: accuracy, size, latency, exactness.

    The model classifies handwritten digits. It and its test images ship with torchquant.

    Exits with code 1 if a check of exactness fails.
    """
    errors = Console(stderr=True, highlight=False)
    with progress_bar(errors, shown=progress and errors.is_terminal) as on_step:
        result = run_demo(isa=isa, threads=threads, on_step=on_step)
    if as_json:
        print_json(result.to_dict())
    else:
        Console(highlight=False).print(render_demo(result))
    if result.failures:
        errors.print(
            "torchquant demo: int8 results are not exact on this machine. Please report it, with "
            "the output of 'torchquant info':\n" + describe_failures(result),
            style="bold red",
            soft_wrap=True,
        )
        raise typer.Exit(1)


def print_json(data: dict[str, Any]) -> None:
    """JSON on standard output, and nothing else there."""
    typer.echo(json.dumps(data, indent=2))


@contextmanager
def progress_bar(console: Console, *, shown: bool) -> Iterator[Listener]:
    """A bar that goes away when the block ends; yields what sets description and fraction."""
    columns = (  # the description last, so that the bar does not jump with its length
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda description, done: bar.update(task, description=description, completed=done)
