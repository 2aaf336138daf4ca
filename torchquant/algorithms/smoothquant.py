"""smoothquant_: move the ranges of input channels into the weights that read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.algorithms.batches import outputs_of, taken
from torchquant.algorithms.equalize import require_uncalibrated
from torchquant.algorithms.fold import FoldUndo, ScalingGroup, fold
from torchquant.algorithms.scaling_groups import (
    TOLERANCE,
    find_scaling_groups,
    is_float_linear,
    output_difference,
)
from torchquant.algorithms.smoothing import smoothing_error, smoothing_factors
from torchquant.configs import QuantizationConfig
from torchquant.configs.layers import check_config
from torchquant.report.base import Report, RowReport
from torchquant.report.progress import track

__all__ = ["SmoothQuantReport", "SmoothedLayer", "smoothquant_"]

_GRID = tuple(index / 10 for index in range(11))  # the values of alpha that a search tries
_ROWS = 128  # inputs of each group that a search keeps
_OUTPUTS = 2048  # of each layer that a search computes


@dataclass(frozen=True)
class SmoothedLayer(RowReport):
    """What :func:`smoothquant_` did to the inputs of a layer.

    Attributes:
        name: name of the layer.
        kind: the name of its class.
        action: "smoothed" or "left".
        reason: why the layer was left, or which module produces its inputs.
        alpha: how much of the ranges went into the weights; 0 for a layer that was left.
        peak_before: the greatest range of an input channel, as a multiple of the median range.
        peak_after: the same afterwards.

    Example:
        >>> print(SmoothedLayer("fc", "Linear", "smoothed", "after norm", 0.5, 40.0, 6.0))
        smoothed: fc (Linear): after norm
    """

    alpha: float = 0.0
    peak_before: float = 0.0
    peak_after: float = 0.0


@dataclass(frozen=True, repr=False)
class SmoothQuantReport(Report):
    """What :func:`smoothquant_` did; ``print`` it for a table.

    Attributes:
        rows: one row per linear layer.
        notes: sentences that the user should read.
        difference: the greatest difference of the model's outputs on the first batch, relative to
            their greatest magnitude.

    Example:
        >>> row = SmoothedLayer("fc", "Linear", "smoothed", "after norm", 0.5, 40.0, 6.0)
        >>> SmoothQuantReport((row,), (), 1e-7).summary()
        '1 smoothed, 0 left; greatest channel: 40 times the median before, 6 after; outputs changed
        by 1.0e-07'
    """

    rows: tuple[SmoothedLayer, ...]
    notes: tuple[str, ...] = ()
    difference: float = 0.0

    def summary(self) -> str:
        """One line with the numbers of layers and the change of the outputs."""
        done = [row for row in self.rows if row.action == "smoothed"]
        line = f"{len(done)} smoothed, {len(self.rows) - len(done)} left"
        if done:
            before, after = (
                max(getattr(row, name) for row in done) for name in ("peak_before", "peak_after")
            )
            line += f"; greatest channel: {before:,.0f} times the median before, {after:,.0f} after"
        return f"{line}; outputs changed by {self.difference:.1e}"


@torch.no_grad()
def smoothquant_(
    model: nn.Module,
    data: Iterable[Any],
    *,
    alpha: float | None = None,
    config: QuantizationConfig | None = None,
    limit: int | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool | None = None,
) -> SmoothQuantReport:
    """Make the input channels of linear layers alike, in place; the function of the model stays.

    A few channels that are much larger than the others determine the scale of a token, and leave
    few integers for the rest. Dividing a channel by a factor where it is produced, and multiplying
    the weights that read it by this factor, changes nothing in float. Channels are produced by a
    norm, or by a linear layer: ``up_proj`` before ``down_proj``, the values of attention before the
    output projection. Such groups of layers are found while the model runs on the data, in any
    architecture, and each is checked: the outputs must stay the same.

    Call it on the float model, and then ``quantize_`` or ``prepare_``.

    Args:
        model: a float model, in any training mode.
        data: batches, as for :func:`torchquant.calibrate`. Inputs of a layer with NaN or infinities
            do not count, and the report says how many there were.
        alpha: from 0 to 1: how much of the difference between the channels goes into the weights.
            The paper uses 0.5, and the greatest magnitude of each channel. None searches for each
            group what gives the quantized layers the least error: alpha, whether magnitudes are
            the greatest ones or root mean squares, or no factors at all.
        config: how the layers will be quantized, for the search; None is the default of
            ``quantize_``.
        limit: the greatest number of batches; None for all.
        forward: a function of ``(model, batch)`` that calls the model, as for ``calibrate``.
        progress: whether to show a progress bar; None shows it in a terminal and in a notebook,
            after two seconds.

    Returns:
        A report with one row per linear layer; ``print`` it for a table.

    Raises:
        TypeError: model is not a module, alpha is not a number, or config is no configuration.
        ValueError: alpha is not from 0 to 1, data has no batches, model has no float linear layer,
            or ranges have been observed already. The model is unchanged.

    Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
    Language Models" (2022).

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)).eval()
        >>> _ = model[0].weight.data[3].mul_(100)
        >>> x = torch.randn(16, 64)
        >>> before = model(x)
        >>> report = smoothquant_(model, [x])
        >>> report["1"].reason, report["1"].peak_after < report["1"].peak_before
        ('after 0', True)
        >>> torch.allclose(model(x), before, rtol=1e-4, atol=1e-4)
        True
    """
    who = "smoothquant_"
    _check(who, model, alpha)
    chosen = check_config(who, config)
    batches = taken(who, data, limit)
    inputs = _Inputs(_ROWS if alpha is None else 0)
    found = find_scaling_groups(model, batches, forward, who=who, see=inputs.see)
    expected = outputs_of(who, model, batches[0], forward)
    smoother = _Smoother(model, found.groups, inputs, alpha, chosen)
    difference = smoother.fold(
        expected, lambda: outputs_of(who, model, batches[0], forward), progress
    )
    rows = []
    for name, module in model.named_modules():
        if name in smoother.rows:
            rows.append(smoother.rows[name])
        elif is_float_linear(module):
            reason = found.reasons.get(name, "it was not found")
            rows.append(SmoothedLayer(name, type(module).__name__, "left", reason))
    return SmoothQuantReport(tuple(rows), tuple(smoother.notes), difference)


class _Inputs:
    """Magnitudes of what each weight reads, and a sample of the rows."""

    def __init__(self, rows: int) -> None:
        self.most = rows
        self.ranges: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.dropped: Counter[str] = Counter()  # rows with NaN or infinities, which do not count
        self._squares: dict[str, tuple[Tensor, int]] = {}

    def see(self, name: str, rows: Tensor) -> None:
        """Take the inputs of one call."""
        if not bool(rows.sum().isfinite()):  # a finite sum may overflow, so look closely
            finite = rows.isfinite().all(1)
            self.dropped[name] += int((~finite).sum())
            rows = rows[finite]
        if rows.numel() == 0:
            return
        largest = rows.abs().amax(0).float()
        self.ranges[name] = torch.maximum(self.ranges.get(name, largest), largest)
        if self.most:
            total, count = self._squares.get(name, (torch.zeros_like(largest).double(), 0))
            self._squares[name] = total + rows.double().square().sum(0), count + len(rows)
            step = max(1, len(rows) * 4 // self.most)  # at least four batches have a part
            kept = [*([self.rows[name]] if name in self.rows else []), rows[::step].float()]
            self.rows[name] = torch.cat(kept)[-self.most :]

    def deviations(self, name: str) -> Tensor:
        """The root mean square of each channel."""
        total, count = self._squares[name]
        return (total / count).sqrt().float()


class _Smoother:
    """Chooses and folds the factors of all groups."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ScalingGroup],
        inputs: _Inputs,
        alpha: float | None,
        config: QuantizationConfig,
    ) -> None:
        self.model, self.groups, self.inputs = model, groups, inputs
        self.alpha, self.config = alpha, config
        self.rows: dict[str, SmoothedLayer] = {}
        self.notes: list[str] = []

    def fold(
        self,
        expected: Sequence[Tensor],
        outputs: Callable[[], Sequence[Tensor]],
        progress: bool | None,
    ) -> float:
        """Fold all groups; powers of two where other factors change the outputs."""
        names = {name for group in self.groups for name in group.parameters()}
        half = any(self.model.get_parameter(name).dtype != torch.float32 for name in names)
        undo = FoldUndo([self.model.get_parameter(name) for name in sorted(names)])
        try:
            self._fold_all(half, progress)
            difference = output_difference(expected, outputs())
            if difference > TOLERANCE and not half:
                undo.restore()
                self.rows.clear()
                self._fold_all(True, progress)
                half, difference = True, output_difference(expected, outputs())
            if difference > TOLERANCE:
                undo.restore()
                self._leave_all(f"the outputs of the model would change by {difference:.1e}")
                return 0.0
        except BaseException:
            undo.restore()
            raise
        if half and self.groups:
            self.notes.append("Factors are powers of two, which need no rounding of the weights.")
        return difference

    def _fold_all(self, powers: bool, progress: bool | None) -> None:
        for group in track(self.groups, "smoothquant_", progress):
            if any(name not in self.inputs.ranges for name, _ in group.readers):
                self._leave(group, "all its inputs held NaN or infinities")
                continue
            ranges, factors, alpha = self._factors(group)
            if powers:
                factors = torch.exp2(factors.log2().round())
            fold(self.model, group, factors)
            after = f"after {group.producer}"
            dropped = max(self.inputs.dropped[name] for name, _ in group.readers)
            if dropped:
                after += f"; {dropped} inputs with NaN or infinities were left out"
            for name in group.layers:
                kind = type(self.model.get_submodule(name)).__name__
                peaks = _peak(ranges), _peak(ranges / factors.to(ranges.device))
                row = SmoothedLayer(name, kind, "smoothed", after, alpha or 0.0, *peaks)
                self.rows[name] = row
            if alpha is None:
                self._leave(group, f"{after}; no factors lower its error")

    def _leave(self, group: ScalingGroup, reason: str) -> None:
        for name in group.layers:
            kind = type(self.model.get_submodule(name)).__name__
            self.rows[name] = SmoothedLayer(name, kind, "left", reason)

    def _leave_all(self, reason: str) -> None:
        for name, row in self.rows.items():
            self.rows[name] = SmoothedLayer(name, row.kind, "left", reason)

    def _factors(self, group: ScalingGroup) -> tuple[Tensor, Tensor, float | None]:
        """Ranges of the inputs, factors of the columns, and alpha; None for factors of 1."""
        weights = {
            name: self.model.get_parameter(name).detach().movedim(axis, -1)
            for name, axis in group.readers
        }
        columns = [weight.abs().flatten(0, -2).amax(0).float() for weight in weights.values()]
        reading = group.largest(torch.stack(columns).amax(0))
        ranges = group.largest(torch.stack([self.inputs.ranges[name] for name in weights]).amax(0))
        if self.alpha is not None:
            return ranges, self._smoothing(group, ranges, reading, self.alpha), self.alpha
        deviations = torch.stack([self.inputs.deviations(name) for name in weights]).amax(0)
        candidates: list[tuple[float | None, Tensor]] = [(None, torch.ones_like(ranges).double())]
        for magnitudes in (ranges, group.largest(deviations)):
            candidates += [
                (alpha, self._smoothing(group, magnitudes, reading, alpha)) for alpha in _GRID
            ]
        error = self._error(weights)
        alpha, factors = min(candidates, key=lambda candidate: error(candidate[1]))
        return ranges, factors, alpha

    def _smoothing(
        self, group: ScalingGroup, magnitudes: Tensor, reading: Tensor, alpha: float
    ) -> Tensor:
        """Factors for all columns that read a channel of the producer."""
        used = group.channels.to(magnitudes.device) >= 0
        kept = [torch.where(used, values, 0.0) for values in (magnitudes, reading)]
        return group.free(smoothing_factors(kept[0], kept[1], alpha))

    def _error(self, weights: Mapping[str, Tensor]) -> Callable[[Tensor], float]:
        """The error of all layers of a group as a function of the factors."""
        layers = []
        for name, weight in weights.items():
            if weight.dim() == 2:
                rows, some = self.inputs.rows[name], weight[:: -(-len(weight) // _OUTPUTS)]
                layers.append((rows, some, rows @ some.float().t()))

        def error(factors: Tensor) -> float:
            return sum(
                smoothing_error(rows, weight, factors, self.config, outputs)
                for rows, weight, outputs in layers
            )

        return error


def _peak(ranges: Tensor) -> float:
    """The greatest range as a multiple of the median of the channels that have values."""
    used = ranges[ranges > 0]
    return float(used.max() / used.median()) if len(used) else 1.0


def _check(who: str, model: Any, alpha: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be an nn.Module, got {type(model).__name__}")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, (int, float))):
        raise TypeError(f"{who}: alpha must be a number from 0 to 1 or None, got {alpha!r}")
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"{who}: alpha must be from 0 to 1, got {alpha!r}")
    if not any(is_float_linear(module) for module in model.modules()):
        raise ValueError(
            f"{who}: model must hold float linear layers, got none; call it before quantize_, "
            "prepare_ and convert_"
        )
    require_uncalibrated(who, model)
