"""The plan of a verb: the layers of a model, which of them to change, and the reasons.

A verb makes a plan, checks it, and only then changes the model. If it refuses a model, the model is
unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchquant.convert.account import Other
from torchquant.convert.adapters import adapter_reasons
from torchquant.convert.calibration_hooks import hook_of
from torchquant.convert.families import other_library
from torchquant.convert.selection import Selection
from torchquant.convert.tables import take_part, weights_alone, without_followers
from torchquant.graph.held import Held, held_modules
from torchquant.graph.modules import (
    memory_key,
    owners_by_module,
    replace_module,
    tensor_bytes,
)
from torchquant.graph.weight_reads import Reads, weight_reads
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.kinds import Kind, kind_of, weight_shape
from torchquant.nn.multihead_attention import MultiheadAttention
from torchquant.report import LayerReport
from torchquant.report.quantization import Action

Reason = Callable[["Step"], str | None]
Classes = type[nn.Module] | tuple[type[nn.Module], ...]


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
    small: bool = False  # leave says that it does not benefit by itself
    config: Any = None  # what the verb makes of it
    pattern: str | None = None  # the key under which config was given
    prepared: Any = None  # what convert_ makes the new layer from
    reads: Reads | None = None  # how the code of other modules uses its weight
    tied: bool = False
    tied_to: list[str] = field(default_factory=list)  # other parameters with the weight's memory
    bias_tied_to: list[str] = field(default_factory=list)
    follows: bool = False  # a table that is changed for the sake of the output layer tied to it
    shares: str | None = None  # the tied layer whose quantized weight it has
    held: list[Held] = field(default_factory=list)  # references from plain Python objects
    kept: list[str] = field(default_factory=list)  # those that still hold the old layer

    @property
    def name(self) -> str:
        """The layer's first name in the model."""
        return self.names[0]

    @property
    def already(self) -> bool:
        """True if the layer was quantized or prepared before the verb."""
        ours = isinstance(self.module, (QuantizedModule, TrainedModule))
        return ours or hook_of(self.module) is not None

    @property
    def skip(self) -> str | None:
        """The reason why the layer stays unchanged, or None if it will be changed."""
        return self.leave or self.refusal

    @property
    def untied(self) -> str:
        """The remark on a layer that shared its weight in float; empty if it never did."""
        if self.shares is not None:
            return f"shares its weight with {self.shares}"
        return f"untied from {', '.join(self.tied_to)}" if self.tied else ""

    def remark(self, done: str = "") -> str:
        """The remark for the report; ``done`` is the remark on a layer that was changed."""
        parts = [self.skip or done]
        if not self.skip and self.bias_tied_to:
            parts.append(f"bias tied to {', '.join(self.bias_tied_to)}")
        if not self.skip and self.pattern is not None:
            parts.append(f"as {self.pattern!r}")
        if len(self.names) > 1:
            parts.append(f"also at {', '.join(self.names[1:])}")
        return "; ".join(part for part in parts if part)

    def skipped(self) -> LayerReport:
        """The row of the report for a layer that stays unchanged."""
        size = tensor_bytes(self.module)
        return self._row(self.module, "skipped", self.remark(), size, size, self.already)

    def marked(self, action: Action, remark: str = "") -> LayerReport:
        """The row for a layer that stays the same object, although the verb changed it."""
        size = tensor_bytes(self.module)
        return self._row(self.module, action, self.remark(remark), size, size)

    def replaced(self, new: nn.Module | None, action: Action, remark: str = "") -> LayerReport:
        """Replace the layer by ``new``, or leave it if ``new`` is None; return the report's row."""
        if new is None:
            return self.skipped()
        old, before = self.module, tensor_bytes(self.module)
        replace_module(self.owners, old, new)
        self.kept = [held.name for held in self.held if not held.replace(new)]
        self.held = []  # they would keep the old layer in memory
        self.module = new
        return self._row(old, action, self.remark(remark), before, tensor_bytes(new))

    def _row(
        self,
        old: nn.Module,
        action: Action,
        remark: str,
        before: int,
        after: int,
        already: bool = False,
    ) -> LayerReport:
        return LayerReport(
            self.name,
            type(old).__name__,
            action,
            remark,
            weight_shape(self.module),
            before,
            after,
            family=self.kind.name,
            already=already or other_library(self.module) is not None,
            weights=weights_of(self.module),
        )


def weights_of(module: nn.Module) -> str:
    """How the weight of a layer is quantized, in words; empty for a layer in float.

    Example:
        >>> from torchquant.nn import QuantizedLinear
        >>> weights_of(QuantizedLinear(64, 32)), weights_of(nn.Linear(64, 32))
        ('int8 per channel', '')
    """
    return str(module.config.weights) if isinstance(module, QuantizedModule) else ""


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


def plan_layers(
    model: nn.Module,
    selection: Selection[Any],
    done: Reason,
    refusal: Reason,
    *,
    tables: bool = False,
) -> list[Step]:
    """Return a step for each layer of a model that belongs to a kind, in the order of the modules.

    Args:
        model: the model that contains the layers.
        selection: which float layers to change, and their configurations. A function is called
            with each layer and each of its names.
        done: takes the step of a quantized or trained layer; returns the reason why it stays
            unchanged, or None.
        refusal: takes the step of a float layer; returns the reason why it cannot be changed, or
            None.
        tables: whether the verb changes float embeddings.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
        >>> from torchquant.convert.selection import selection
        >>> everything = selection("quantize_", None, "int8", str)
        >>> steps = plan_layers(model, everything, lambda step: None, lambda step: None)
        >>> [(step.name, step.skip) for step in steps]
        [('0', None), ('1', 'too small to benefit')]
    """
    read, reads = _read_elsewhere(model), weight_reads(model)
    steps = take_part(find_layers(model), selection, tables)
    adapters = adapter_reasons(model, (step.module for step in steps))
    pairs = [(step.module, step.names) for step in steps]
    marked = [id(step.module) in adapters for step in steps]
    named = selection.filter.selects_only(marked, pairs) if any(marked) else set()
    unfit: list[AttributeError] = []
    for place, step in enumerate(steps):
        module, kind = step.module, step.kind
        if step.already:
            step.leave = done(step)
            continue
        step.reads = reads.get(id(module))
        try:
            step.asked = selection.filter.selects(module, step.names)
            left = "filter_fn"
        except AttributeError as error:  # the filter is for layers of another kind
            unfit.append(error)
            left = f"filter_fn: {error}"
        if not step.asked:
            step.leave = left
            continue
        step.pattern, step.config, step.leave = selection.config_of(step.names)
        if step.leave:
            step.asked = False
            continue
        if step.follows:
            step.config = weights_alone(step.config)
        in_particular = selection.filter.chooses or selection.named_in_full(step.names)
        step.refusal = other_library(module) or read.get(id(module)) or refusal(step)
        if step.refusal is None and step.reads is not None and step.reads.changes:
            step.refusal = step.reads.remark
        if marked[place] and place not in named and not selection.named_in_full(step.names):
            step.leave = adapters[id(module)]
        elif not in_particular and not step.refusal:
            step.leave = kind.no_benefit(module, step.config)
            step.small = step.leave is not None
    if unfit and len(unfit) == sum(not step.already for step in steps):
        raise unfit[0]  # no layer has the attribute: the filter is wrong
    return without_followers(steps)


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
    owners, held = owners_by_module(model), held_modules(model)
    uses: dict[Hashable, list[str]] = {}
    layers: dict[int, Step] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                uses.setdefault(memory_key(parameter), []).append(f"{name}.{key}".lstrip("."))
    for name, module in model.named_modules(remove_duplicate=False):
        kind = kind_of(module)
        if kind is not None and isinstance(module, classes):
            places = held.get(id(module), [])
            step = Step([], module, kind, owners.get(id(module), []), held=places)
            layers.setdefault(id(module), step).names.append(name)
    for step in layers.values():
        step.tied_to = _others(step, "weight", uses)
        step.bias_tied_to = _others(step, "bias", uses)
        step.tied = bool(step.tied_to)
    return list(layers.values())


def _others(step: Step, name: str, uses: dict[Hashable, list[str]]) -> list[str]:
    """Names of the other parameters that share the memory of a layer's parameter."""
    parameter = step.module._parameters.get(name)
    if parameter is None:
        return []
    own = f"{step.name}.{name}".lstrip(".")
    return [use for use in uses[memory_key(parameter)] if use != own]


def check_strict(
    who: str,
    steps: Iterable[Step],
    others: Iterable[Other] = (),
    problems: Sequence[str] = (),
) -> None:
    """Raise if something that was asked for cannot be done.

    Args:
        who: the name of the verb, with which the message starts.
        steps: the layers of a kind.
        others: the modules of other kinds.
        problems: what the arguments of the verb ask for and no module has.

    Raises:
        ValueError: there is such a thing; the message names the layers and the reasons.

    Example:
        >>> check_strict("quantize_", [])
    """
    refused = [f"{step.name}: {step.refusal}" for step in steps if step.asked and step.refusal]
    refused += [
        f"{other.name}: {other.reason}" for other in others if other.asked and not other.is_norm
    ]
    if refused:
        raise ValueError(
            f"{who}: with strict=True every selected layer must be quantizable, got "
            f"{len(refused)} that cannot be quantized ({'; '.join(refused)}); exclude them with "
            "filter_fn, or pass strict=False to leave them in float"
        )
    if problems:
        raise ValueError(
            f"{who}: with strict=True the arguments must select layers of the model, but "
            f"{'; '.join(problems)}; correct them, or pass strict=False"
        )


def _read_elsewhere(model: nn.Module) -> dict[int, str]:
    """The reasons to leave layers whose weight the forward of another module reads, by id."""
    layers: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            layers[id(module.out_proj)] = "nn.MultiheadAttention reads its weight"
        attention = getattr(module, "self_attn", None)  # ours makes the fast path impossible
        fused = isinstance(module, nn.TransformerEncoderLayer)
        if fused and not isinstance(attention, MultiheadAttention):
            for name in ("linear1", "linear2"):  # a subclass may have other names
                linear = getattr(module, name, None)
                layers[id(linear)] = "nn.TransformerEncoderLayer's fast path reads its weight"
    return layers
