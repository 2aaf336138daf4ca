"""The report of load_checkpoint and save_checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torchquant.report import Report, RowReport
from torchquant.report.base import NAME, RESULT, RowLine
from torchquant.report.table import Column
from torchquant.report.words import human_bytes


@dataclass(frozen=True)
class CheckpointRow(RowReport):
    """What happened to one module of a model when a checkpoint was read or written.

    Attributes:
        name: the module's first name in the model.
        kind: the name of its class before.
        action: "loaded", if the layer has the integers of the checkpoint, and so exactly its
            values; "rounded", if our formats do not hold them; "written"; "float" for tensors that
            are floats.
        reason: why a weight was rounded or is float, or a remark; may be empty.
        stored: how the checkpoint holds the weight.
        weights: how the integers of our layer are quantized; empty in float.
        error: for a rounded weight, the root of its squared error over its squared values; 0 if
            nothing was rounded.
        bytes: of the module's tensors in memory, or in the file.

    Example:
        >>> print(CheckpointRow("fc", "Linear", "loaded", "", stored="AWQ, int4 in groups of 128"))
        loaded: fc (Linear)
    """

    action: Literal["loaded", "rounded", "written", "float"]
    reason: str = ""
    stored: str = ""
    weights: str = ""
    error: float = 0.0
    bytes: int = 0

    def key(self) -> Any:
        return self.kind, self.action, self.stored, self.weights


@dataclass(frozen=True, repr=False)
class CheckpointReport(Report):
    """Result of :func:`torchquant.load_checkpoint` and :func:`torchquant.save_checkpoint`.

    Attributes:
        rows: one row per module with tensors, in the order of the model's modules.
        layout: the layout of the checkpoint.
        notes: sentences that the user should read.

    Example:
        >>> rows = tuple(CheckpointRow(f"layers.{i}", "Linear", "loaded") for i in range(4))
        >>> CheckpointReport(rows, "gptq")
        <CheckpointReport: gptq: 4 loaded; 0 B>
    """

    rows: tuple[CheckpointRow, ...]
    layout: str
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """The bytes of all rows."""
        return sum(row.bytes for row in self.rows)

    @property
    def largest_error(self) -> float:
        """The largest relative error of a weight; 0 if no weight was rounded."""
        return max((row.error for row in self.rows), default=0.0)

    def summary(self) -> str:
        """One line with the numbers of rows."""
        counts = Counter(row.action for row in self.rows)
        parts = [f"{count} {_WORDS.get(action, action)}" for action, count in counts.items()]
        if self.largest_error:
            parts.append(f"largest relative error {_error(self.largest_error)}")
        return f"{self.layout}: {', '.join(parts)}; {human_bytes(self.bytes)}"

    def table_columns(self) -> Sequence[Column]:
        """The columns of the printed table."""
        errors = (Column("error", _errors, right=True, drops=1),) if self.largest_error else ()
        return (
            replace(NAME, title="layer"),
            Column("in the file", _stored, folds=24, drops=2),
            Column("integers", _weights, folds=21, drops=3),
            *errors,
            Column("bytes", _bytes, right=True, drops=1),
            RESULT,
        )


_WORDS = {"float": "in float"}


def _error(value: float) -> str:
    return f"{100 * value:.2g} %"


def _first(line: RowLine) -> CheckpointRow:
    row = line.items[0]
    assert isinstance(row, CheckpointRow)
    return row


def _stored(line: RowLine) -> str:
    return _first(line).stored


def _weights(line: RowLine) -> str:
    return _first(line).weights


def _errors(line: RowLine) -> str:
    most = max(row.error for row in line.items if isinstance(row, CheckpointRow))
    return _error(most) if most else ""


def _bytes(line: RowLine) -> str:
    return human_bytes(sum(row.bytes for row in line.items if isinstance(row, CheckpointRow)))


__all__ = ["CheckpointReport", "CheckpointRow"]
