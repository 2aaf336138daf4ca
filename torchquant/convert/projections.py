"""Groups quantized layers that are applied to the same tensor.

Which layers a method calls on one variable is read from bytecode
(:mod:`torchquant.graph.neighbours`). A group is only an offer:
:class:`torchquant.nn.projections.ProjectionGroup` decides in each call whether it may be used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from torchquant.graph.modules import owners_by_module
from torchquant.graph.neighbours import neighbours
from torchquant.nn.base import QuantizedModule
from torchquant.report import FusionReport

Members = tuple[QuantizedModule, ...]


def group_projections(
    model: nn.Module, layers: Iterable[QuantizedModule], names: Mapping[int, str]
) -> Iterator[FusionReport]:
    """Group the layers that can be computed together.

    Args:
        model: the model.
        layers: quantized layers of the model.
        names: the name of each module in the model, by id.

    Yields:
        One report per group, and one per set of layers that cannot be grouped.
    """
    taken: set[int] = set()
    owners = owners_by_module(model)
    for members in _candidates(model, layers):
        if any(id(member) in taken for member in members):
            continue
        taken.update(map(id, members))
        problem = _obstacle(members, owners)
        if problem is None:
            _form(members)
        action, reason = ("fused", "one product") if problem is None else ("not fused", problem)
        called = tuple(names.get(id(member), "?") for member in members)
        yield FusionReport("projections", called, "", action, reason)  # type: ignore[arg-type]


def group_again(model: nn.Module, groups: Iterable[Sequence[str]]) -> None:
    """Form the groups of a saved model again, as far as the methods of this model permit them."""
    modules = dict(model.named_modules())
    wanted = [tuple(modules.get(name) for name in group) for group in groups]
    layers = [m for group in wanted for m in group if isinstance(m, QuantizedModule)]
    owners = owners_by_module(model)
    for members in _candidates(model, layers):
        free = all(member._group is None for member in members)
        if members in wanted and free and _obstacle(members, owners) is None:
            _form(members)


def groups_of(model: nn.Module) -> list[list[str]]:
    """The names of the layers of each group, in the order of their calls."""
    groups: dict[int, dict[int, str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule) and module._group is not None:
            groups.setdefault(id(module._group), {})[module._group_index] = name
    return [[names[index] for index in sorted(names)] for names in groups.values()]


def _form(members: Members) -> None:
    group = members[0].group_type(len(members))
    for index, member in enumerate(members):
        group.join(index, member)


def _candidates(model: nn.Module, layers: Iterable[QuantizedModule]) -> list[Members]:
    """Layers that a method calls on one variable, in the order of calls; largest sets first."""
    wanted = {id(layer) for layer in layers}
    found: dict[tuple[int, ...], Members] = {}
    for calls in neighbours(model):
        members: list[QuantizedModule] = []
        for module in calls.chain:
            if not isinstance(module, QuantizedModule) or id(module) not in wanted:
                break
            members.append(module)
        if len(members) > 1:
            found.setdefault(tuple(map(id, members)), tuple(members))
    return sorted(found.values(), key=len, reverse=True)


def _obstacle(members: Members, owners: dict[int, list[tuple[nn.Module, str]]]) -> str | None:
    """The reason why layers cannot be grouped, or None."""
    if len({id(member) for member in members}) < len(members):
        return "a layer is called twice on the tensor"
    types = {member.group_type for member in members}
    if len(types) != 1 or None in types:
        return "layers of these kinds cannot be computed together"
    if any(len(owners.get(id(member), ())) != 1 for member in members):
        return "a layer is registered in more than one place"
    problem: str | None = members[0].group_type.obstacle(members)
    return problem
