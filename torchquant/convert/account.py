"""Where every parameter of a model is: in a layer of a kind, or in a module of another kind.

An account is made before a verb changes the model. It holds no layer that the verb replaces, so
that float weights are released one by one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchquant.convert.families import family_of, other_library
from torchquant.graph.modules import memory_key
from torchquant.nn.base import QuantizedModule
from torchquant.nn.kinds import kind_of, weight_shape
from torchquant.nn.multihead_attention import attention_refusal
from torchquant.report import NORMS, LayerReport

_NO_PATH = "no integer path yet"
_PROJECTIONS = "no projection (q_proj, k_proj, v_proj, out_proj) is selected and can be changed"
_TABLES = "only quantize_ quantizes it, with weights alone, such as IntxWeightOnlyConfig()"


@dataclass
class Other:
    """A module with parameters that belongs to no kind of layer.

    Attributes:
        names: its names in the model; the model itself has the name "".
        module: the module.
        family: what it is, for the summary.
        library: how another library has quantized it, or None.
        asked: True if the filter of the verb asks for this module.
        parameters: its own parameters, and those of its parametrizations, by name.
    """

    names: list[str]
    module: nn.Module
    family: str
    library: str | None
    asked: bool = False
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The module's first name; the model itself is ``(model)``."""
        return self.names[0] or "(model)"

    @property
    def reason(self) -> str:
        """Why the module stays in float."""
        if self.library is not None:
            return self.library
        names = ", ".join(self.parameters)
        kind = type(self.module).__name__
        flat = all(is_lazy(p) or p.dim() < 2 for p in self.parameters.values())
        text = {
            NORMS: kind,
            "raw parameters": f"parameters of {kind}{'' if flat else f', {_NO_PATH}'}: {names}",
            "experts": f"{kind}, {_NO_PATH}: {names}",
            "attention in_proj": f"{kind}'s {names}, {_NO_PATH}",
        }.get(self.family, f"{kind}, {_NO_PATH}")
        if attention_refusal(self.module) is None:
            text = f"{kind}'s {names}: {_PROJECTIONS}"
        known = kind_of(self.module)
        if known is not None and known.only_weights and known.refusal(self.module) is None:
            text = f"{kind}; {_TABLES}"
        if any(is_lazy(p) for p in self.parameters.values()):
            text += "; has no shape before the first call"
        return f"{text}; selected by filter_fn" if self.asked and not self.is_norm else text

    @property
    def is_norm(self) -> bool:
        """True for norms, which no filter means when it selects them with other modules."""
        return self.family == NORMS

    def row(self) -> LayerReport:
        """The module's row of the report, without the number of its parameters."""
        tensors = [*self.parameters.values()]
        tensors += [buffer for buffer in self.module._buffers.values() if buffer is not None]
        distinct = {memory_key(t): t for t in tensors if not is_lazy(t)}
        size = sum(t.numel() * t.element_size() for t in distinct.values())
        shapes = [tuple(p.shape) for p in self.parameters.values() if not is_lazy(p)]
        parts = [self.reason]
        if len(self.names) > 1:
            parts.append(f"also at {', '.join(self.names[1:])}")
        return LayerReport(
            self.name,
            type(self.module).__name__,
            "float" if self.library is None else "skipped",
            "; ".join(parts),
            max(shapes, key=prod, default=()),
            size,
            size,
            family=self.family,
            already=self.library is not None,
        )


@dataclass
class Account:
    """The owners of every parameter of a model.

    Attributes:
        others: the modules of other kinds, in the order of the model's modules.
        containers: names of the modules without parameters of their own.
    """

    others: list[Other]
    containers: list[str]
    _owners: dict[Hashable, tuple[int, list[int]]]  # key -> elements, places of the rows

    def filled(
        self, layers: Sequence[LayerReport]
    ) -> tuple[tuple[LayerReport, ...], tuple[LayerReport, ...]]:
        """The rows of layers and of other modules, with the numbers of their parameters."""
        rows = [*layers, *(other.row() for other in self.others)]
        counts = [0] * len(rows)
        for elements, owners in self._owners.values():
            floating = (place for place in owners if rows[place].stays_float)
            counts[next(floating, owners[0])] += elements
        counted = [replace(row, parameters=count) for row, count in zip(rows, counts, strict=True)]
        return tuple(counted[: len(layers)]), tuple(counted[len(layers) :])


def account_of(model: nn.Module, layers: Sequence[nn.Module]) -> Account:
    """Find the owner of every parameter of a model.

    Args:
        model: the model.
        layers: its layers of a kind, in the order of the report's rows.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
        >>> [(other.name, other.family) for other in account_of(model, [model[1]]).others]
        [('0', 'embeddings')]
    """
    places = {id(layer): place for place, layer in enumerate(layers)}
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    others: dict[int, Other] = {}
    owned: dict[Hashable, tuple[int, list[int | Other]]] = {}

    def add(key: Hashable, elements: int, owner: int | Other) -> None:
        owners = owned.setdefault(key, (elements, []))[1]
        if not any(owner is known or owner == known for known in owners):
            owners.append(owner)

    def other(module: nn.Module) -> Other:
        found = others.get(id(module))
        if found is None:
            own, library = names[id(module)], other_library(module)
            found = others[id(module)] = Other(own, module, family_of(module, own[0]), library)
        return found

    def walk(module: nn.Module, owner: int | Other | None, prefix: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if id(module) in places:
            owner, prefix = places[id(module)], ""
            if isinstance(module, QuantizedModule) and module._parameters.get("weight") is None:
                shared = module.shared_weight
                key = ("integers", owner) if shared is None else ("shared integers", id(shared))
                add(key, prod(weight_shape(module)), owner)
        elif owner is None and other_library(module) is not None:
            owner = other(module)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            mine = other(module) if owner is None else owner
            if isinstance(mine, Other):
                mine.parameters[prefix + name] = parameter
            elements = 0 if is_lazy(parameter) else parameter.numel()
            add(memory_key(parameter), elements, mine)
        for name, child in module._modules.items():
            if child is None:
                continue
            if name == "parametrizations" and owner is None:
                walk(child, other(module), "parametrizations.")
            else:
                walk(child, owner, f"{prefix}{name}." if isinstance(owner, Other) else "")

    seen: set[int] = set()
    walk(model, None, "")
    ordered = [*others.values()]
    rows = {id(other): len(layers) + place for place, other in enumerate(ordered)}
    return Account(
        ordered,
        [
            name
            for key, own in names.items()
            if key not in places and key not in others
            for name in own
        ],
        {
            key: (elements, [rows[id(o)] if isinstance(o, Other) else o for o in owners])
            for key, (elements, owners) in owned.items()
        },
    )


def library_notes(others: Iterable[Other]) -> list[str]:
    """A note for each way in which another library has quantized modules.

    Example:
        >>> from torch.ao.nn.quantized import dynamic
        >>> library_notes(account_of(nn.Sequential(dynamic.Linear(4, 4)), []).others)
        ['Already quantized by torch.ao (Linear), left unchanged: 0.']
    """
    found: dict[str, list[str]] = {}
    for other in others:
        if other.library is not None:
            found.setdefault(other.library, []).append(other.name)
    return [
        f"{reason[0].upper()}{reason[1:]}, left unchanged: {', '.join(names)}."
        for reason, names in found.items()
    ]


__all__ = ["account_of", "library_notes"]
