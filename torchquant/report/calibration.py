"""The report of calibrate: the range of each layer's input, and the values that were not finite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torchquant.report.base import KIND, NAME, Report, RowLine, RowReport
from torchquant.report.table import Column


@dataclass(frozen=True)
class RangeReport(RowReport):
    """The observed and the chosen range of the input of one layer.

    Attributes:
        name: the layer's first name in the model.
        kind: the name of its class.
        action: "observed", or "no range" if no finite value other than 0 reached the layer.
        reason: why there is no range; empty otherwise.
        observer: the class of the observer.
        observed: least and greatest finite value of all batches so far, or their moving averages;
            None without data.
        chosen: the range that the observer chose; None without data.
        scale: the scale of this range; None without a range.
        zero_point: its zero point; None without a range.
        nonfinite: number of NaN and infinite values, which were left out.

    Example:
        >>> import torch, torchquant
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> config = torchquant.Int8StaticActivationInt8WeightConfig(observer="minmax")
        >>> _ = torchquant.prepare_(model, config)
        >>> batches = [torch.linspace(-1, 3, 64)[None]]
        >>> row = torchquant.calibrate(model, batches, progress=False).layers[0]
        >>> row.name, row.action, row.observed, row.zero_point
        ('0', 'observed', (-1.0, 3.0), -64)
    """

    observer: str
    observed: tuple[float, float] | None
    chosen: tuple[float, float] | None
    scale: float | None
    zero_point: int | None
    nonfinite: int = 0

    def key(self) -> Any:
        return self.kind, self.action, self.observer


@dataclass(frozen=True, repr=False)
class CalibrationReport(Report):
    """What a calibration saw. ``print`` the report, or show it in a notebook.

    In a line for the repeated blocks of a model, a range goes from the least to the greatest end of
    all blocks.

    Attributes:
        layers: one row for each prepared layer, in the order of the model's modules.
        batches: number of batches of this call.
        samples: sum of the first dimensions of the batches' first tensors; None if a batch has no
            tensor.
        notes: sentences that the user should read.

    Example:
        >>> import torch, torchquant
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> config = torchquant.Int8StaticActivationInt8WeightConfig(observer="minmax")
        >>> _ = torchquant.prepare_(model, config)
        >>> report = torchquant.calibrate(model, [torch.linspace(-1, 2, 128).view(2, 64)])
        >>> report["0"].observed, report.summary()
        ((-1.0, 2.0), '1 layer observed over 1 batch, 2 samples')
    """

    layers: tuple[RangeReport, ...]
    batches: int
    samples: int | None
    notes: tuple[str, ...] = field(default=())

    @property
    def rows(self) -> tuple[RangeReport, ...]:  # type: ignore[override]
        """All rows."""
        return self.layers

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[RangeReport]: ...

        def __getitem__(self, name: str) -> RangeReport: ...

    @property
    def nonfinite(self) -> dict[str, int]:
        """Numbers of NaN and infinite values by layer, for layers that have any."""
        return {row.name: row.nonfinite for row in self.layers if row.nonfinite}

    def summary(self) -> str:
        """One line: numbers of layers, batches and samples."""
        observed = sum(row.action == "observed" for row in self.layers)
        counts = f"{_count(observed, 'layer')} observed over {_count(self.batches, 'batch')}"
        if self.samples is not None:
            counts += f", {_count(self.samples, 'sample')}"
        missing = len(self.layers) - observed
        return f"{counts}; {missing} without a range" if missing else counts

    def table_columns(self) -> Sequence[Column]:
        return (
            replace(NAME, title="layer"),
            KIND,
            Column("observer", _observer, drops=2),
            Column("observed", _observed, right=True),
            Column("range", _chosen, right=True),
            Column("not finite", _nonfinite, right=True, joins="; not finite: "),
            Column("result", _result, folds=24),
        )


def _ranges(line: RowLine) -> Iterator[RangeReport]:
    for row in line.items:
        assert isinstance(row, RangeReport)
        yield row


def _observer(line: RowLine) -> str:
    return next(_ranges(line)).observer.removesuffix("Observer")


def _observed(line: RowLine) -> str:
    return _span([row.observed for row in _ranges(line)])


def _chosen(line: RowLine) -> str:
    return _span([row.chosen for row in _ranges(line)])


def _nonfinite(line: RowLine) -> str:
    count = sum(row.nonfinite for row in _ranges(line))
    return str(count) if count else ""


def _result(line: RowLine) -> str:
    count = f" ({len(line.items)})" if len(line.items) > 1 else ""
    reason = f": {line.texts[0]}" if line.texts[0] else ""
    return f"{line.items[0].action}{count}{reason}"


def _span(ranges: Sequence[tuple[float, float] | None]) -> str:
    ends = [pair for pair in ranges if pair is not None]
    if not ends:
        return ""
    return f"[{min(low for low, _ in ends):.4g}, {max(high for _, high in ends):.4g}]"


def _count(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith('ch') else 's'}"


__all__ = ["CalibrationReport", "RangeReport"]
