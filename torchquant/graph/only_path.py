"""Does the code of a model show that one module alone reads the output of another one?"""

from __future__ import annotations

from torch import nn

from torchquant.graph.flow_values import At, Attribute, Each, Result, Thing
from torchquant.graph.places import Place, places_at
from torchquant.graph.ways import QUESTIONS, CallPlace, Ways, is_exact, readers


def path_problem(ways: Ways, first: nn.Module, second: nn.Module) -> str:
    """Why another path may exist than from one module to the other; or empty.

    All calls of ``first`` in the code must give their result to ``second`` alone, and all calls of
    ``second`` must take such a result and nothing else. A module of a library that no other code
    calls is left to the record of its forward.

    Args:
        ways: the places in the code that use the two.
        first: the module whose output is meant.
        second: the module that shall be its only reader.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        >>> path_problem(Ways(net, [*net]), net[0], net[1])
        ''
        >>> path_problem(Ways(net, [*net]), net[1], net[0])
        'Sequential.forward returns the output of the BatchNorm2d'
    """
    for module in (first, second):
        if id(module) in ways.problems:
            return ways.problems[id(module)]
    for call in ways.calls[id(first)]:
        problem = _after(ways, call, first, second)
        if problem:
            return problem
    for call in ways.calls[id(second)]:
        problem = _before(ways, call, first, second)
        if problem:
            return problem
    if not ways.calls[id(first)] and not ways.of_library(first):
        return f"no code of the model is found that calls the {type(first).__name__}"
    return ""


def _after(ways: Ways, call: CallPlace, first: nn.Module, second: nn.Module) -> str:
    """Why the result of a call of ``first`` may go elsewhere than to ``second``."""
    output = f"the output of the {type(first).__name__}"
    if call.flow is None or call.site is None:
        chain = ways.chain(call.owner)
        if call.position + 1 < len(chain):
            after = chain[call.position + 1]
            return "" if after is second else f"{type(after).__name__} reads {output}"
        return f"{call.where} returns {output}"
    if not is_exact(call):
        return f"{call.where} calls the {type(first).__name__} in turn with other modules"
    in_turn = _next_in_loop(call)
    for thing, how, site in readers(call.flow, call.site):
        if isinstance(thing, Attribute) and thing.name in QUESTIONS:
            continue
        if site == call.site and isinstance(thing, Result) and thing.age == "next":
            if in_turn is second:
                continue
        elif isinstance(thing, Result) and thing.age == "last" and in_turn is second:
            continue
        elif site is not None and isinstance(thing, Result) and thing.age == "new":
            other = call.flow.calls[site]
            alone = other.arguments == [{thing}] and not other.others and other.counts == {1}
            if alone and _calls(call, other.callee, second):
                continue
        return f"{call.where} {how} {output}"
    return ""


def _before(ways: Ways, call: CallPlace, first: nn.Module, second: nn.Module) -> str:
    """Why a call of ``second`` may get something else than the output of ``first``."""
    name = type(second).__name__
    elsewhere = f"{call.where} calls the {name} on other values, too"
    if call.flow is None or call.site is None:
        before = ways.chain(call.owner)[call.position - 1] if call.position else None
        return "" if before is first else elsewhere
    if not is_exact(call):
        return f"{call.where} calls the {name} in turn with other modules"
    found = call.flow.calls[call.site]
    if len(found.arguments) != 1 or found.others or found.counts != {1}:
        return elsewhere
    if _previous_in_loop(call) is first:
        outside = [thing for thing in found.arguments[0] if not _is_next(thing, call)]
        return "" if len(outside) < len(found.arguments[0]) else elsewhere
    for thing in found.arguments[0]:
        if not isinstance(thing, Result) or thing.age != "new":
            return elsewhere
        if not _calls(call, call.flow.calls[thing.site].callee, first):
            return elsewhere
    return ""


def _is_next(thing: Thing, call: CallPlace) -> bool:
    return isinstance(thing, Result) and thing.site == call.site and thing.age == "next"


def _calls(near: CallPlace, callee: set[Thing], module: nn.Module) -> bool:
    """True if a call in the same method, in the same runs through its loops, calls a module."""
    if len(callee) != 1 or near.place is None:
        return False
    (thing,) = callee
    if not isinstance(thing, At) or thing.part:
        return False
    loops = set(near.place.positions)
    if any(isinstance(step, Each) and step.loop not in loops for step in thing.path):
        return False
    places = [p for p in places_at(near.owner, thing.path) if _agree(p, near.place)]
    return len(places) == 1 and places[0].module is module and not places[0].rest


def _agree(place: Place, other: Place) -> bool:
    return all(other.positions.get(loop) == at for loop, at in place.positions.items())


def _neighbour_in_loop(call: CallPlace, step: int) -> nn.Module | None:
    """The element that ``for layer in layers: x = layer(x)`` calls before or after this one."""
    assert call.flow is not None and call.site is not None and call.place is not None
    last = call.path[-1] if call.path and call.site in call.flow.in_turn else None
    if not isinstance(last, Each) or not last.whole or last.loop <= 0:
        return None
    if any(isinstance(one, Each) for one in call.path[:-1]):
        return None
    containers = places_at(call.owner, call.path[:-1])
    elements = [place.module for place in places_at(call.owner, call.path)]
    position = call.place.positions[last.loop] + step
    if len(containers) != 1 or not 0 <= position < len(elements):
        return None
    return elements[position]


def _next_in_loop(call: CallPlace) -> nn.Module | None:
    return _neighbour_in_loop(call, 1)


def _previous_in_loop(call: CallPlace) -> nn.Module | None:
    return _neighbour_in_loop(call, -1)


__all__ = ["path_problem"]
