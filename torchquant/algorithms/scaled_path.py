"""Does the code of a model show that scaled channels reach one layer, and nothing else?

A layer whose output channels are scaled, and a layer that undoes it, must be connected on all
branches of all methods, through steps that keep the scale of a channel. The elements of a
Sequential count as links of a chain, which nobody calls alone; a module with a name of its own may
be called alone, so its input and its output keep their values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from torchquant.graph.flow import Flow
from torchquant.graph.flow_values import Argument, At, Attribute, CallOf, Named, Result, Thing
from torchquant.graph.places import places_at
from torchquant.graph.ways import QUESTIONS, CallPlace, Ways, is_exact, readers_of

_DATA = (Result, Argument, Attribute)


class _Link(NamedTuple):
    """What a module of a Sequential returns; position -1 is the input of the Sequential."""

    chain: nn.Module
    position: int


class _In(NamedTuple):
    """A value in a method of a module."""

    owner: nn.Module
    where: str
    flow: Flow
    thing: Thing


class ScaledPath:
    """Follows values from one layer to another one.

    Args:
        ways: the places in the code that call the two.
        first: the layer whose channels are scaled.
        second: the layer that undoes it.
        passes: takes a module, or the name of a function or of a method; True if it keeps scales.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> ways = Ways(net, [net[0], net[2]])
        >>> ScaledPath(ways, net[0], net[2], lambda step: isinstance(step, nn.ReLU)).problem()
        ''
    """

    def __init__(
        self,
        ways: Ways,
        first: nn.Module,
        second: nn.Module,
        passes: Callable[[nn.Module | str], bool],
    ) -> None:
        self.ways, self.first, self.second, self.passes = ways, first, second, passes
        self.seen: set[tuple[int, object]] = set()

    def problem(self) -> str:
        """Why the scaled values may go elsewhere; or empty."""
        for module in (self.first, self.second):
            if id(module) in self.ways.problems:
                before = "" if module is self.first else f"before {self._name(module)}: "
                return before + self.ways.problems[id(module)]
            if not self.ways.calls[id(module)] and not self.ways.of_library(module):
                return "no code of the model is found that calls it"
        for call in self.ways.calls[id(self.first)]:
            start = _value(call)
            if start is None:
                return f"{call.where} calls it in turn with other modules"
            problem = self._after(start)
            if problem:
                return problem
        self.seen.clear()
        for call in self.ways.calls[id(self.second)]:
            start = _input(call)
            problem = (
                f"{call.where} calls {self._name(self.second)} in turn with other modules"
                if start is None
                else self._before(start)
            )
            if problem:
                return problem
        return ""

    # ------------------------------------------------------------ onward

    def _after(self, value: _Link | _In) -> str:
        """Why a scaled value may reach something else than the second layer."""
        if isinstance(value, _Link):
            chain = self.ways.chain(value.chain)
            if value.position + 1 == len(chain):
                link = self._element(value.chain)
                return (
                    self._after(link) if link else f"{self._name(value.chain)} returns its output"
                )
            return self._into(chain[value.position + 1], _Link(value.chain, value.position + 1))
        key = (id(value.owner), value.thing)
        if key in self.seen:
            return ""
        self.seen.add(key)
        for thing, how, site in readers_of(value.flow, value.thing):
            problem = f"{value.where} {how} its output"
            if isinstance(thing, Attribute) and thing.name in QUESTIONS:
                continue
            if site is not None:
                found = self._called(value, value.flow.calls[site], thing)
                if found == "":
                    continue
                if isinstance(found, str):
                    return problem if found == "?" else found
                after = _In(value.owner, value.where, value.flow, Result(site))
                problem = self._after(after) if found is self.first else self._into(found, after)
            elif how == "returns" and value.where.endswith(".forward"):
                link = self._element(value.owner)
                if link is not None:
                    problem = self._after(link)
            if problem:
                return problem
        return ""

    def _called(self, value: _In, call: CallOf, thing: Thing) -> nn.Module | str:
        """The module that gets a value; empty for a question; "?" for what may do anything.

        For a function that keeps scales, it is the first layer itself.
        """
        others = [t for a in call.arguments[1:] for t in a] + [*call.others]
        if len(call.callee) != 1 or any(isinstance(t, _DATA) for t in others):
            return "?"
        (callee,) = call.callee
        if isinstance(callee, Attribute) and callee == thing:
            return self.first if self.passes(callee.name) else "?"
        if isinstance(thing, Attribute) or call.arguments[0] != {thing}:
            return "?"
        if isinstance(callee, Named):
            return self.first if self.passes(callee.name) else "?"
        module = _module(value.owner, callee)
        return "?" if module is None else module

    def _into(self, module: nn.Module, after: _Link | _In) -> str:
        """A module gets a scaled value; ``after`` is what it returns."""
        if module is self.second:
            return ""
        if self.passes(module):
            return self._after(after)
        if isinstance(after, _Link):
            inner = self._start(module)
            if inner is not None:
                return self._after(inner)
        return f"{self._name(module)} reads its output"

    def _start(self, module: nn.Module) -> _Link | _In | None:
        """The input of a module, as its forward sees it."""
        if type(module).forward is nn.Sequential.forward and not self.ways.of_library(module):
            return _Link(module, -1)
        flow = self.ways.forward_flow(module)
        where = f"{type(module).__name__}.forward"
        return None if flow is None else _In(module, where, flow, Argument(0))

    def _element(self, module: nn.Module) -> _Link | None:
        """The link of a Sequential that a module is, if it is nothing else."""
        owners = self.ways.owners.get(id(module), [])
        if len(owners) != 1 or type(owners[0][0]).forward is not nn.Sequential.forward:
            return None
        chain = self.ways.chain(owners[0][0])
        return _Link(owners[0][0], next(i for i, one in enumerate(chain) if one is module))

    # ------------------------------------------------------------ back

    def _before(self, value: _Link | _In) -> str:
        """Why a value may come from something else than the first layer."""
        name = self._name(self.second)
        if isinstance(value, _Link):
            if value.position < 0:
                link = self._element(value.chain)
                if link is None:
                    return f"{name} gets the input of {self._name(value.chain)}"
                return self._before(_Link(link.chain, link.position - 1))
            return self._from(self.ways.chain(value.chain)[value.position], value)
        key = (id(value.owner), value.thing)
        if key in self.seen:
            return ""
        self.seen.add(key)
        if isinstance(value.thing, Argument):
            link = self._element(value.owner) if value.where.endswith(".forward") else None
            if link is None or value.thing.place:
                return f"{value.where} gives {name} its argument"
            return self._before(_Link(link.chain, link.position - 1))
        problem = f"{value.where} gives {name} other values, too"
        if not isinstance(value.thing, Result) or value.thing.age != "new":
            return problem
        call = value.flow.calls[value.thing.site]
        if len(call.callee) != 1:
            return problem
        (callee,) = call.callee
        inputs = call.arguments[0] if call.arguments else set()
        if isinstance(callee, Attribute):
            return self._all(value, {callee.of}) if self.passes(callee.name) else problem
        if isinstance(callee, Named):
            return self._all(value, inputs) if self.passes(callee.name) else problem
        module = _module(value.owner, callee)
        if module is self.first:
            return ""
        if module is None or not self.passes(module):
            return problem
        return self._all(value, inputs)

    def _all(self, near: _In, things: set[Thing] | set[Result | Argument]) -> str:
        for thing in things:
            problem = self._before(near._replace(thing=thing))
            if problem:
                return problem
        return "" if things else "its input is unknown"

    def _from(self, module: nn.Module, value: _Link) -> str:
        """A module of a Sequential gave a value."""
        if module is self.first:
            return ""
        if self.passes(module):
            return self._before(_Link(value.chain, value.position - 1))
        if type(module).forward is nn.Sequential.forward and not self.ways.of_library(module):
            return self._before(_Link(module, len(self.ways.chain(module)) - 1))
        flow = self.ways.forward_flow(module)
        if flow is None:
            return f"{self._name(module)} gives {self._name(self.second)} other values"
        where = f"{type(module).__name__}.forward"
        returned = {use.thing for use in flow.uses if use.how == "returns"}
        return self._all(_In(module, where, flow, Argument(0)), returned)

    def _name(self, module: nn.Module) -> str:
        return self.ways.names.get(id(module)) or "the model"


def _module(owner: nn.Module, thing: Thing) -> nn.Module | None:
    if not isinstance(thing, At) or thing.part:
        return None
    places = places_at(owner, thing.path)
    return places[0].module if len(places) == 1 and not places[0].rest else None


def _value(call: CallPlace) -> _Link | _In | None:
    """What a call returns; None if it calls other modules, too."""
    if call.flow is None or call.site is None:
        return _Link(call.owner, call.position)
    if not is_exact(call) or (call.place is not None and call.place.positions):
        return None
    return _In(call.owner, call.where, call.flow, Result(call.site))


def _input(call: CallPlace) -> _Link | _In | None:
    """What a call gets; None if that is not one value."""
    if call.flow is None or call.site is None:
        return _Link(call.owner, call.position - 1)
    found = call.flow.calls[call.site]
    alone = len(found.arguments) == 1 and found.counts == {1} and not found.others
    if not is_exact(call) or not alone or len(found.arguments[0]) != 1:
        return None
    (thing,) = found.arguments[0]
    return _In(call.owner, call.where, call.flow, thing)


__all__ = ["ScaledPath"]
