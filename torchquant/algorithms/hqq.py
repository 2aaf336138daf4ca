"""hqq_: integers on scales and zero points that half-quadratic optimization finds without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from torchquant.algorithms.half_quadratic import hqq
from torchquant.algorithms.integer_weight import IntegerWeight, nearest
from torchquant.algorithms.quantize_with import give, quantize_with
from torchquant.configs import Fusion, QuantizationConfig, Weights
from torchquant.convert.adjustment import float_weight
from torchquant.convert.plan import Step
from torchquant.convert.selection import FilterFn
from torchquant.report import QuantizationReport
from torchquant.report.base import Report, RowReport
from torchquant.report.progress import track
from torchquant.report.quantization import NORMS
from torchquant.report.words import human_bytes, size_change

__all__ = ["HQQLayer", "HQQReport", "hqq_"]

_WHO = "hqq_"


@dataclass(frozen=True)
class HQQLayer(RowReport):
    """What :func:`hqq_` did to a layer.

    Attributes:
        name: name of the layer.
        kind: the name of its class.
        action: "compressed", or "left" if the layer stays in float.
        reason: the errors below in words, or why the layer was left.
        nearest_error: the sum of ``|change|^norm`` over the weights with the nearest integers,
            relative to the sum of ``|weight|^norm``.
        error: the same with the integers that were found.

    Example:
        >>> print(HQQLayer("fc", "Linear", "compressed", "error 0.200 to 0.150", 0.2, 0.15))
        compressed: fc (Linear): error 0.200 to 0.150
    """

    nearest_error: float = 0.0
    error: float = 0.0


@dataclass(frozen=True, repr=False)
class HQQReport(Report):
    """What :func:`hqq_` did; ``print`` it for a table.

    Attributes:
        rows: one row per layer, and per module with parameters of another kind that is no norm.
        notes: sentences that the user should read.
        quantization: the report of the step that put the integers into the model.

    Example:
        >>> report = hqq_(nn.Sequential(nn.Linear(64, 64)))
        >>> report.summary().split(";")[0]
        '1 compressed, 0 left'
    """

    rows: tuple[HQQLayer, ...]
    notes: tuple[str, ...]
    quantization: QuantizationReport

    def summary(self) -> str:
        """One line with the numbers of layers, the gain, and the sizes of the model."""
        done = [row for row in self.rows if row.action == "compressed"]
        line = f"{len(done)} compressed, {len(self.rows) - len(done)} left"
        before = [row.error / row.nearest_error for row in done if row.nearest_error > 0]
        if before:
            line += f"; {sum(before) / len(before):.0%} of the error of rounding is left"
        sizes = self.quantization.bytes_before, self.quantization.bytes_after
        return f"{line}; model {' -> '.join(map(human_bytes, sizes))} ({size_change(*sizes)})"


@torch.no_grad()
def hqq_(
    model: nn.Module,
    config: QuantizationConfig | Mapping[str, QuantizationConfig | None] | None = None,
    filter_fn: FilterFn | None = None,
    strict: bool = False,
    *,
    norm: float = 0.7,
    iterations: int = 20,
    fusion: Fusion | None = None,
    progress: bool | None = None,
) -> HQQReport:
    """Quantize a model with scales and zero points that suit most weights (HQQ), without data.

    The model changes as by :func:`torchquant.quantize_` with the same configuration, and runs on
    the same kernels; only scales, zero points and integers are others. They minimize the sum of
    ``|change|^norm`` over the weights of each channel or group, which forgives a few large changes
    for the sake of many small ones; see :func:`torchquant.algorithms.half_quadratic.hqq`. Embedding
    tables get such integers, too.

    It gains most with few bits and zero points: ``IntxWeightOnlyConfig(3, 64,
    symmetric=False)``. With data, :func:`torchquant.gptq_` gains more.

    Args:
        model: any module that contains layers, as for :func:`torchquant.quantize_`.
        config: as for :func:`torchquant.quantize_`.
        filter_fn: selects the layers, as for :func:`torchquant.quantize_`.
        strict: as for :func:`torchquant.quantize_`.
        norm: more than 0 and at most 1.
        iterations: the number of iterations for each layer.
        fusion: as for :func:`torchquant.quantize_`.
        progress: whether to show a progress bar; None shows it in a terminal and in a notebook,
            after two seconds.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: as :func:`torchquant.quantize_`.
        ValueError: as :func:`torchquant.quantize_`; or a number is out of range. The model is
            unchanged.

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023).

    Example:
        >>> import torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> report = hqq_(model, torchquant.IntxWeightOnlyConfig(3, group_size=32))
        >>> report["0"].error < report["0"].nearest_error
        True
        >>> type(model[0]).__name__
        'QuantizedIntxLinear'
    """
    hqq(torch.ones(1, 1), Weights(), norm=norm, iterations=iterations)  # checks the numbers
    errors: dict[str, tuple[float, float]] = {}

    def find(steps: list[Step]) -> None:
        for step in track(steps, _WHO, progress):
            weight = float_weight(step.module).flatten(1)
            found = hqq(weight, step.config.weights, norm=norm, iterations=iterations)
            give(step, found, _WHO)
            plain = nearest(weight, step.config.weights)
            whole = float(weight.abs().pow(norm).sum(dtype=torch.float64))
            before, after = (_error(weight, one, norm) / (whole or 1.0) for one in (plain, found))
            errors[step.name] = before, after

    report = quantize_with(_WHO, model, config, filter_fn, strict, fusion, progress, find)
    rows = []
    for row in report.rows:
        if row.action == "quantized":
            before, after = errors[row.name]
            words = [f"error {before:.3f} to {after:.3f}", row.reason]
            reason = "; ".join(filter(None, words))
            rows.append(HQQLayer(row.name, row.kind, "compressed", reason, before, after))
        elif row.family != NORMS:
            rows.append(HQQLayer(row.name, row.kind, "left", row.reason))
    return HQQReport(tuple(rows), report.notes, report)


def _error(weight: torch.Tensor, found: IntegerWeight, norm: float) -> float:
    return float((weight - found.dequantize()).abs().pow(norm).sum(dtype=torch.float64))
