"""The results of a run: a table on the terminal and, on request, a file of JSON lines."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def header(threads: int, **facts: Any) -> Row:
    """Machine, date, versions and command: the first line of a results file."""
    from torchquant.bench import machine  # not above: an onnxruntime worker must not import torch

    return {"kind": "header", **machine.describe(), "threads": threads, **facts}


def show(
    console: Console,
    title: str,
    rows: list[Row],
    columns: dict[str, tuple[str, str]],
    descriptions: dict[str, str],
) -> None:
    """Print one line per row, and below the table the description of each engine.

    Args:
        console: where to print.
        title: printed above the table.
        rows: with the key `engine`; a missing or None value is printed as "-".
        columns: heading and format of each key to print.
        descriptions: by engine.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("engine", no_wrap=True)
    for heading, _ in columns.values():
        longest_word = max(len(word) for word in heading.split())
        table.add_column(heading, justify="right", min_width=longest_word)
    for row in rows:
        cells = [_cell(row.get(key), form) for key, (_, form) in columns.items()]
        table.add_row(row["engine"], *cells)
    console.print(table)
    for row in rows:
        console.print(f"{row['engine']}: {descriptions[row['engine']]}", style="dim")


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
