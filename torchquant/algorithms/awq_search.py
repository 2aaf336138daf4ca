"""The search of AWQ on a model: scales of each group of layers, then the integers of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.algorithms.awq_inputs import Calls, LayerInputs, watch
from torchquant.algorithms.awq_report import AWQLayer
from torchquant.algorithms.awq_scaling import AWQScales, scaled_rounding, search_scales
from torchquant.algorithms.batches import Forward, evaluating, outputs_of
from torchquant.algorithms.fold import FoldUndo, ScalingGroup, fold
from torchquant.algorithms.integer_weight import IntegerWeight, nearest
from torchquant.algorithms.labels import common_owner
from torchquant.algorithms.least_error import clip_search
from torchquant.algorithms.scaling_groups import (
    TOLERANCE,
    find_scaling_groups,
    output_difference,
)
from torchquant.convert.adjustment import float_weight
from torchquant.convert.plan import Step
from torchquant.nn.float_form import FloatForm
from torchquant.report.progress import track

__all__ = ["AWQSearch"]


class AWQSearch:
    """Scales and integers of the layers of a model.

    Args:
        who: the verb, with which messages start.
        model: the float model.
        batches: as for :func:`torchquant.calibrate`, at least one.
        forward: takes the model and a batch, and calls the model.
        steps: see :func:`torchquant.algorithms.awq_scaling.search_scales`.
        progress: as for the verb.

    Attributes:
        notes: sentences for the report.
        difference: by how much the scales changed the outputs of the float model.

    Example:
        >>> from torchquant.convert.plan import find_layers
        >>> from torchquant import IntxWeightOnlyConfig
        >>> model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)).eval()
        >>> _ = model[0].weight.data[3].mul_(30)
        >>> steps = find_layers(model)
        >>> for step in steps:
        ...     step.config = IntxWeightOnlyConfig(4, group_size=32)
        >>> search = AWQSearch("verb", model, [torch.randn(100, 64)], None, 4, False)
        >>> search.scale(steps)
        >>> [(row.name, row.action) for row in search.rows()]
        [('1', 'scaled')]
    """

    def __init__(
        self,
        who: str,
        model: nn.Module,
        batches: Sequence[Any],
        forward: Forward | None,
        steps: int,
        progress: bool | None,
    ) -> None:
        self.who, self.model, self.batches, self.forward = who, model, batches, forward
        self.exponents, self.progress = steps, progress
        self.notes: list[str] = []
        self.difference = 0.0
        self._undo = FoldUndo(())
        self._steps: dict[str, Step] = {}
        self._kinds: dict[str, str] = {}
        self._inputs: dict[str, LayerInputs] = {}
        self._scales: dict[str, AWQScales] = {}  # those that are in the model
        self._producers: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        self._clipped: set[str] = set()
        self._errors: dict[str, tuple[float, float]] = {}

    def scale(self, steps: Sequence[Step]) -> None:
        """Search the scales of all groups of the layers, and put them into the model."""
        with evaluating(self.model):  # parts of the model are called, too
            self._scale(steps)

    def _scale(self, steps: Sequence[Step]) -> None:
        self._steps = {step.name: step for step in steps}
        self._kinds = {step.name: type(step.module).__name__ for step in steps}
        found = find_scaling_groups(self.model, self.batches, self.forward, who=self.who)
        groups = [g for g in found.groups if any(name in self._steps for name in g.layers)]
        self._reasons = {name: found.reasons.get(name, "") for name in self._steps}
        calls = {id(group): self._calls(group) for group in groups}
        count = len(self.batches)
        self._inputs = {
            name: LayerInputs(step.module, count)
            for name, step in self._steps.items()
            if not step.kind.only_weights
        }
        kept = [one for one in calls.values() if one is not None]
        watch(self.who, self.model, self.batches, self.forward, self._inputs, kept)
        chosen = []
        for group in track(groups, self.who, self.progress):
            scales = self._search(group, calls.pop(id(group)))
            if scales is None:
                continue
            if scales.exponent:
                chosen.append((group, scales))
            else:
                reason = f"no scales after {group.producer} lower its error"
                layers = [name for name in group.layers if name in self._steps]
                self._reasons.update(dict.fromkeys(layers, reason))
        self._measure()
        self._fold(chosen)

    def integers(self, search_clip: bool) -> Iterator[tuple[Step, IntegerWeight]]:
        """The integers of each layer, after :meth:`scale`."""
        for step in track(list(self._steps.values()), self.who, self.progress):
            weight, weights = float_weight(step.module).flatten(1), step.config.weights
            found = nearest(weight, weights)
            inputs = self._rows(step.name)
            # A head keeps the rows of the table that it shares its weight with.
            if search_clip and inputs is not None and step.shares is None:
                found = _better(weight, found, clip_search(weight, weights, inputs=inputs), inputs)
                self._clipped.add(step.name)
            if inputs is not None:
                error = _error(weight, found.dequantize(), inputs)
                self._errors[step.name] = self._errors[step.name][0], error
            yield step, found

    def rows(self) -> Iterator[AWQLayer]:
        """What was done to each layer."""
        for name, kind in self._kinds.items():
            scales, reason = self._scales.get(name), self._reasons[name]
            action = "clipped" if name in self._clipped else "rounded"
            if scales is not None:
                action, reason = "scaled", f"scales after {self._producers[name]}"
            before, after = self._errors.get(name, (0.0, 0.0))
            if before:
                reason = f"error {before:.1e} to {after:.1e}; {reason}".removesuffix("; ")
            exponent = scales.exponent if scales is not None else 0.0
            yield AWQLayer(name, kind, action, reason, exponent, before, after)

    def check(self) -> None:
        """Take the scales out of the model again if it does not compute the same."""
        if self._scales and self._change() > TOLERANCE:
            self._give_up("the layers are parts of a module that keeps its own weights")

    def restore(self) -> None:
        """Give the model its parameters of before."""
        self._undo.restore()

    def _calls(self, group: ScalingGroup) -> Calls | None:
        """The calls of the innermost module with all layers of a group, if there are several."""
        layers = [name for name in group.layers if name in self._steps]
        owner = common_owner(layers)
        if len(layers) < 2 or not owner:
            return None
        return Calls(self.model.get_submodule(owner))

    def _search(self, group: ScalingGroup, calls: Calls | None) -> AWQScales | None:
        """The scales of a group; None without inputs."""
        layers = [name for name in group.layers if name in self._steps]
        seen = [self._inputs[name] for name in layers if self._inputs[name].count]
        if not seen:
            return None
        free = group.channels >= 0
        importance = group.mean(torch.stack([one.importance for one in seen]).mean(0))
        importance = torch.where(free.to(importance.device), importance, 1.0)
        weights = {name: float_weight(self._steps[name].module) for name in layers}
        rounded = self._rounded_error
        if calls is None or not calls.repeats():
            rounded, calls = self._outputs_error, None

        def error(scales: Tensor) -> float:
            scales = group.free(scales)
            values = {
                name: scaled_rounding(weight, scales, self._steps[name].config.weights)
                for name, weight in weights.items()
            }
            return rounded(values, calls)

        found = search_scales(importance, error, steps=self.exponents)
        return AWQScales(group.free(found.scales), found.exponent, found.errors)

    def _rounded_error(self, values: Mapping[str, Tensor], calls: Calls | None) -> float:
        """The error of the module that holds the layers, with rounded weights."""
        assert calls is not None
        with self._with_weights(values):
            return calls.error()

    def _outputs_error(self, values: Mapping[str, Tensor], calls: Calls | None) -> float:
        """The mean error of the layers' outputs."""
        errors = []
        for name, value in values.items():
            rows = self._rows(name)
            if rows is not None:
                errors.append(_error(float_weight(self._steps[name].module), value, rows))
        return sum(errors) / len(errors) if errors else float("nan")

    @contextmanager
    def _with_weights(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Let layers have other weights for a while."""
        modules: dict[str, Any] = {name: self._steps[name].module for name in values}
        undo = FoldUndo([module.weight for module in modules.values()])
        try:
            for name, module in modules.items():
                module.weight.copy_(FloatForm.of(module).matrix(values[name]))
            yield
        finally:
            undo.restore()

    def _measure(self) -> None:
        """The errors of rounding without scales."""
        for name, step in self._steps.items():
            rows = self._rows(name)
            if rows is not None:
                weight = float_weight(step.module).flatten(1)
                error = _error(weight, nearest(weight, step.config.weights).dequantize(), rows)
                self._errors[name] = error, error

    def _fold(self, chosen: Sequence[tuple[ScalingGroup, AWQScales]]) -> None:
        """Put scales into the model; powers of two where others change the outputs."""
        names = sorted({name for group, _ in chosen for name in group.parameters()})
        parameters = [self.model.get_parameter(name) for name in names]
        half = any(parameter.dtype != torch.float32 for parameter in parameters)
        self._undo = FoldUndo(parameters)
        self._expected = outputs_of(self.who, self.model, self.batches[0], self.forward)
        try:
            for powers in (False, True) if not half else (True,):
                self._fold_all(chosen, powers)
                self.difference = self._change()
                if self.difference <= TOLERANCE:
                    if powers and chosen:
                        self.notes.append("Scales are powers of two, which need no rounding.")
                    return
                self.restore()
            self._give_up(f"the outputs of the model would change by {self.difference:.1e}")
        except BaseException:
            self.restore()
            raise

    def _fold_all(self, chosen: Sequence[tuple[ScalingGroup, AWQScales]], powers: bool) -> None:
        for group, found in chosen:
            scales = torch.exp2(found.scales.log2().round()) if powers else found.scales
            fold(self.model, group, scales)
            for name in group.layers:
                if name in self._steps:
                    self._scales[name] = AWQScales(scales, found.exponent, found.errors)
                    self._producers[name] = group.producer

    def _give_up(self, reason: str) -> None:
        """Leave all layers without scales."""
        self.restore()
        self._reasons.update(dict.fromkeys(self._scales, reason))
        self._scales.clear()
        self.difference = 0.0

    def _change(self) -> float:
        """The difference of the model's outputs on the first batch."""
        outputs = outputs_of(self.who, self.model, self.batches[0], self.forward)
        return output_difference(self._expected, outputs)

    def _rows(self, name: str) -> Tensor | None:
        """A sample of what a layer reads now."""
        inputs = self._inputs.get(name)
        if inputs is None or not inputs.count:
            return None
        scales = self._scales.get(name)
        return inputs.rows if scales is None else inputs.rows / scales.scales.to(inputs.rows.device)


def _outputs(weight: Tensor, inputs: Tensor) -> Tensor:
    return inputs @ weight.t()


def _error(weight: Tensor, values: Tensor, inputs: Tensor) -> float:
    """The squared error of a layer's outputs, relative to their squares."""
    change = _outputs(values - weight, inputs).square().sum(dtype=torch.float64)
    whole = _outputs(weight, inputs).square().sum(dtype=torch.float64)
    return float(change / whole) if whole else 0.0


def _better(
    weight: Tensor, first: IntegerWeight, second: IntegerWeight, inputs: Tensor
) -> IntegerWeight:
    """The second integers, or the first ones if the outputs of these have a smaller error."""
    errors = [_error(weight, one.dequantize(), inputs) for one in (first, second)]
    return first if errors[0] < errors[1] else second
