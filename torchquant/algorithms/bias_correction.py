"""correct_bias_: take the mean error of each layer's outputs out of its bias."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.algorithms.batches import Forward
from torchquant.algorithms.inputs import columns, grouped_weight
from torchquant.algorithms.two_models import TwoModels
from torchquant.convert.adjustment import adjust, adjustment_of, float_weight
from torchquant.report.base import Report, RowReport
from torchquant.report.progress import track

__all__ = ["BiasCorrectionReport", "CorrectedLayer", "correct_bias_", "mean_output_error"]


def mean_output_error(
    weight: Tensor, rounded: Tensor, mean_input: Tensor, mean_quantized_input: Tensor
) -> Tensor:
    """By how much the outputs of a quantized layer are too great on average.

    Args:
        weight: float32 ``[G, N, K]``, the weight of the float layer.
        rounded: float32 ``[G, N, K]``, the weight that the integers represent.
        mean_input: float32 ``[G, K, 1]``, the mean of the columns that the float layer multiplies.
        mean_quantized_input: the same for the quantized layer.

    Returns:
        float32 ``[G * N]``, one value per output channel; the bias has to be less by it.

    Example:
        >>> weight, rounded = torch.tensor([[[0.9, 2.0]]]), torch.tensor([[[1.0, 2.0]]])
        >>> mean = torch.tensor([[[3.0], [1.0]]])
        >>> mean_output_error(weight, rounded, mean, mean)
        tensor([0.3000])
    """
    return (rounded @ mean_quantized_input - weight @ mean_input).flatten()


@dataclass(frozen=True)
class CorrectedLayer(RowReport):
    """What :func:`correct_bias_` did to a layer.

    Attributes:
        name: name of the layer.
        kind: the name of its class.
        action: "corrected" or "left".
        reason: why the layer was left; or the error below, in words.
        error: the greatest mean error of an output channel before the correction.

    Example:
        >>> print(CorrectedLayer("fc", "Linear", "corrected", "error 0.1", 0.1))
        corrected: fc (Linear): error 0.1
    """

    error: float = 0.0


@dataclass(frozen=True, repr=False)
class BiasCorrectionReport(Report):
    """What :func:`correct_bias_` did; ``print`` it for a table.

    Attributes:
        rows: one row per layer that ``convert_`` quantizes.
        notes: sentences that the user should read.

    Example:
        >>> BiasCorrectionReport((CorrectedLayer("fc", "Linear", "corrected", "", 0.1),))
        <BiasCorrectionReport: 1 corrected, 0 left; greatest mean error 0.1>
    """

    rows: tuple[RowReport, ...]
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line with the numbers of layers and the greatest error."""
        errors = [row.error for row in self.rows if isinstance(row, CorrectedLayer)]
        done = sum(row.action == "corrected" for row in self.rows)
        line = f"{done} corrected, {len(self.rows) - done} left"
        return f"{line}; greatest mean error {max(errors):.3g}" if errors else line


@torch.no_grad()
def correct_bias_(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    limit: int | None = None,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> BiasCorrectionReport:
    """Correct the biases of a prepared model, so that no output of a layer is wrong on average.

    Rounded weights and rounded activations shift the mean of a layer's outputs. This verb measures
    the mean of each output channel in the float model and in the quantized model, layer by layer in
    the order of their calls, and keeps the difference for ``convert_``, which subtracts it from the
    bias of the quantized layer. Each layer is measured with the corrections of the layers before
    it. The prepared model itself stays as it is, and a second call starts anew.

    Call it after ``calibrate``, and after ``adaround_`` if both are used.

    Args:
        model: a model that ``prepare_`` prepared and that saw data in ``calibrate``.
        loader: the batches, as for :func:`torchquant.calibrate`. A few hundred samples are enough.
            All batches are kept in memory, and each layer runs the model up to this layer on all of
            them.
        limit: the greatest number of batches; None for all.
        forward: a function of ``(model, batch)`` that calls the model, as for ``calibrate``.
        progress: whether to show a progress bar; None shows it in a terminal and in a notebook,
            after two seconds.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: model is not a module.
        ValueError: model is not prepared and calibrated, or loader has no batches. The model is
            unchanged.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
    (2019), the empirical correction.

    Example:
        >>> import torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> batches = [torch.randn(64, 64) for _ in range(4)]
        >>> _ = torchquant.prepare_(model)
        >>> _ = torchquant.calibrate(model, batches)
        >>> report = correct_bias_(model, batches)
        >>> [row.action for row in report]
        ['corrected', 'corrected']
        >>> print(torchquant.convert_(model).layers[0].action)
        converted
    """
    models = TwoModels("correct_bias_", model, loader, limit, forward)
    rows: list[RowReport] = []
    found: dict[str, Tensor] = {}
    for name in track(models.order, "correct_bias_", progress):
        layer, quantized = models.float_layer(name), models.quantized_layer(name)
        kind = type(layer).__name__
        if layer.bias is None:
            rows.append(CorrectedLayer(name, kind, "left", "it has no bias"))
            continue
        weight = grouped_weight(layer, float_weight(layer))
        rounded = grouped_weight(layer, float_weight(quantized.to_float()))
        error = mean_output_error(weight, rounded, *_means(models, name))
        if not bool(error.isfinite().all()):
            rows.append(CorrectedLayer(name, kind, "left", "its inputs hold NaN or infinities"))
            continue
        found[name] = layer.bias - error.to(layer.bias.dtype)
        quantized.bias.copy_(found[name])
        most = float(error.abs().max())
        rows.append(CorrectedLayer(name, kind, "corrected", f"error {most:.1e}", most))
    for name, bias in found.items():
        layer = models.float_layer(name)
        adjust(layer, replace(adjustment_of(layer), bias=bias))
    return BiasCorrectionReport((*rows, *models.left))


def _means(models: TwoModels, name: str) -> tuple[Tensor, Tensor]:
    """The mean of the columns of a layer, in float and in the quantized model: ``[G, K, 1]``."""
    layer = models.float_layer(name)
    totals: list[Any] = [0.0, 0.0]
    count = 0
    for inputs in models.inputs(name):
        found = [columns(layer, input) for input in inputs]
        for place, values in enumerate(found):
            totals[place] = totals[place] + values.double().sum(-1, keepdim=True)
        count += found[0].shape[-1]
    floating, quantized = ((total / max(count, 1)).float() for total in totals)
    return floating, quantized
