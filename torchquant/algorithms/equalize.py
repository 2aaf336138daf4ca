"""equalize_: balance the ranges of the weights of consecutive layers, channel by channel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torchquant.algorithms.batches import Undo, outputs_of, taken
from torchquant.algorithms.consecutive import (
    Pair,
    dimensions,
    find_pairs,
    has_channels,
    is_float_layer,
)
from torchquant.algorithms.scaling import (
    channel_ranges,
    equalization_factors,
    range_spread,
    scale_channels,
)
from torchquant.convert.calibration_hooks import prepared_layers
from torchquant.convert.regions import find, regions_in
from torchquant.graph.regions import Region
from torchquant.report.base import Report, RowReport
from torchquant.report.progress import track

__all__ = ["EqualizationReport", "EqualizedLayer", "equalize_"]

_SWEEPS = 100
_SETTLED = 1e-3  # no factor of a sweep is further from 1
_TOLERANCE = 1e-4  # of the model's outputs, relative to their greatest magnitude
_MARGIN = 1.25  # other data may exceed the greatest value of the batches by a quarter

Limits: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class EqualizedLayer(RowReport):
    """What :func:`equalize_` did to the output channels of a layer.

    Attributes:
        name: name of the layer.
        kind: the name of its class.
        action: "equalized" or "left".
        reason: why the layer was left, or which layer reads its channels.
        spread_before: how many times the greatest range of a channel exceeded the least, in the
            weights that produce the channels; 0 for a layer that was left.
        spread_after: the same afterwards.

    Example:
        >>> print(EqualizedLayer("fc", "Linear", "equalized", "with head", 1000.0, 1.5))
        equalized: fc (Linear): with head
    """

    spread_before: float = 0.0
    spread_after: float = 0.0


@dataclass(frozen=True, repr=False)
class EqualizationReport(Report):
    """What :func:`equalize_` did; ``print`` it for a table.

    Attributes:
        rows: one row per layer of a kind that torchquant quantizes.
        notes: sentences that the user should read.
        difference: the greatest difference of the model's outputs on the first batch, relative to
            their greatest magnitude; None without a loader.

    Example:
        >>> row = EqualizedLayer("fc", "Linear", "equalized", "with head", 1000.0, 1.0)
        >>> EqualizationReport((row,)).summary()
        '1 equalized, 0 left; ranges of channels: at most 1:1,000 before, 1:1 after'
    """

    rows: tuple[EqualizedLayer, ...]
    notes: tuple[str, ...] = ()
    difference: float | None = None

    def summary(self) -> str:
        """One line with the numbers of layers and the change of the outputs."""
        done = [row for row in self.rows if row.action == "equalized"]
        line = f"{len(done)} equalized, {len(self.rows) - len(done)} left"
        if done:
            before, after = (
                max(getattr(row, name) for row in done)
                for name in ("spread_before", "spread_after")
            )
            line += f"; ranges of channels: at most 1:{before:,.0f} before, 1:{after:,.0f} after"
        if self.difference is not None:
            line += f"; outputs changed by {self.difference:.1e}"
        return line


@torch.no_grad()
def equalize_(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    limit: int | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool | None = None,
) -> EqualizationReport:
    """Balance the ranges of consecutive layers, in place; the function of the model stays the same.

    Channels whose weights are much smaller than those of other channels lose most of their
    precision to a scale that all channels share. Where a layer, a function such as ReLU and a
    second layer follow one another, a channel can be made larger in the first layer and smaller in
    the second. This verb finds such pairs, also through depthwise layers, poolings and a flatten,
    and scales each channel so that it has the same range in both layers.

    The model keeps what all its methods compute, for all arguments: layers are a pair only where
    the code of the model shows that the channels of the first reach the second, and nothing else.
    A submodule that its owner calls by a name of its own, such as ``self.encoder``, keeps its input
    and output. What changes is the output of the layer, and of the elements of a Sequential, for
    code outside of the model that calls them alone. Inner modules of torchvision and timm are taken
    to be called only as their own forward does.

    Call it after ``prepare_``, which folds batch norms, and before ``calibrate``, because the
    ranges of the data between layers change.

    ReLU6 cuts off at 6, so a channel that is scaled before it must not reach this value. With
    a ``loader`` the verb observes which channels stay below; others keep their scale. Without one,
    layers before a ReLU6 are left. A model whose forward cannot be recorded as a whole needs a
    loader as well: its outputs are then compared before and after.

    Args:
        model: a float model, or one that ``prepare_`` prepared; in any training mode.
        loader: batches, as for :func:`torchquant.calibrate`; or None.
        limit: the greatest number of batches; None for all.
        forward: a function of ``(model, batch)`` that calls the model, as for ``calibrate``.
        progress: whether to show a progress bar; None shows it in a terminal and in a notebook,
            after two seconds.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: model is not a module.
        ValueError: model holds no float layer that can be quantized; loader has no batches; ranges
            have been observed already; or the outputs change by more than rounding. The model is
            unchanged.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
    (2019).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[0].mul_(1000)
        >>> before = model(torch.ones(1, 3, 5, 5))
        >>> report = equalize_(model)
        >>> report["0"].action, report["0"].spread_after < report["0"].spread_before
        ('equalized', True)
        >>> torch.allclose(model(torch.ones(1, 3, 5, 5)), before, rtol=1e-4, atol=1e-4)
        True
    """
    _check(model)
    chosen = None if loader is None else taken("equalize_", loader, limit)
    pairs, reasons = _pairs(model, observed=chosen is not None)
    bounded = [pair for pair in pairs if pair.bound is not None]
    limits: dict[str, Limits] = {}
    expected: list[Tensor] = []
    if chosen is not None:
        greatest = _greatest_outputs(model, [pair.first for pair in bounded], chosen, forward)
        limits = {p.first: _limits(greatest[p.first], p.bound) for p in bounded if p.bound}
        expected = outputs_of("equalize_", model, chosen[0], forward)
    layers = {name: _Layer.of(model, name) for p in pairs for name in (p.first, p.second)}
    spreads = {p.first: layers[p.first].spread() for p in pairs}
    _balance(pairs, layers, limits, progress)
    undo = Undo(layer.module for layer in layers.values())
    for layer in layers.values():
        layer.write()
    difference = None
    if chosen is not None:
        difference = _difference(expected, outputs_of("equalize_", model, chosen[0], forward))
        if not difference <= _TOLERANCE:
            undo.restore()
            raise ValueError(
                "equalize_: model must compute what its recorded forward says, but its outputs "
                f"would change by {difference:.1e}; something else reads the values between the "
                "layers, such as a hook"
            )
    rows = []
    for name, module in model.named_modules():
        if name in spreads:
            follow = next(pair.second for pair in pairs if pair.first == name)
            row = ("equalized", f"with {follow}", spreads[name], layers[name].spread())
            rows.append(EqualizedLayer(name, type(module).__name__, *row))
        elif has_channels(module):
            reason = reasons.get(name, "no recorded forward calls it")
            rows.append(EqualizedLayer(name, type(module).__name__, "left", reason))
    return EqualizationReport(tuple(rows), (), difference)


@dataclass
class _Layer:
    """Exact copies of the values of a layer, to be scaled."""

    module: Any
    groups: int
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, model: nn.Module, name: str) -> _Layer:
        module: Any = model.get_submodule(name)
        bias = None if module.bias is None else module.bias.double()
        return cls(module, getattr(module, "groups", 1), module.weight.double(), bias)

    def spread(self) -> float:
        """How many times the greatest range of an output channel exceeds the least."""
        return range_spread(channel_ranges(self.weight, self.groups, inputs=False))

    def divide(self, factors: Tensor) -> None:
        self.weight = scale_channels(self.weight, factors, self.groups, inputs=False)
        if self.bias is not None:
            self.bias = self.bias / factors

    def multiply(self, factors: Tensor, block: int) -> None:
        self.weight = scale_channels(self.weight, factors, self.groups, inputs=True, block=block)

    def write(self) -> None:
        """Give the module the scaled values."""
        self.module.weight.copy_(self.weight)
        if self.bias is not None:
            self.module.bias.copy_(self.bias)


def _balance(
    pairs: Sequence[Pair],
    layers: dict[str, _Layer],
    limits: dict[str, Limits],
    progress: bool | None,
) -> None:
    """Scale the copies, pair by pair, until a sweep over all pairs changes little."""
    done: dict[str, Tensor] = {}  # the product of all factors of a pair with limits
    for _ in track(range(_SWEEPS), "equalize_", progress):
        furthest = 0.0
        for pair in pairs:
            first, second = layers[pair.first], layers[pair.second]
            ranges = (
                channel_ranges(first.weight, first.groups, inputs=False),
                channel_ranges(second.weight, second.groups, inputs=True, block=pair.block),
            )
            factors = equalization_factors(*ranges)
            if pair.first in limits:
                before = done.get(pair.first, torch.ones_like(factors))
                least, most = limits[pair.first]
                factors = factors.clamp(least / before, most / before)
                done[pair.first] = before * factors
            first.divide(factors)
            second.multiply(factors, pair.block)
            furthest = max(furthest, float((factors - 1).abs().max()))
        if furthest < _SETTLED:
            break


def _pairs(model: nn.Module, observed: bool) -> tuple[list[Pair], dict[str, str]]:
    """The pairs to balance, and the reasons for the other layers that were found."""
    prepared = [Region(one.name, one.root, one.trace) for one in regions_in(model)]
    found = find(model, is_float_layer)
    regions = prepared or found.regions
    pairs: list[Pair] = []
    reasons: dict[str, str] = {}
    for region in regions:
        candidates, left = find_pairs(model, region)
        reasons.update(left)
        for pair in candidates:
            if region.path and not observed:
                why = (
                    found.refusals[0].reason
                    if found.refusals
                    else "its forward is not the whole model's"
                )
                reasons[pair.first] = (
                    f"{why}; pass a loader, so that outputs are compared before and after"
                )
            elif pair.bound is not None and not observed:
                reasons[pair.first] = (
                    f"an activation cuts off at {pair.bound:g}; pass a loader, whose batches show "
                    "the channels that stay below"
                )
            else:
                pairs.append(pair)
    return pairs, reasons


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"equalize_: model must be an nn.Module, got {type(model).__name__}")
    if not any(is_float_layer(module) for module in model.modules()):
        raise ValueError(
            "equalize_: model must hold float layers that can be quantized, got none; call it "
            "before convert_ or quantize_"
        )
    require_uncalibrated("equalize_", model)


def require_uncalibrated(who: str, model: nn.Module) -> None:
    """Refuse a model whose ranges have been observed, because they change with the scales.

    Raises:
        ValueError: a layer has an observer with data; the message starts with ``who``.

    Example:
        >>> require_uncalibrated("verb", nn.Linear(2, 2))
    """
    observed = [
        name for name, hook in prepared_layers(model).items() if int(hook.observer.num_batches)
    ]
    if observed:
        raise ValueError(
            f"{who}: model must not be calibrated yet, because the ranges between layers "
            f"change, got ranges of {', '.join(observed)}; call to_float_(model), prepare_, "
            f"{who} and then calibrate"
        )


def _greatest_outputs(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
) -> dict[str, Tensor]:
    """The greatest output of each channel of the named layers, over all batches."""
    greatest: dict[str, Tensor] = {}

    def see(name: str, _: Any, output: Tensor) -> None:
        channel = output.dim() - dimensions(model.get_submodule(name)) - 1
        most = output.movedim(channel, 0).flatten(1).amax(1).double()
        greatest[name] = torch.maximum(greatest[name], most) if name in greatest else most

    for batch in batches if names else ():
        outputs_of("equalize_", model, batch, forward, dict.fromkeys(names, see))
    for name in names:
        if name not in greatest:
            layer: Any = model.get_submodule(name)
            greatest[name] = torch.full((len(layer.weight),), torch.inf, dtype=torch.float64)
    return greatest


def _limits(greatest: Tensor, bound: float) -> Limits:
    """The least and the greatest factor of each channel before an activation that cuts off."""
    cut = greatest > bound
    one = torch.ones_like(greatest)
    least = (_MARGIN * greatest / bound).clamp(min=torch.finfo(torch.float64).tiny, max=1.0)
    return torch.where(cut, one, least), torch.where(cut, one, torch.full_like(one, torch.inf))


def _difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """The greatest difference, relative to the greatest magnitude; both sides may be empty."""
    most = max((float(t.abs().max()) for t in expected if t.numel()), default=0.0)
    apart = max(
        (float((a - b).abs().max()) for a, b in zip(expected, actual, strict=True) if a.numel()),
        default=0.0,
    )
    return apart / most if most else apart
