"""Embeddings in a verb: which of them take part, and which share a quantized weight.

A table has no activations to quantize. It takes part if its configuration is one of weights alone.
A table that is tied to an output layer also takes part if the output layer becomes a layer whose
packed weight can look up rows: both then have one quantized weight. All other tables are modules of
another kind for the verb.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torchquant.configs import QuantizationConfig
from torchquant.convert.adjustment import adjustment_of
from torchquant.convert.selection import Selection
from torchquant.graph.modules import memory_key
from torchquant.nn.base import QuantizedModule
from torchquant.nn.kinds import Kind
from torchquant.nn.shared_weight import has_same_weight, share_weight
from torchquant.nn.weight import INTX
from torchquant.report.words import human_bytes

Step = Any  # torchquant.convert.plan.Step; that module imports this one


def weights_alone(config: QuantizationConfig) -> QuantizationConfig:
    """The configuration of a table whose weights ``config`` describes.

    Example:
        >>> from torchquant import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
        >>> config = Int8DynamicActivationIntxWeightConfig(4, group_size=128)
        >>> weights_alone(config) == IntxWeightOnlyConfig(4, group_size=128)
        True
    """
    return replace(config, activations=None, output=None)


def take_part(steps: Sequence[Step], selection: Selection[Any], tables: bool) -> list[Step]:
    """The steps without the float tables that the configurations do not concern.

    A table whose ``follows`` becomes true takes part for the sake of an output layer.

    Args:
        steps: a step for each layer of the model.
        selection: which layers to change, and their configurations.
        tables: whether the verb changes float tables at all.
    """
    if not tables:
        return without_float_tables(steps)
    tied = _by_weight(steps)
    only_weights = any(_is_for_tables(config) for config in selection.configs.values())
    kept = []
    for step in steps:
        if step.already or not step.kind.only_weights:
            kept.append(step)
            continue
        config = selection.config_for(step.names)
        if _is_for_tables(config) or (config is None and only_weights):
            kept.append(step)
            continue
        heads = [other for other in tied[_weight_key(step)] if not other.kind.only_weights]
        free = step.kind.refusal(step.module) is None
        if config is not None and free and selection.filter.accepts(step.module, step.names):
            step.follows = any(_looks_up_rows(head, config, selection) for head in heads)
            if step.follows:
                kept.append(step)
    return kept


def without_float_tables(steps: Iterable[Step]) -> list[Step]:
    """The steps without float tables.

    Example:
        >>> without_float_tables([])
        []
    """
    return [step for step in steps if step.already or not step.kind.only_weights]


def without_followers(steps: Sequence[Step]) -> list[Step]:
    """The steps without the tables whose output layer stays in float after all."""
    tied = _by_weight(steps)
    return [
        step
        for step in steps
        if not step.follows
        or (
            step.skip is None
            and any(
                other.skip is None and other.config.weights == step.config.weights
                for other in tied[_weight_key(step)]
                if other is not step and not other.kind.only_weights
            )
        )
    ]


class Shared:
    """The layers of a plan that get one quantized weight together.

    Args:
        steps: the plan, before it is carried out; ``shares`` of their steps is set.
    """

    def __init__(self, steps: Iterable[Step]) -> None:
        groups: dict[Hashable, list[Step]] = {}
        for step in steps:
            if step.skip is None and step.tied and _has_rows(step.kind, step.config, step.module):
                key = (_weight_key(step), step.config.weights, step.kind.weight_shape(step.module))
                groups.setdefault(key, []).append(step)
        self._groups = [group for group in groups.values() if len(group) > 1]
        for group in self._groups:
            for step in group:
                step.shares = ", ".join(other.name for other in group if other is not step)
        self._bytes = 0

    def settle(self) -> None:
        """Leave out layers for which an algorithm found other integers than for the rest."""
        groups = self._groups
        self._groups = []
        for group in groups:
            same = [[other for other in group if _found_alike(step, other)] for step in group]
            largest = max(same, key=len)
            if len(largest) > 1:
                self._groups.append(largest)
            for step in group:
                names = [other.name for other in largest if other is not step]
                step.shares = ", ".join(names) if step in largest and names else None

    def share(self, step: Step, new: Any) -> None:
        """Let a new layer have the weight of a layer that is tied to it and was made before."""
        for group in self._groups:
            made = [other.module for other in group if isinstance(other.module, QuantizedModule)]
            if step in group and made and has_same_weight(made[0], new):
                self._bytes += new.packed.nbytes
                share_weight([made[0], new])

    def notes(self) -> Iterator[str]:
        """The note of the report on layers that share a weight."""
        names = [" and ".join(step.name for step in group) for group in self._groups]
        if names:
            yield (
                f"One quantized weight for tied layers, {human_bytes(self._bytes)} less than a "
                f"weight for each: {'; '.join(names)}."
            )


def _found_alike(first: Step, second: Step) -> bool:
    """True if an algorithm found the same integers for two layers, or none for both."""
    ours, theirs = adjustment_of(first.module), adjustment_of(second.module)
    return all(
        one is other if one is None or other is None else torch.equal(one, other)
        for one, other in (
            (ours.qweight, theirs.qweight),
            (ours.weight_scale, theirs.weight_scale),
            (ours.weight_zero_point, theirs.weight_zero_point),
        )
    )


def _is_for_tables(config: Any) -> bool:
    return config is not None and getattr(config, "activations", config) is None


def _looks_up_rows(head: Step, config: Any, selection: Selection[Any]) -> bool:
    """True if an output layer would have a packed weight that a table of ``config`` can share."""
    own = selection.config_for(head.names)
    if own is None or head.already or not selection.filter.accepts(head.module, head.names):
        return False
    if getattr(own, "weights", None) != getattr(config, "weights", own):
        return False
    return _has_rows(head.kind, own, head.module)


def _has_rows(kind: Kind, config: Any, module: nn.Module) -> bool:
    """True if rows of the packed weight of the layer that is made can be looked up."""
    return kind.layer_class(config, module).weight_format.name == INTX.name


def _weight_key(step: Step) -> Hashable:
    weight = step.module._parameters.get("weight")
    return id(step) if weight is None else memory_key(weight)


def _by_weight(steps: Iterable[Step]) -> dict[Hashable, list[Step]]:
    groups: dict[Hashable, list[Step]] = {}
    for step in steps:
        groups.setdefault(_weight_key(step), []).append(step)
    return groups


def tied_again(pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Let float layers share a parameter if the quantized layers that they replace share a weight.

    Args:
        pairs: each quantized layer and the float layer that replaces it.
    """
    first: dict[int, nn.Module] = {}
    for quantized, floating in pairs:
        shared = getattr(quantized, "shared_weight", None)
        if shared is None:
            continue
        found = first.setdefault(id(shared), floating)
        weight = found._parameters["weight"]
        own = floating._parameters["weight"]
        if own is not None and weight is not None and own.shape == weight.shape:
            floating._parameters["weight"] = weight


__all__ = ["weights_alone", "without_float_tables"]
