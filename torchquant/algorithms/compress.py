"""What verbs that choose integers layer by layer have in common: the walk, and the report.

A float model is quantized by the code of ``quantize_``; the walk finds the integers once it is
clear which layers will be replaced. A prepared model stays as it is, and ``convert_`` takes the
integers; the walk then goes through a converted copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from torchquant.algorithms.batches import Forward, taken
from torchquant.algorithms.collect import Method
from torchquant.algorithms.compression_report import (
    CompressionReport,
    compressed_layer,
    compression_report,
)
from torchquant.algorithms.found import Found
from torchquant.algorithms.places import CopiedPlace, FloatPlace, Place
from torchquant.algorithms.quantize_with import quantize_with
from torchquant.algorithms.resume import Results, differences, fingerprint
from torchquant.algorithms.together import agreed, every, in_all, place_among
from torchquant.algorithms.two_models import TwoModels
from torchquant.algorithms.walk import walk
from torchquant.analysis.verify import tensors_in
from torchquant.configs import Fusion
from torchquant.convert.adjustment import Adjustment, adjust, adjustment_of, is_adjusted
from torchquant.convert.batches import call
from torchquant.convert.calibration_hooks import prepared_layers
from torchquant.convert.plan import Step
from torchquant.convert.selection import FilterFn

__all__ = ["compress_model"]


def compress_model(
    who: str,
    model: nn.Module,
    config: Any,
    data: Iterable[Any],
    method: Method,
    options: Mapping[str, Any],
    *,
    limit: int | None,
    forward: Forward | None,
    filter_fn: FilterFn | None,
    strict: bool,
    fusion: Fusion | None,
    resume: str | Path | None,
    offload: str | Path | None,
    progress: bool | None,
    warn: Callable[[Mapping[str, Found]], None] = lambda found: None,
) -> tuple[CompressionReport, dict[str, Found]]:
    """Quantize a model with integers that a method finds layer by layer, in place.

    Args:
        who: the verb, with which messages start.
        model: see :func:`torchquant.gptq_`; so are the arguments that are not listed here.
        method: finds the integers of a layer.
        options: the arguments of the method, on which its results depend.
        warn: is called with what was found before the model changes, and may raise.

    Returns:
        The report, and what was found for each layer by its name.

    Example:
        >>> import torch, torchquant
        >>> from torchquant.algorithms.hessian import Hessian
        >>> class Nearest:
        ...     def statistics(self, place):
        ...         return Hessian.of(place.layer)
        ...     def memory(self, place):
        ...         return 0
        ...     def compress(self, place, statistics):
        ...         return Found(None, "rounded", f"saw {statistics.rows} inputs")
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> rest = dict.fromkeys(("limit", "forward", "filter_fn", "fusion", "resume", "offload"))
        >>> config, data = torchquant.QuantizationConfig(), [torch.randn(8, 64)]
        >>> report, _ = compress_model(
        ...     "verb", model, config, data, Nearest(), {}, strict=False, progress=False, **rest)
        >>> print(report["0"])
        rounded: 0 (Linear): saw 8 inputs
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be an nn.Module, got {type(model).__name__}")
    prepared = bool(prepared_layers(model))
    if prepared is not (config is None):
        raise ValueError(
            f"{who}: config must be None for a model that prepare_ prepared, got {config!r}; or "
            "start from the float model"
            if prepared
            else f"{who}: config must be a configuration such as IntxWeightOnlyConfig(4), got None;"
            " None is for a model that prepare_ prepared"
        )
    work = _Work(who, method, options, forward, _folder(who, offload), resume, progress, warn)
    if prepared:
        return work.prepared(model, TwoModels(who, model, data, limit, forward, anew=True))
    return work.quantized(model, config, taken(who, data, limit), filter_fn, strict, fusion)


class _Work:
    """One call of a verb."""

    def __init__(
        self,
        who: str,
        method: Method,
        options: Mapping[str, Any],
        forward: Forward | None,
        offload: Path | None,
        resume: str | Path | None,
        progress: bool | None,
        warn: Callable[[Mapping[str, Found]], None],
    ) -> None:
        self.warn = warn
        self.who, self.method, self.options = who, method, options
        self.forward, self.progress = forward, progress
        self.offload, self.resume = offload, None if resume is None else Path(resume)
        self.found: dict[str, Found] = {}
        self.rounded: dict[str, str] = {}
        self.notes: list[str] = []

    def quantized(
        self,
        model: nn.Module,
        config: Any,
        batches: list[Any],
        filter_fn: FilterFn | None,
        strict: bool,
        fusion: Fusion | None,
    ) -> tuple[CompressionReport, dict[str, Found]]:
        """Quantize a float model."""

        def find(steps: list[Step]) -> None:
            self._find(model, steps, batches)

        rest = (filter_fn, strict, fusion, self.progress)
        report = quantize_with(self.who, model, config, *rest, find)
        found, rounded = self.found, self.rounded
        return compression_report(found, rounded, report, self.notes), found

    def _find(self, model: nn.Module, steps: list[Step], batches: list[Any]) -> None:
        """Give the layers of a plan the integers that the walk finds."""
        tables = {step.name for step in steps if step.kind.only_weights}
        pairs = [(step, FloatPlace(step)) for step in steps]
        leaders: dict[frozenset[str], FloatPlace] = {}  # of layers that share a weight
        followers: dict[str, str] = {}
        for step, place in pairs:
            shared = frozenset([step.name, *(step.shares or "").split(", ")])
            if step.name in tables:
                self.rounded[step.name] = "a table, whose rows are no terms of a sum"
            elif shared & tables:
                self.rounded[step.name] = "the nearest integers suit the rows of the table"
            elif step.shares is not None and leaders.setdefault(shared, place) is not place:
                leaders[shared].followers.append(place)
                followers[step.name] = leaders[shared].name
        apart = {*self.rounded, *followers}
        places = [place for step, place in pairs if step.name not in apart]
        configs = [(step.name, step.config) for step in steps]
        results = self._results(model, configs, batches)
        with ExitStack() as stack:
            for step, place in pairs:
                if step.name in self.rounded:  # the layers behind it read its rounded rows
                    stack.callback(place.restore)
                    place.install(None)
            self._walk(model, places, batches, results)
        for name, leader in followers.items():
            found, reason = self.found[leader], f"has the integers of {leader}"
            self.found[name] = Found(found.adjustment, found.action, reason)
        for step in steps:
            one = self.found.get(step.name)
            if one is not None and one.adjustment is not None:
                adjust(step.module, one.adjustment)

    def prepared(
        self, model: nn.Module, models: TwoModels
    ) -> tuple[CompressionReport, dict[str, Found]]:
        """Find integers for the layers of a prepared model."""
        places = [
            CopiedPlace(name, models.float_layer(name), models.quantized_layer(name))
            for name in models.order
        ]
        configs = [(place.name, place.config) for place in places]
        both = nn.ModuleList([model, models.quantized])  # the copy has the ranges
        results = self._results(both, configs, models.batches)
        self._walk(models.quantized, places, models.batches, results, by_order=True)
        corrected = any(adjustment_of(module).bias is not None for module in model.modules())
        for module in model.modules():
            if is_adjusted(module):
                adjust(module, Adjustment())
        for place in places:
            adjustment = self.found[place.name].adjustment
            if adjustment is not None:
                adjust(place.layer, adjustment)
        if corrected:
            text = "Corrections of biases were for other integers; call correct_bias_ again."
            self.notes.append(text)
        rows = [compressed_layer(p.name, p.kind, self.found[p.name]) for p in places]
        report = CompressionReport((*rows, *models.left), tuple(self.notes))
        return report, self.found

    def _walk(
        self,
        called: nn.Module,
        places: Sequence[Place],
        batches: list[Any],
        results: Results | None,
        *,
        by_order: bool = False,
    ) -> None:
        def run(batch: int) -> Any:
            if self.forward is not None:
                return self.forward(called, batches[batch])
            return call(self.who, called, batches[batch])

        found, notes = walk(
            self.who,
            called,
            places,
            run,
            len(batches),
            self.method,
            samples=sum(map(_samples, batches)),
            by_order=by_order,
            offload=self.offload,
            results=results,
            progress=self.progress,
        )
        self.warn(found)
        self.found.update(found)
        self.notes.extend(notes)

    def _results(
        self, model: nn.Module, configs: list[tuple[str, Any]], batches: list[Any]
    ) -> Results | None:
        """The folder of results, which the first of several processes reads and writes."""
        resume = self.resume

        def identity() -> dict[str, Any]:
            return fingerprint(model, batches, configs, {"verb": self.who, **self.options})

        if place_among()[1] > 1:
            first, *rest = every(in_all(identity))
            other = next(filter(None, (differences(first, one) for one in rest)), None)
            if other is not None:
                raise ValueError(
                    f"{self.who}: all processes must have the same model and data, got other "
                    f"{', '.join(other)}; pass all batches in each process, which share them"
                )
        return None if resume is None else agreed(lambda: Results(self.who, resume, identity()))


def _folder(who: str, offload: str | Path | None) -> Path | None:
    if offload is None:
        return None
    folder = Path(offload)
    if not folder.is_dir():
        raise ValueError(f"{who}: offload must be an existing folder, got {str(offload)!r}")
    return folder


def _samples(batch: Any) -> int:
    """The number of samples of a batch."""
    return max((len(tensor) for tensor in tensors_in(batch) if tensor.dim()), default=1)
