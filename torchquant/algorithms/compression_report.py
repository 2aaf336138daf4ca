"""The report of a verb that chooses integers: how each layer was compressed, with its errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite

from torchquant.algorithms.found import Found
from torchquant.report.base import Report, RowReport
from torchquant.report.quantization import NORMS, QuantizationReport
from torchquant.report.words import human_bytes, size_change

__all__ = ["CompressedLayer", "CompressionReport", "compression_report"]


@dataclass(frozen=True)
class CompressedLayer(RowReport):
    """What a verb did to a layer.

    Attributes:
        name: name of the layer.
        kind: the name of its class.
        action: "compressed"; "rounded" if the layer got the nearest integers, or integers that were
            chosen without the data; "left" if it stays in float.
        reason: the errors below in words, or why the layer was rounded or left.
        nearest_error: the squared error of the layer's outputs with the nearest integers, relative
            to the squares of the outputs; 0 if it was not measured or is not finite.
        error: the same with the integers that were found.
        inputs: number of inputs of the layer in the data: tokens, or places of images.

    Example:
        >>> print(CompressedLayer("fc", "Linear", "compressed", "", 4e-3, 1e-3, 512))
        compressed: fc (Linear)
    """

    nearest_error: float = 0.0
    error: float = 0.0
    inputs: int = 0


@dataclass(frozen=True, repr=False)
class CompressionReport(Report):
    """What a verb did to a model; ``print`` it for a table.

    Attributes:
        rows: one row per layer, and per module with parameters of another kind that is no norm.
        notes: sentences that the user should read.
        quantization: the report of the step that put the integers into the model; None if
            ``convert_`` has still to do it.

    Example:
        >>> row = CompressedLayer("fc", "Linear", "compressed", "", 4e-3, 1e-3)
        >>> CompressionReport((row,)).summary()
        '1 compressed, 0 rounded, 0 left; 25% of the squared error of rounding is left'
    """

    rows: tuple[RowReport, ...]
    notes: tuple[str, ...] = ()
    quantization: QuantizationReport | None = None

    def summary(self) -> str:
        """One line with the numbers of layers, the gain, and the sizes of the model."""
        counts = (
            f"{sum(row.action == action for row in self.rows)} {action}"
            for action in ("compressed", "rounded", "left")
        )
        parts = [", ".join(counts)]
        done = [r for r in self.rows if isinstance(r, CompressedLayer) and r.nearest_error > 0]
        if done:
            kept = sum(row.error / row.nearest_error for row in done) / len(done)
            parts.append(f"{kept:.0%} of the squared error of rounding is left")
        if self.quantization is not None:
            before, after = self.quantization.bytes_before, self.quantization.bytes_after
            sizes = f"{human_bytes(before)} -> {human_bytes(after)}"
            parts.append(f"model {sizes} ({size_change(before, after)})")
        return "; ".join(parts)


def compression_report(
    found: Mapping[str, Found],
    rounded: Mapping[str, str],
    quantization: QuantizationReport,
    notes: Iterable[str] = (),
) -> CompressionReport:
    """The report of a verb that quantized the model.

    Args:
        found: what was found for layers, by name.
        rounded: why other layers have the nearest integers, by name.
        quantization: the report of the step that quantized them.
        notes: notes of the verb, which come before those of ``quantization``.

    Example:
        >>> import torchquant
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
        >>> quantization = torchquant.quantize_(model)
        >>> for row in compression_report({}, {"0": "no data"}, quantization):
        ...     print(row)
        rounded: 0 (Linear): no data
        left: 1 (Linear): too small to benefit
    """
    rows: list[RowReport] = []
    for row in quantization.rows:
        if row.family == NORMS:
            continue
        if row.action != "quantized":
            rows.append(CompressedLayer(row.name, row.kind, "left", row.reason))
        elif row.name in found:
            rows.append(compressed_layer(row.name, row.kind, found[row.name], row.reason))
        else:
            why = "; ".join(filter(None, (rounded.get(row.name, ""), row.reason)))
            rows.append(CompressedLayer(row.name, row.kind, "rounded", why))
    return CompressionReport(tuple(rows), (*notes, *quantization.notes), quantization)


def compressed_layer(name: str, kind: str, found: Found, remark: str = "") -> CompressedLayer:
    """The row of a layer for which a walk found something.

    Example:
        >>> print(compressed_layer("fc", "Linear", Found(None, "compressed", "", 4e-3, 1e-3)))
        compressed: fc (Linear): error 4.0e-03 to 1.0e-03
    """
    if not (isfinite(found.nearest_error) and isfinite(found.error)):
        reason = "; ".join(filter(None, (found.reason, "its errors are not finite", remark)))
        return CompressedLayer(name, kind, found.action, reason, inputs=found.rows)
    error = f"error {found.nearest_error:.1e} to {found.error:.1e}" if found.nearest_error else ""
    reason = "; ".join(filter(None, (error, found.reason, remark)))
    numbers = (found.nearest_error, found.error, found.rows)
    return CompressedLayer(name, kind, found.action, reason, *numbers)
