"""Where output goes: results to standard output, progress and messages to standard error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


def print_json(data: Any) -> None:
    """Print JSON, and nothing else, on standard output."""
    typer.echo(json.dumps(data, indent=2))


def output_console() -> Console:
    """Standard output; wide if it is not a terminal, so that tables in files are complete."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=240)


def error_console() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False)


def print_table(console: Console, table: Table) -> None:
    """Print the title on lines of its own: rich would break it at the width of a narrow table."""
    if table.title:
        console.print(f"\n{table.title}", style="italic", soft_wrap=True)
    table.title = None
    console.print(table)


def warn(errors: Console, what: str, why: str) -> None:
    """Print one line on standard error."""
    errors.print(f"[yellow]{escape(what)}:[/yellow] {escape(why)}", soft_wrap=True)


@contextmanager
def progress_bar(console: Console, *, shown: bool) -> Iterator[Callable[[str, float], None]]:
    """A bar that disappears when the block ends; hidden if the console is not a terminal.

    Yields:
        A function that sets the description and the completed fraction.
    """
    columns = (  # the description comes last, so that its length does not move the bar
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    hidden = not (shown and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda description, done: bar.update(task, description=description, completed=done)
