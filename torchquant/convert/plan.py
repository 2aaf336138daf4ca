"""The plan of a verb: the layers of a model, which of them to change, and the reasons.

A verb makes a plan, checks it, and only then changes the model. If it refuses a model, the model is
unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchquant.graph.modules import (
    memory_key,
    owners_by_module,
    replace_module,
    tensor_bytes,
)
from torchquant.graph.weight_reads import Reads, weight_reads
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.kinds import Kind, kind_of, kinds, weight_shape
from torchquant.report import Action, LayerReport

FilterFn = Callable[[nn.Module, str], bool]
Reason = Callable[[Any], str | None]
Classes = type[nn.Module] | tuple[type[nn.Module], ...]
Refusal = Callable[[nn.Module, Kind], str | None]


@dataclass
class Step:
    """One layer of the model that belongs to a kind, and the plan for this layer.

    Example:
        >>> linear = nn.Linear(64, 64)
        >>> Step(["first", "second"], linear, kind_of(linear), [], refusal="lazy").remark()
        'lazy; also at second'
    """

    names: list[str]
    module: nn.Module
    kind: Kind
    owners: list[tuple[nn.Module, str]]
    asked: bool = False
    refusal: str | None = None  # the reason why it cannot be changed
    leave: str | None = None  # the reason why it should not be changed, although it could
    reads: Reads | None = None  # how the code of other modules uses its weight
    tied: bool = False
    dtype: torch.dtype = torch.float32  # of the float weight

    @property
    def name(self) -> str:
        """The layer's first name in the model."""
        return self.names[0]

    @property
    def skip(self) -> str | None:
        """The reason why the layer stays unchanged, or None if it will be changed."""
        return self.leave or self.refusal

    def remark(self, done: str = "") -> str:
        """The remark for the report; ``done`` is the remark on a layer that was changed."""
        parts = [self.skip or done]
        if len(self.names) > 1:
            parts.append(f"also at {', '.join(self.names[1:])}")
        return "; ".join(part for part in parts if part)

    def skipped(self) -> LayerReport:
        """The row of the report for a layer that stays unchanged."""
        kind, size = type(self.module).__name__, tensor_bytes(self.module)
        shape = weight_shape(self.module)
        return LayerReport(self.name, kind, "skipped", self.remark(), shape, size, size)

    def replaced(self, new: nn.Module | None, action: Action, remark: str = "") -> LayerReport:
        """Replace the layer by ``new``, or leave it if ``new`` is None; return the report's row."""
        if new is None:
            return self.skipped()
        old, before = self.module, tensor_bytes(self.module)
        replace_module(self.owners, old, new)
        self.module = new
        shape, after = weight_shape(new), tensor_bytes(new)
        kind = type(old).__name__
        return LayerReport(self.name, kind, action, self.remark(remark), shape, before, after)


def check_model(
    who: str,
    model: nn.Module,
    *,
    quantized: str | None = None,
    trained: str | None = None,
    floating: str | None = None,
) -> None:
    """Raise if ``model`` is not a model that a verb can change in place.

    A bare layer has no parent module in which it could be replaced.

    Args:
        who: name of the verb, with which messages start.
        model: the argument of the verb.
        quantized: remedy for a bare quantized layer; None accepts such a layer.
        trained: remedy for a bare layer that is prepared for training; None accepts it.
        floating: remedy for a bare float layer of a kind; None accepts it. In the remedies,
            ``{float}``, ``{quantized}``, ``{trained}`` and ``{kind}`` are replaced by names.

    Raises:
        TypeError: model is not a module, or is a scripted module.
        ValueError: model is a bare layer for which a remedy is given.

    Example:
        >>> check_model("quantize_", nn.Sequential())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be an nn.Module, got {type(model).__name__}")
    kind, remedy = kind_of(model), floating
    if isinstance(model, TrainedModule):
        remedy = trained
    elif isinstance(model, QuantizedModule):
        remedy = quantized
    if kind is not None and remedy is not None:
        names = {
            "kind": kind.name,
            "float": kind.float_types[0].__name__,
            "quantized": kind.quantized.__name__,
            "trained": "" if kind.trained is None else kind.trained.__name__,
        }
        raise ValueError(
            f"{who}: model must contain layers, got a bare {type(model).__name__}, "
            f"{remedy.format(**names)}"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{who}: model must be an nn.Module in Python, got a scripted module, whose layers are "
            "already compiled; quantize the model from which it was made"
        )


def check_filter(who: str, filter_fn: FilterFn | None) -> None:
    """Raise if ``filter_fn`` cannot be called.

    Raises:
        TypeError: filter_fn is neither None nor callable; the message starts with ``who``.

    Example:
        >>> check_filter("quantize_", lambda module, name: name != "head")
    """
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"{who}: filter_fn must be a function of (module, name), got {filter_fn!r}")


def plan_layers(
    model: nn.Module, filter_fn: FilterFn | None, done: Reason, refusal: Refusal
) -> list[Step]:
    """Return a step for each layer of a model that belongs to a kind, in the order of the modules.

    Args:
        model: the model that contains the layers.
        filter_fn: called with each float layer and each of its names; returns True for layers to
            change.
        done: takes a quantized or trained layer; returns the reason why it stays unchanged, or
            None.
        refusal: takes a float layer and its kind; returns the reason why it cannot be changed, or
            None.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
        >>> steps = plan_layers(model, None, lambda module: None, lambda module, kind: None)
        >>> [(step.name, step.skip) for step in steps]
        [('0', None), ('1', 'too small to benefit')]
    """
    read, reads = _read_elsewhere(model), weight_reads(model)
    steps = find_layers(model)
    for step in steps:
        module, kind = step.module, step.kind
        if isinstance(module, (QuantizedModule, TrainedModule)):
            step.leave = done(module)
            continue
        step.reads = reads.get(id(module))
        step.asked = filter_fn is None or any(filter_fn(module, name) for name in step.names)
        step.refusal = read.get(id(module)) or refusal(module, kind)
        if step.refusal is None and step.reads is not None and step.reads.changes:
            step.refusal = step.reads.remark
        if not step.asked:
            step.leave = "filter_fn"
        elif filter_fn is None and not step.refusal and kind.too_small(module):
            step.leave = "too small to benefit"
    return steps


def find_layers(model: nn.Module, classes: Classes = nn.Module) -> list[Step]:
    """Return an empty step for each layer that belongs to a kind, in the order of the modules.

    Args:
        model: the model that contains the layers.
        classes: restricts the result to layers of these classes, usually
            :class:`torchquant.nn.QuantizedModule` or :class:`torchquant.nn.TrainedModule`.

    Example:
        >>> linear = nn.Linear(4, 4)
        >>> [step.names for step in find_layers(nn.Sequential(linear, linear))]
        [['0', '1']]
    """
    owners = owners_by_module(model)
    uses = Counter(
        memory_key(p)
        for module in model.modules()
        for p in module._parameters.values()
        if p is not None
    )
    layers: dict[int, Step] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind = kind_of(module)
        if kind is not None and isinstance(module, classes):
            step = Step([], module, kind, owners.get(id(module), []))
            layers.setdefault(id(module), step).names.append(name)
    for step in layers.values():
        weight = step.module._parameters.get("weight")
        step.tied = weight is not None and uses[memory_key(weight)] > 1
    return list(layers.values())


def check_strict(who: str, steps: Iterable[Step]) -> None:
    """Raise if a layer that was selected cannot be changed.

    Raises:
        ValueError: such layers exist; the message names the layers and the reasons.

    Example:
        >>> check_strict("quantize_", [])
    """
    refused = [step for step in steps if step.asked and step.refusal]
    if refused:
        listing = "; ".join(f"{step.name}: {step.refusal}" for step in refused)
        raise ValueError(
            f"{who}: with strict=True every selected layer must be quantizable, got "
            f"{len(refused)} that cannot be quantized ({listing}); exclude them with filter_fn, or "
            "pass strict=False to leave them in float"
        )


def _read_elsewhere(model: nn.Module) -> dict[int, str]:
    """The reasons to leave layers whose weight the forward of another module reads, by id."""
    layers: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            layers[id(module.out_proj)] = "nn.MultiheadAttention reads its weight"
        if isinstance(module, nn.TransformerEncoderLayer):
            for name in ("linear1", "linear2"):  # a subclass may have other names
                linear = getattr(module, name, None)
                layers[id(linear)] = "nn.TransformerEncoderLayer's fast path reads its weight"
    return layers


def no_layers(done: str) -> str:
    """The note for a model without layers of any kind; ``done`` is the verb to name.

    Example:
        >>> no_layers("quantize")
        'The model has no linear layers; there was nothing to quantize.'
    """
    names = " or ".join(kind.name for kind in kinds())
    return f"The model has no {names} layers; there was nothing to {done}."
