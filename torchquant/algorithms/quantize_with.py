"""quantize_ with integers that an algorithm chooses for each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from torchquant.algorithms.integer_weight import IntegerWeight
from torchquant.configs import Fusion, QuantizationConfig
from torchquant.convert.adjustment import Adjustment, adjust, adjustment_of, restore_adjustment
from torchquant.convert.plan import Step
from torchquant.convert.quantize import quantize_model
from torchquant.convert.selection import FilterFn
from torchquant.nn.kinds import weight_shape
from torchquant.report import QuantizationReport

__all__ = ["give", "quantize_with"]


def quantize_with(
    who: str,
    model: nn.Module,
    config: QuantizationConfig | Mapping[str, QuantizationConfig | None] | None,
    filter_fn: FilterFn | None,
    strict: bool,
    fusion: Fusion | None,
    progress: bool | None,
    find: Callable[[list[Step]], None],
) -> QuantizationReport:
    """What :func:`torchquant.quantize_` does, with integers that ``find`` gives to the layers.

    The integers do not stay with layers that remain in float, nor if an exception ends the call;
    such layers keep what earlier calls of verbs found.

    Args:
        who: the verb, with which messages start.
        model: see :func:`torchquant.quantize_`; so are the other arguments that are not listed.
        find: takes the steps of the layers that will be replaced, before the model changes, and
            calls :func:`give` for some. If it raises, it must leave the model as it was.

    Example:
        >>> import torch
        >>> from torchquant.algorithms.integer_weight import nearest
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> def find(steps):
        ...     for step in steps:
        ...         give(step, nearest(step.module.weight * 2, step.config.weights), "verb")
        >>> before = model[0].weight.detach().clone()
        >>> _ = quantize_with("verb", model, None, None, False, None, None, find)
        >>> torch.allclose(model[0].weight, before * 2, atol=0.01)
        True
    """
    before: list[tuple[nn.Module, Adjustment]] = []

    def found(steps: list[Step]) -> None:
        before.extend((step.module, adjustment_of(step.module)) for step in steps)
        find(steps)

    try:
        return quantize_model(who, model, config, filter_fn, strict, fusion, progress, found)
    finally:
        for module, adjustment in before:
            restore_adjustment(module, adjustment)


def give(step: Step, found: IntegerWeight, who: str) -> None:
    """Let the layer of a step get integers when it is replaced.

    Args:
        step: the step of a float layer.
        found: the integers of its weight, of which each output is a row.
        who: the verb that found them.

    Example:
        >>> from torchquant.algorithms.integer_weight import nearest
        >>> from torchquant.convert.adjustment import adjustment_of
        >>> from torchquant.convert.plan import find_layers
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> (step,) = find_layers(model)
        >>> give(step, nearest(model[0].weight, QuantizationConfig().weights), "verb")
        >>> adjustment_of(model[0]).found_by
        'verb'
    """
    qweight = found.qweight.view(weight_shape(step.module))
    adjust(
        step.module,
        Adjustment(qweight, found.scale, weight_zero_point=found.zero_point, found_by=who),
    )
