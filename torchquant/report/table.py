"""A report's lines as a table: in a terminal of any width, and in a notebook.

A terminal that is too narrow gets fewer columns, and a very narrow one two lines per row. Figures
are never cut.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

_TABLE_WIDTH = 72  # narrower consoles get two lines per row
_PADDING = 3  # columns are this far apart; the table's edges take one column less


@dataclass(frozen=True)
class Column:
    """A column of a report's table.

    Attributes:
        title: the text above it.
        cell: takes a line of the table; returns the text of its cell.
        folds: the width from which a long text may continue on the next line, within the column; 0
            if it may not.
        right: True for numbers, which are set flush right.
        drops: columns with the highest number leave a narrow table first; 0 stays.
        joins: the text between the previous cell and this one where a row has two lines.
    """

    title: str
    cell: Callable[[Any], str]
    folds: int = 0
    right: bool = False
    drops: int = 0
    joins: str = ", "


def table_or_lines(
    lines: Sequence[Any], columns: Sequence[Column], width: int
) -> Iterator[Table | Text]:
    """A table that fits ``width``, or two lines per row where no table fits."""
    if not lines:
        return
    if width < _TABLE_WIDTH:
        yield from _two_lines(lines, columns)
        return
    kept = _fitting(lines, columns, width)
    fits = _total(lines, kept) <= width
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in kept:
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            overflow="fold",
            no_wrap=not column.folds,
            min_width=_needs(lines, column) if fits else None,
        )
    for line in lines:
        table.add_row(*(Text(column.cell(line)) for column in kept), style=_style(line))
    yield table


def _fitting(lines: Sequence[Any], columns: Sequence[Column], width: int) -> list[Column]:
    """The columns without those that leave no room for readable names and reasons."""
    kept = [column for column in columns if any(column.cell(line) for line in lines)]
    while _total(lines, kept) > width:
        last = max(kept, key=lambda column: column.drops)
        if not last.drops:
            break
        kept.remove(last)
    return kept


def _total(lines: Sequence[Any], columns: Sequence[Column]) -> int:
    """The width of a table whose names and reasons are readable."""
    return sum(_needs(lines, column) + _PADDING for column in columns) - 1


def _needs(lines: Sequence[Any], column: Column) -> int:
    natural = max(len(column.title), *(len(column.cell(line)) for line in lines))
    return min(natural, column.folds) if column.folds else natural


def _two_lines(lines: Sequence[Any], columns: Sequence[Column]) -> Iterator[Text]:
    for line in lines:
        text = columns[0].cell(line) + "\n  "
        joined = False
        for column in columns[1:]:
            cell = column.cell(line)
            text += (column.joins if joined and cell else "") + cell
            joined = joined or bool(cell)
        yield Text(text, style=_style(line), overflow="fold")


def _style(line: Any) -> str:
    return "dim" if line.items[0].unchanged else ""


def html_table(lines: Sequence[Any], columns: Sequence[Column], texts: Iterable[str]) -> str:
    """The table and the texts below it as HTML."""
    parts = []
    if lines:
        shown = [column for column in columns if any(column.cell(line) for line in lines)]
        head = "".join(f"<th>{html.escape(column.title)}</th>" for column in shown)
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>")
        for line in lines:
            dim = ' style="opacity: 0.6"' if _style(line) else ""
            cells = "".join(_cell(column, line) for column in shown)
            parts.append(f"<tr{dim}>{cells}</tr>")
        parts.append("</tbody></table>")
    parts += [f"<div>{html.escape(text)}</div>" for text in texts]
    return "".join(parts)


def _cell(column: Column, line: Any) -> str:
    align = "right" if column.right else "left"
    return f'<td style="text-align: {align}">{html.escape(column.cell(line))}</td>'
