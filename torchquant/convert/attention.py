"""nn.MultiheadAttention with its projections as layers, so that the verbs can take them.

A verb separates the projections before it makes its plan. Attention modules in which the plan
changes no layer get their original module back.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from torchquant.convert.calibration_hooks import hook_of
from torchquant.convert.plan import Step
from torchquant.graph.held import held_modules
from torchquant.graph.modules import memory_key, owners_by_module, replace_module
from torchquant.graph.weight_reads import names_in_code
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.multihead_attention import MultiheadAttention, attention_refusal

_READ = frozenset(("in_proj_weight", "in_proj_bias", "out_proj"))


@dataclass
class _Place:
    """An attention module whose projections are layers of their own."""

    name: str
    new: MultiheadAttention
    owners: list[tuple[nn.Module, str]]
    old: nn.MultiheadAttention | None  # None once the verb changes the model

    def restore(self) -> None:
        if self.old is None:
            _join(self.owners, self.new)
        else:
            replace_module(self.owners, self.new, self.old)

    def layers(self) -> Iterator[nn.Module]:
        """The projections, and the layers that the fused forward around them would read."""
        yield from self.new.children()
        for parent, _ in self.owners:
            if isinstance(parent, nn.TransformerEncoderLayer):
                found = (parent._modules.get(name) for name in ("linear1", "linear2"))
                yield from (layer for layer in found if layer is not None)

    def is_used(self) -> bool:
        """True if a verb has changed such a layer."""
        return any(
            isinstance(module, (QuantizedModule, TrainedModule)) or hook_of(module) is not None
            for module in self.layers()
        )


@dataclass
class Separated:
    """The attention modules of a model whose projections are layers, and the plan of a verb.

    Attributes:
        plan: the steps of the plan that the verb made.
    """

    plan: list[Step] = field(default_factory=list)
    _places: list[_Place] = field(default_factory=list)

    def commit(self) -> None:
        """Release the original modules, whose weights would stay in memory."""
        for place in self._places:
            place.old = None

    def notes(self, optimizer: bool = False) -> Iterator[str]:
        """A note that names the modules; with ``optimizer`` also what training has to respect."""
        if not self._places:
            return
        names = ", ".join(place.name for place in self._places)
        yield (
            "Projections of nn.MultiheadAttention became layers of their own "
            f"(torchquant.nn.MultiheadAttention): {names}."
        )
        if optimizer:
            yield "Their weights are new parameters: create the optimizer after this."


@contextmanager
def separated(model: nn.Module, plan: Callable[[], list[Step]]) -> Iterator[Separated]:
    """Separate the projections of attention modules for a verb, and make its plan.

    Args:
        model: the model that the verb changes.
        plan: makes the plan. It is called again if its first result left attention modules as they
            are, which then have their original modules back.

    If the block raises, modules in which no layer was changed are the original objects.

    Example:
        >>> from torchquant.convert.plan import find_layers
        >>> model = nn.TransformerEncoderLayer(64, 2)
        >>> with separated(model, lambda: find_layers(model)) as found:
        ...     [step.name for step in found.plan][:2]
        ['self_attn.q_proj', 'self_attn.k_proj']
    """
    found = Separated(_places=_separate(model))
    try:
        found.plan = plan()
        if found._places:
            chosen = {id(step.module) for step in found.plan if step.skip is None}
            unused = [
                place
                for place in found._places
                if not any(id(layer) in chosen for layer in place.layers())
            ]
            for place in unused:
                place.restore()
                found._places.remove(place)
            if unused:
                found.plan = plan()
        yield found
    finally:
        for place in found._places:
            if not place.is_used():
                place.restore()


def separate(model: nn.Module, names: Iterable[str]) -> None:
    """Separate the projections of the named attention modules, as a file of the model says.

    Raises:
        ValueError: the model has no such module, or it is no attention module.

    Example:
        >>> model = nn.TransformerEncoderLayer(8, 2)
        >>> separate(model, ["self_attn"])
        >>> type(model.self_attn).__name__
        'MultiheadAttention'
    """
    names = [*names]
    owners = owners_by_module(model)
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the model has no attention module {name!r}") from None
        if isinstance(module, MultiheadAttention):
            continue
        reason = attention_refusal(module)
        if reason is not None:
            raise ValueError(f"{name} must be an attention module, but {reason}")
        assert isinstance(module, nn.MultiheadAttention)
        _replace(owners[id(module)], module)


def join_attention(model: nn.Module) -> list[str]:
    """Put ``nn.MultiheadAttention`` back where its projections are float; return the names.

    Example:
        >>> model = nn.TransformerEncoderLayer(8, 2)
        >>> separate(model, ["self_attn"])
        >>> join_attention(model)
        ['self_attn']
    """
    owners = owners_by_module(model)
    names = []
    for name, module in [*model.named_modules()]:
        plain = isinstance(module, MultiheadAttention) and all(
            type(layer) is nn.Linear for layer in module.children()
        )
        if plain and module.was_separated and id(module) in owners:
            _join(owners[id(module)], module)
            names.append(name)
    return names


def _separate(model: nn.Module) -> list[_Place]:
    attentions = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and attention_refusal(module) is None
    ]
    if not attentions:
        return []
    owners, held, names = owners_by_module(model), held_modules(model), names_in_code(model)
    places = []
    for name, module in attentions:
        parents = owners.get(id(module), [])
        read = any(not _READ.isdisjoint(names[id(parent)]) for parent, _ in parents)
        if parents and not read and id(module) not in held and id(module.out_proj) not in held:
            places.append(_Place(name, _replace(parents, module), parents, module))
    first: dict[Hashable, nn.Parameter] = {}
    for new in (place.new for place in places):
        for layer in (new.q_proj, new.k_proj, new.v_proj):
            for key, parameter in layer._parameters.items():
                if parameter is not None:  # parts of a parameter of several modules stay tied
                    layer._parameters[key] = first.setdefault(memory_key(parameter), parameter)
    return places


def _replace(owners: list[tuple[nn.Module, str]], old: nn.MultiheadAttention) -> MultiheadAttention:
    new = MultiheadAttention.from_float(old)
    new.was_separated = True
    replace_module([], old.out_proj, new.out_proj)  # its hooks
    replace_module(owners, old, new)
    return new


def _join(owners: list[tuple[nn.Module, str]], old: MultiheadAttention) -> None:
    new = old.to_float()
    replace_module([], old.out_proj, new.out_proj)  # its hooks
    replace_module(owners, old, new)


__all__ = ["Separated", "join_attention", "separate", "separated"]
