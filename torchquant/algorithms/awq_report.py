"""The report of awq_: scales and ranges of each layer, with the errors of its outputs."""

from __future__ import annotations

from dataclasses import dataclass

from torchquant.report import QuantizationReport
from torchquant.report.base import Report, RowReport
from torchquant.report.words import human_bytes, size_change

__all__ = ["AWQLayer", "AWQReport"]


@dataclass(frozen=True)
class AWQLayer(RowReport):
    """What :func:`torchquant.awq_` did to a layer.

    Attributes:
        name: name of the layer.
        kind: the name of its class.
        action: "scaled" if the channels that the layer reads have scales; "clipped" if it only has
            ranges of least error; "rounded" if it has the nearest integers; "left" if it stays in
            float.
        reason: which module has the inverse scales, the errors below in words, or why the layer has
            no scales.
        exponent: the power of the mean magnitudes of the inputs that gave the scales.
        nearest_error: the squared error of the layer's outputs with the nearest integers and
            without scales, relative to the squares of the outputs; 0 if it was not measured.
        error: the same with these scales and integers.

    Example:
        >>> print(AWQLayer("fc", "Linear", "scaled", "after norm", 0.5, 4e-3, 1e-3))
        scaled: fc (Linear): after norm
    """

    exponent: float = 0.0
    nearest_error: float = 0.0
    error: float = 0.0


@dataclass(frozen=True, repr=False)
class AWQReport(Report):
    """What :func:`torchquant.awq_` did; ``print`` it for a table.

    Attributes:
        rows: one row per layer, and per module with parameters of another kind that is no norm.
        notes: sentences that the user should read.
        quantization: the report of the step that put the integers into the model; None with
            ``quantize=False``.
        difference: by how much the scales alone changed the outputs of the float model, relative to
            their greatest magnitude.

    Example:
        >>> row = AWQLayer("fc", "Linear", "scaled", "after norm", 0.5, 4e-3, 1e-3)
        >>> AWQReport((row,)).summary()
        '1 scaled, 0 clipped, 0 rounded, 0 left; 25% of the squared error of rounding is left'
    """

    rows: tuple[AWQLayer, ...]
    notes: tuple[str, ...] = ()
    quantization: QuantizationReport | None = None
    difference: float = 0.0

    def summary(self) -> str:
        """One line with the numbers of layers, the gain, and the sizes of the model."""
        counts = (
            f"{sum(row.action == action for row in self.rows)} {action}"
            for action in ("scaled", "clipped", "rounded", "left")
        )
        parts = [", ".join(counts)]
        done = [row for row in self.rows if row.nearest_error > 0]
        if done:
            kept = sum(row.error / row.nearest_error for row in done) / len(done)
            parts.append(f"{kept:.0%} of the squared error of rounding is left")
        if self.quantization is not None:
            sizes = self.quantization.bytes_before, self.quantization.bytes_after
            text = " -> ".join(map(human_bytes, sizes))
            parts.append(f"model {text} ({size_change(*sizes)})")
        return "; ".join(parts)
