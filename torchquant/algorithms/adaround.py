"""adaround_: learn the rounding of each layer's weights from the inputs that the layer sees."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.algorithms.batches import Forward
from torchquant.algorithms.inputs import columns, grouped_weight
from torchquant.algorithms.rounding import (
    Moments,
    adaptive_rounding,
    least_error_scale,
    rounding_error,
)
from torchquant.algorithms.two_models import TwoModels
from torchquant.analysis.verify import tensors_in
from torchquant.convert.adjustment import (
    Adjustment,
    adjust,
    adjustment_of,
    float_weight,
    is_adjusted,
)
from torchquant.report.base import Report, RowReport
from torchquant.report.progress import track
from torchquant.report.words import human_bytes
from torchquant.scheme import PerGroup, PerTensor

__all__ = ["AdaRoundReport", "RoundedLayer", "adaround_"]

_COLUMNS = 100_000  # of a layer, over all batches
_MOST_TERMS = 16384  # of an output: the moments of more take more than 2 GiB


@dataclass(frozen=True)
class RoundedLayer(RowReport):
    """What :func:`adaround_` did to a layer.

    Attributes:
        name: name of the layer.
        kind: the name of its class.
        action: "rounded" or "left".
        reason: why the layer was left; or the errors below, in words.
        nearest_error: the mean squared error of the outputs with weights rounded to the nearest
            integer, relative to the mean square of the outputs.
        learned_error: the same with the integers that were found.

    Example:
        >>> print(RoundedLayer("fc", "Linear", "rounded", "error 4.0e-03 to 1.0e-03", 4e-3, 1e-3))
        rounded: fc (Linear): error 4.0e-03 to 1.0e-03
    """

    nearest_error: float = 0.0
    learned_error: float = 0.0


@dataclass(frozen=True, repr=False)
class AdaRoundReport(Report):
    """What :func:`adaround_` did; ``print`` it for a table.

    Attributes:
        rows: one row per layer that ``convert_`` quantizes.
        notes: sentences that the user should read.

    Example:
        >>> AdaRoundReport((RoundedLayer("fc", "Linear", "rounded", "", 4e-3, 1e-3),)).summary()
        '1 rounded, 0 left; 25% of the squared error of rounding to the nearest is left'
    """

    rows: tuple[RowReport, ...]
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line with the numbers of layers and the gain."""
        done = [row for row in self.rows if isinstance(row, RoundedLayer) and row.nearest_error > 0]
        rounded = sum(row.action == "rounded" for row in self.rows)
        line = f"{rounded} rounded, {len(self.rows) - rounded} left"
        if not done:
            return line
        kept = sum(row.learned_error / row.nearest_error for row in done) / len(done)
        return f"{line}; {kept:.0%} of the squared error of rounding to the nearest is left"


@torch.no_grad()
def adaround_(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    iterations: int = 500,
    search_scales: bool = True,
    limit: int | None = None,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> AdaRoundReport:
    """Learn for each weight of a prepared model whether to round it down or up.

    Rounding to the nearest integer is best for the weights, but not for the outputs of the layer.
    This verb goes through the layers in the order of their calls. It records what the layer sees in
    the float model and in the quantized model, where the layers before it have their integers
    already, and finds the integers with the least error of the layer's outputs; see
    :func:`torchquant.algorithms.rounding.adaptive_rounding`. ``convert_`` then takes these
    integers. The prepared model itself stays as it is, and a second call starts anew, without
    corrections of biases.

    Call it after ``calibrate``. It serves weights of any number of bits, and gains most at few.

    Args:
        model: a model that ``prepare_`` prepared and that saw data in ``calibrate``.
        loader: the batches, as for :func:`torchquant.calibrate`. A few hundred samples are enough.
            All batches are kept in memory, and each layer runs the model up to this layer on all of
            them.
        iterations: number of learning steps per layer; 0 only rounds single weights the other way.
        search_scales: whether to choose the scales of the weights, too, by the error of the
            outputs; a smaller scale cuts off the greatest weights.
        limit: the greatest number of batches; None for all.
        forward: a function of ``(model, batch)`` that calls the model, as for ``calibrate``.
        progress: whether to show a progress bar; None shows it in a terminal and in a notebook,
            after two seconds.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: model is not a module.
        ValueError: model is not prepared and calibrated, loader has no batches, or iterations is
            not an integer of at least 0. The model is unchanged.

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2020).

    Example:
        >>> import torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> batches = [torch.randn(64, 64) for _ in range(4)]
        >>> config = torchquant.IntxActivationIntxWeightConfig(weight_bits=4, static=True)
        >>> _ = torchquant.prepare_(model, config)
        >>> _ = torchquant.calibrate(model, batches)
        >>> report = adaround_(model, batches, iterations=100)
        >>> report["0"].learned_error < report["0"].nearest_error
        True
        >>> print(torchquant.convert_(model).layers[0].action)
        converted
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(
            f"adaround_: iterations must be an integer of at least 0, got {iterations!r}"
        )
    models = TwoModels("adaround_", model, loader, limit, forward, anew=True)
    rows: list[RowReport] = []
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in track(models.order, "adaround_", progress):
        layer, quantized = models.float_layer(name), models.quantized_layer(name)
        kind = type(layer).__name__
        reason = _refusal(layer, quantized)
        moments, outputs = (None, 0.0) if reason else _moments(models, name)
        if reason is None and moments is None:
            reason = "its inputs hold NaN or infinities"
        if moments is None:
            rows.append(RoundedLayer(name, kind, "left", str(reason)))
            continue
        qweight, scale, errors = _rounded(layer, quantized, moments, iterations, search_scales)
        found[name] = qweight, scale
        tensors = {"qweight": qweight, "qweight_scale": scale}
        quantized.load_state_dict({**quantized.state_dict(), **tensors})
        before, after = ((error + outputs) / outputs if outputs else 0.0 for error in errors)
        words = f"error {before:.1e} to {after:.1e}"
        rows.append(RoundedLayer(name, kind, "rounded", words, before, after))
    corrected = any(adjustment_of(module).bias is not None for module in model.modules())
    for module in model.modules():
        if is_adjusted(module):
            adjust(module, Adjustment())
    for name, (qweight, scale) in found.items():
        adjust(models.float_layer(name), Adjustment(qweight, scale))
    notes = ("Corrections of biases were for other integers; call correct_bias_ again.",)
    return AdaRoundReport((*rows, *models.left), notes if corrected else ())


def _refusal(layer: Any, quantized: Any) -> str | None:
    """The reason why the rounding of a layer cannot be learned, or None."""
    if quantized.weight_zero_point is not None:
        return "its weights have zero points"
    if isinstance(quantized.config.weights.granularity, PerGroup):
        return "its weights have scales for groups of inputs"
    terms = grouped_weight(layer, float_weight(layer)).shape[-1]
    if terms > _MOST_TERMS:
        return f"its outputs have {terms} terms, whose moments take {human_bytes(8 * terms**2)}"
    return None


def _moments(models: TwoModels, name: str) -> tuple[Moments | None, float]:
    """The moments of a layer's inputs, and the sum of the squared outputs of the float layer."""
    layer = models.float_layer(name)
    weight = grouped_weight(layer, float_weight(layer))
    most = max(1, _COLUMNS // max(1, sum(map(_samples, models.batches))))
    total: Moments | None = None
    outputs = 0.0
    for floating, quantized in models.inputs(name):
        x, y = (columns(layer, input, most) for input in (floating, quantized))
        moments = Moments.of(y, x)
        total = moments if total is None else total + moments
        outputs += float((weight @ x).square().sum(dtype=torch.float64))
    if total is None or not bool(total.mixed.isfinite().all() & total.quantized.isfinite().all()):
        return None, 0.0
    return total, outputs


def _samples(batch: Any) -> int:
    """The number of samples of a batch."""
    return max((len(tensor) for tensor in tensors_in(batch) if tensor.dim()), default=1)


def _rounded(
    layer: Any, quantized: Any, moments: Moments, iterations: int, search: bool
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Integers, scales, and the errors of rounding to the nearest and of these integers."""
    part = quantized.config.weights
    qmin, qmax = part.range
    integers = quantized.integers
    weight = grouped_weight(layer, float_weight(layer))
    scale = quantized.weight_scale.view(weight.shape[:2])
    nearest = grouped_weight(layer, integers).float() * scale.unsqueeze(-1)
    if search:
        shared = part.granularity == PerTensor()
        scale = least_error_scale(weight, scale, moments, qmin=qmin, qmax=qmax, shared=shared)
    qweight = adaptive_rounding(weight, scale, moments, qmin=qmin, qmax=qmax, iterations=iterations)
    learned = qweight * scale.unsqueeze(-1)
    errors = [float(rounding_error(weight, one, moments).sum()) for one in (nearest, learned)]
    return qweight.view(integers.shape), scale.flatten(), (errors[0], errors[1])
