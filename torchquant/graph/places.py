"""Which modules a path of attributes leads to, in a given model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchquant.graph.flow_values import Below, Each, Item, Step


@dataclass(frozen=True)
class Place:
    """What a path leads to.

    Args:
        module: the last module on the path.
        rest: the attributes of this module that the path goes on with; they are no modules.
        positions: for each loop, the position of the element that the path goes through.
    """

    module: nn.Module
    rest: tuple[Step, ...] = ()
    positions: Mapping[int, int] = field(default_factory=dict)


def places_at(owner: nn.Module, path: Iterable[Step]) -> list[Place]:
    """The places that a path may lead to; no code of the user runs.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> places_at(net, (Item(0), "weight"))[0].rest
        ('weight',)
    """
    found: list[tuple[Any, Place]] = [(owner, Place(owner))]
    for step in path:
        found = [after for value, place in found for after in _next(value, place, step)]
    return [place for value, place in found if place.rest or isinstance(value, nn.Module)]


def is_present(owner: nn.Module, path: tuple[Step, ...]) -> bool | None:
    """True if there is a module at a path, False if its place is empty, None if that is unknown.

    Example:
        >>> net = nn.Linear(2, 2, bias=False)
        >>> net.register_module("act", None)
        >>> is_present(net, ("act",)), is_present(net, ("bias",))
        (False, None)
    """
    if not path or not all(isinstance(step, (str, Item)) for step in path):
        return None
    places = places_at(owner, path)
    if len(places) == 1 and not places[0].rest:
        kind = type(places[0].module)
        return True if not hasattr(kind, "__len__") and not hasattr(kind, "__bool__") else None
    before = places_at(owner, path[:-1])
    if len(before) != 1 or before[0].rest:
        return None
    last = path[-1]
    name = str(last.key) if isinstance(last, Item) else str(last)
    modules = before[0].module._modules
    return False if name in modules and modules[name] is None else None


def _next(value: Any, place: Place, step: Step) -> list[tuple[Any, Place]]:
    if place.rest:
        return [(None, Place(place.module, (*place.rest, step), place.positions))]
    if isinstance(step, Below):
        below = value.modules() if isinstance(value, nn.Module) else ()
        return [(module, Place(module, (), place.positions)) for module in below]
    if isinstance(step, Each):
        children = [*enumerate(_children(value))]
        known = step.loop > 0
        return [
            _at(child, place, {**place.positions, step.loop: at} if known else place.positions)
            for at, child in children
        ]
    child = _child(value, step)
    if child is not None:
        return [_at(child, place, place.positions)]
    if not isinstance(value, nn.Module):
        return []
    return [(None, Place(place.module, (step,), place.positions))]


def _at(child: Any, place: Place, positions: Mapping[int, int]) -> tuple[Any, Place]:
    module = child if isinstance(child, nn.Module) else place.module
    return child, Place(module, (), positions)


def _children(value: Any) -> list[Any]:
    if isinstance(value, torch.jit.ScriptModule):
        return []
    if isinstance(value, nn.Module):
        return [child for child in value._modules.values() if child is not None]
    if type(value) is dict:
        return [*value.values()]
    return [*value] if type(value) in (list, tuple) else []


def _child(value: Any, step: Step) -> Any:
    """The module or the container of modules at a step, or None."""
    if isinstance(value, torch.jit.ScriptModule):
        return None
    if isinstance(step, str):
        if not isinstance(value, nn.Module):
            return None
        found = value._modules.get(step)
        found = value.__dict__.get(step) if found is None else found
        held = isinstance(found, nn.Module) or type(found) in (list, tuple, dict)
        return found if held else None
    assert isinstance(step, Item)
    if isinstance(value, nn.Module):
        found = value._modules.get(str(step.key))
        if found is None and isinstance(step.key, int):
            children = _children(value)
            found = children[step.key] if -len(children) <= step.key < len(children) else None
        return found
    if type(value) is dict:
        return value.get(step.key)
    if type(value) in (list, tuple) and isinstance(step.key, int):
        return value[step.key] if -len(value) <= step.key < len(value) else None
    return None


__all__ = ["Place", "is_present", "places_at"]
