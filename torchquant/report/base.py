"""The base of every verb's report: rows with a reason each, printed as a table, and data for code.

A report is a frozen dataclass derived from :class:`Report`, whose rows are dataclasses derived from
:class:`RowReport`. It prints itself in a terminal and in a notebook, folds the repeated blocks of a
model, and converts itself to JSON.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from torchquant.report.folding import Line, fold_items
from torchquant.report.table import Column, html_table, table_or_lines


@dataclass(frozen=True)
class RowReport:
    """What a verb did to one module, and why.

    Attributes:
        name: the module's first name in the model.
        kind: the name of its class before the verb.
        action: what the verb did, or a word such as "skipped" or "left".
        reason: why the module stayed unchanged, or a remark; may be empty.

    Example:
        >>> print(RowReport("norm", "BatchNorm1d", "left", "filter_fn"))
        left: norm (BatchNorm1d): filter_fn
    """

    name: str
    kind: str
    action: str
    reason: str

    def __str__(self) -> str:
        line = f"{self.action}: {self.name} ({self.kind})"
        return f"{line}: {self.reason}" if self.reason else line

    @property
    def unchanged(self) -> bool:
        """True if the verb left the module as it was."""
        return self.action in ("skipped", "left", "float")

    def key(self) -> Any:
        """What is equal in all rows that share a printed line, besides names and reason."""
        return type(self), self.kind, self.action


RowLine = Line[RowReport]


def _name(line: RowLine) -> str:
    return line.names[0]


def _kind(line: RowLine) -> str:
    return ", ".join(dict.fromkeys(row.kind for row in line.items))


def _result(line: RowLine) -> str:
    """The action, the number of rows, and the reason."""
    count = f" ({len(line.items)})" if len(line.items) > 1 else ""
    reason = f": {line.texts[0]}" if line.texts[0] else ""
    return f"{line.items[0].action}{count}{reason}"


NAME = Column("name", _name, folds=30)
KIND = Column("class", _kind, drops=1)
RESULT = Column("result", _result, folds=24)


class Report:
    """What a verb did to a model: rows, a summary and notes.

    ``print`` a report, or show it at the end of a notebook's cell. ``report[name]`` is the row of
    the module with this name, and a report can be iterated over and has a length. A subclass is a
    dataclass with ``frozen=True`` and ``repr=False``, and defines ``rows`` and ``summary``.

    Attributes:
        rows: one row per module.
        notes: sentences that the user should read.

    Example:
        >>> @dataclass(frozen=True, repr=False)
        ... class Found(Report):
        ...     rows: tuple[RowReport, ...] = ()
        ...     notes: tuple[str, ...] = ()
        ...     def summary(self) -> str:
        ...         return f"{len(self.rows)} found"
        >>> names = [f"layers.{index}.norm" for index in range(12)]
        >>> report = Found(tuple(RowReport(name, "LayerNorm", "replaced", "") for name in names))
        >>> report, report["layers.3.norm"].action
        (<Found: 12 found>, 'replaced')
        >>> print(report.lines()[0].names[0])
        layers.{0..11}.norm
    """

    rows: Sequence[RowReport]
    notes: tuple[str, ...]

    def summary(self) -> str:
        """One line with the numbers of rows."""
        raise NotImplementedError

    def table_columns(self) -> Sequence[Column]:
        """The columns of the printed table."""
        return NAME, KIND, RESULT

    def further_lines(self) -> Iterable[str]:
        """Lines to print between the summary and the notes."""
        return ()

    # ------------------------------------------------------------ rows

    def __iter__(self) -> Iterator[RowReport]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __bool__(self) -> bool:
        return True  # a report without rows is a report

    def __contains__(self, name: object) -> bool:
        return any(row.name == name for row in self.rows)

    def __getitem__(self, name: str) -> RowReport:
        """The row of the module with the given name.

        Raises:
            KeyError: no row has this name.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"the report has no row with the name {name!r}")

    # ------------------------------------------------------------ printing

    def lines(self) -> list[RowLine]:
        """The rows of the table; the rows of a model's repeated blocks share one."""
        return fold_items(
            self.rows, lambda row: (row.name,), lambda row: (row.reason,), lambda row: row.key()
        )

    def _texts(self) -> list[str]:
        return [self.summary(), *self.further_lines(), *self.notes]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from table_or_lines(self.lines(), self.table_columns(), options.max_width)
        # Text objects, because a name may look like rich's markup ("[red]") or an emoji.
        yield from map(Text, self._texts())

    def __str__(self) -> str:
        """The table, as wide as the terminal, or 110 columns wide without a terminal."""
        file = io.StringIO()
        width = shutil.get_terminal_size((110, 0)).columns
        Console(file=file, width=width, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def __repr__(self) -> str:
        """One line; ``print`` the report for the table."""
        return f"<{type(self).__name__}: {self.summary()}>"

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        return html_table(self.lines(), self.table_columns(), self._texts())

    # ------------------------------------------------------------ data

    def to_dict(self) -> dict[str, Any]:
        """Everything in the report as dictionaries, lists, strings and numbers."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        data = {field.name: _plain(getattr(self, field.name)) for field in fields}
        return {"report": type(self).__name__, "summary": self.summary(), **data}

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    # ------------------------------------------------------------ not the model

    if not TYPE_CHECKING:  # a type checker shall still report these mistakes

        def __call__(self, *args, **kwargs):
            raise TypeError(
                f"a {type(self).__name__} is not the model and cannot be called; the verb changed "
                "the model in place, so call the model that you passed to it"
            )

        def __getattr__(self, name):
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}; it is the report of a "
                "verb that changed the model in place: use the model that you passed to it"
            )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
