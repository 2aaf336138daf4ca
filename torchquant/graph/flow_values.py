"""What a value in a function may be: a module, the result of a call, or something else.

A value stands for a set of things (``Value``), because different branches may assign a variable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import NamedTuple, TypeAlias

Value: TypeAlias = "frozenset[Thing]"


class Item(NamedTuple):
    """A step of a path: the element of a container with a known key."""

    key: int | str


class Each(NamedTuple):
    """A step of a path: some element of a container.

    In one run through a loop, two paths with the same ``loop`` mean the same position. It is 0
    before a loop takes elements, and -1 if nothing is known about the position. ``whole`` says
    that the loop goes through all elements in their order.
    """

    loop: int = 0
    whole: bool = True


class Below(NamedTuple):
    """A step of a path: some module below, at any depth, or the module itself."""


Step: TypeAlias = "str | Item | Each | Below"


@dataclass(frozen=True)
class At:
    """What is found on a path of attributes that starts at the owner of the method.

    Args:
        path: the steps of the path.
        part: "start" for a slice of the container there that begins with its first element, "other"
            for another slice; or empty.
    """

    path: tuple[Step, ...]
    part: str = ""


@dataclass(frozen=True)
class Result:
    """What a call returned.

    Args:
        site: the offset of the call in its function, and the function.
        age: "new"; "next" in the run through the loop after the one that called; "last" after the
            loop; "old" in all later runs.
    """

    site: Site
    age: str = "new"


@dataclass(frozen=True)
class Attribute:
    """An attribute of the result of a call, or a method of it."""

    of: Result | Argument
    name: str


@dataclass(frozen=True)
class Argument:
    """An argument of the method; ``place`` 0 is the first one after the owner."""

    place: int


@dataclass(frozen=True)
class Named:
    """A global variable, or an attribute of something that is not followed."""

    name: str


@dataclass(frozen=True)
class Constant:
    """An integer, a text or None."""

    value: int | str | None


@dataclass(frozen=True)
class Index:
    """The position of the elements of a loop; ``loop`` as in :class:`Each`."""

    loop: int = 0


@dataclass(frozen=True)
class Many:
    """Something to iterate over: each element is one of ``elements``."""

    elements: Value


@dataclass(frozen=True)
class Row:
    """A tuple with known parts."""

    parts: tuple[Value, ...]


@dataclass(frozen=True)
class IsNone:
    """The answer to ``path is None``, or to the contrary."""

    path: tuple[Step, ...]
    answer: bool


@dataclass(frozen=True)
class Local:
    """A function that the method defines; compared by its code object."""

    code: CodeType


@dataclass(frozen=True)
class Swallows:
    """The answer to whether a ``with`` statement hides an exception, which counts as no."""


@dataclass(frozen=True)
class Null:
    """An empty slot of the stack."""


@dataclass(frozen=True)
class Unknown:
    """Something that is not followed, and that is no module of the owner."""


Thing: TypeAlias = (
    "At | Result | Attribute | Argument | Named | Constant | Index | Many | Row | IsNone | Local |"
    " Swallows | Null | Unknown"
)
OTHER: Value = frozenset([Unknown()])
NULL: Value = frozenset([Null()])


@dataclass(frozen=True)
class Site:
    """A call in a function: the function's code (by identity) and the offset."""

    code_id: int
    offset: int


@dataclass
class CallOf:
    """What a call calls, and with what; sets grow while the function is read.

    Attributes:
        callee: what is called.
        arguments: the positional arguments.
        others: all other arguments.
    """

    callee: set[Thing] = field(default_factory=set)
    arguments: list[set[Thing]] = field(default_factory=list)
    others: set[Thing] = field(default_factory=set)
    counts: set[int] = field(default_factory=set)


class Use(NamedTuple):
    """Something that a function does with a thing other than a call.

    Args:
        thing: the thing.
        how: what happens to it, as a verb: "returns".
    """

    thing: Thing
    how: str


def parts_of(value: Iterable[Thing]) -> Iterator[Thing]:
    """The things of a value, and those inside of tuples and iterables.

    Example:
        >>> list(parts_of([Row((frozenset([Constant(1)]),))]))
        [Constant(value=1)]
    """
    for thing in value:
        if isinstance(thing, Many):
            yield from parts_of(thing.elements)
        elif isinstance(thing, Row):
            for part in thing.parts:
                yield from parts_of(part)
        else:
            yield thing


def elements_of(value: Value, loop: int) -> Value:
    """What a loop takes from a value.

    Example:
        >>> elements_of(frozenset([At(("layers",))]), 8)
        frozenset({At(path=('layers', Each(loop=8, whole=True)), part='')})
    """
    found: set[Thing] = set()
    for thing in value:
        if isinstance(thing, At):
            known = thing.part != "other"
            found.add(At((*thing.path, Each(loop if known else -1, not thing.part))))
        elif isinstance(thing, Many):
            found |= {_marked(element, loop) for element in thing.elements}
        elif isinstance(thing, Row):
            found |= {element for part in thing.parts for element in part}
        elif isinstance(thing, (Result, Attribute, Argument)):
            found.add(thing)  # it is used, which the caller notes
        else:
            found |= OTHER
    return frozenset(found)


def _marked(thing: Thing, loop: int) -> Thing:
    """A thing whose open positions are those of a loop."""
    if isinstance(thing, At):
        steps = (
            step._replace(loop=loop) if isinstance(step, Each) and step.loop == 0 else step
            for step in thing.path
        )
        return replace(thing, path=tuple(steps))
    if isinstance(thing, Index):
        return Index(loop) if thing.loop == 0 else thing
    if isinstance(thing, Row):
        return Row(tuple(frozenset(_marked(one, loop) for one in part) for part in thing.parts))
    return thing


def not_whole(value: Value) -> Value:
    """Elements that a loop may leave out, as ``zip`` does at the end of the shortest."""
    found: set[Thing] = set()
    for thing in value:
        if isinstance(thing, At):
            steps = (s._replace(whole=False) if isinstance(s, Each) else s for s in thing.path)
            found.add(replace(thing, path=tuple(steps)))
        elif isinstance(thing, Row):
            found.add(Row(tuple(not_whole(part) for part in thing.parts)))
        else:
            found.add(thing)
    return frozenset(found)


def aged(value: Value, loop: int, in_loop: Callable[[Site], bool], done: bool) -> Value:
    """What a value is when a loop goes on to its next element, or is done.

    Args:
        value: the value before.
        loop: the loop.
        in_loop: takes a call; True if it calls an element of this loop.
        done: True if the loop is done.
    """
    return frozenset(_older(thing, loop, in_loop, done) for thing in value)


def _older(thing: Thing, loop: int, in_loop: Callable[[Site], bool], done: bool) -> Thing:
    if isinstance(thing, At):
        steps = (
            Each(-1) if isinstance(step, Each) and step.loop == loop else step
            for step in thing.path
        )
        return replace(thing, path=tuple(steps))
    if isinstance(thing, Index):
        return Index(-1) if thing.loop == loop else thing
    if isinstance(thing, Result):
        if not in_loop(thing.site):
            return thing
        if done:
            return replace(thing, age="last" if thing.age == "new" else "old")
        return replace(thing, age="next" if thing.age == "new" else "old")
    if isinstance(thing, Attribute):
        of = _older(thing.of, loop, in_loop, done)
        assert isinstance(of, (Result, Argument))
        return replace(thing, of=of)
    if isinstance(thing, Many):
        return Many(aged(thing.elements, loop, in_loop, done))
    if isinstance(thing, Row):
        return Row(tuple(aged(part, loop, in_loop, done) for part in thing.parts))
    return thing
