"""Attributes, elements and slices of what a function follows, and the loops over them."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterable

from torchquant.graph.flow_values import (
    NULL,
    OTHER,
    Argument,
    At,
    Attribute,
    Below,
    Constant,
    Each,
    Index,
    Item,
    Local,
    Many,
    Named,
    Result,
    Row,
    Step,
    Thing,
    Value,
    elements_of,
    not_whole,
)

ASKS = "asks about"
_VERSION = sys.version_info[:2]
_LONGEST = 8  # steps of a path
# Methods of modules and of containers whose results are the modules in them.
_VIEWS: dict[str, Step] = {
    "children": Each(),
    "values": Each(),
    "items": Each(),
    "named_children": Each(),
    "modules": Below(),
    "named_modules": Below(),
}
FOLLOWED = (Result, Attribute, Argument)  # tensors
_IN_PAIRS = ("items", "named_children", "named_modules")
_ITERATING = ("iter", "list", "tuple", "sorted", "set", "reversed", "enumerate", "zip", "range")


class Elements:
    """The stack, and the instructions that lead from a value to what is in it.

    Example:
        >>> machine = Elements()
        >>> machine.stack
        []
    """

    def __init__(self) -> None:
        self.stack: list[Value] = []

    def use(self, value: Iterable[Thing], how: str) -> None:
        """Something is done with a value that is no call of it; a class below notes it."""

    def iterate(self, callee: Value, arguments: list[Value]) -> None:
        """Note the results that a function such as ``zip`` iterates over."""
        if any(isinstance(t, Named) and t.name in _ITERATING for t in callee):
            things = [t for value in arguments for t in value]
            self.use([t for t in things if isinstance(t, FOLLOWED)], "iterates over")

    def ask(self, value: Value, how: str) -> None:
        """Note a question about a value; what a module is does not change."""
        self.use([t for t in value if not isinstance(t, At)], how)
        self.use([t for t in value if isinstance(t, At)], ASKS)

    def push(self, *values: Value) -> None:
        self.stack += values

    def pop(self) -> Value:
        return self.stack.pop() if self.stack else OTHER

    def take(self, count: int) -> list[Value]:
        """The last values of the stack, the first of them first."""
        return [self.pop() for _ in range(count)][::-1]

    def taken(self, iterator: Value, loop: int) -> Value:
        """What a loop takes from an iterator."""
        seen = [t for t in iterator if isinstance(t, FOLLOWED)]
        self.use(seen, "iterates over")
        return elements_of(iterator, loop)

    def _null_around(self, argument: int, possible: bool, *things: Thing) -> None:
        null = possible and argument & 1
        if null and _VERSION < (3, 13):
            self.push(NULL)
        self.push(frozenset(things))
        if null and _VERSION >= (3, 13):
            self.push(NULL)

    # Attributes and elements

    def _on_load_attr(self, instruction: dis.Instruction) -> None:
        things = self._attribute(self.pop(), str(instruction.argval))
        self._null_around(instruction.arg or 0, _VERSION >= (3, 12), *things)

    def _on_load_method(self, instruction: dis.Instruction) -> None:
        self._null_around(1, True, *self._attribute(self.pop(), str(instruction.argval)))

    def _on_load_super_attr(self, instruction: dis.Instruction) -> None:
        self.take(3)
        self._null_around(instruction.arg or 0, True, Named(str(instruction.argval)))

    def _attribute(self, value: Value, name: str) -> set[Thing]:
        found: set[Thing] = set()
        for thing in value:
            if isinstance(thing, At) and not thing.part and len(thing.path) < _LONGEST:
                found.add(thing if name == "_modules" else At((*thing.path, name)))
            elif isinstance(thing, (Result, Argument)):
                found.add(Attribute(thing, name))
            else:
                if not isinstance(thing, Local):
                    self.use([thing], f"reads {name} of")
                found.add(Named(name))
        return found

    def _on_store_attr(self, instruction: dis.Instruction) -> None:
        value, base = self.take(2)
        name = str(instruction.argval)
        self.use(value, f"stores as {name}")
        self.use([At((*t.path, name)) if isinstance(t, At) else t for t in base], "sets")

    def _on_store_subscr(self, instruction: dis.Instruction) -> None:
        value, base, key = self.take(3)
        self.use(value, "stores")
        self.use(base, "changes an element of")
        self.use(key, "uses as a key")

    def _on_binary_subscr(self, instruction: dis.Instruction) -> None:
        base, key = self.take(2)
        self.push(self._element(base, key))

    def _on_binary_slice(self, instruction: dis.Instruction) -> None:
        base, start, end = self.take(3)
        self.use([*start, *end], "uses as a key")
        self.push(self._slice(base, start))

    def _on_build_slice(self, instruction: dis.Instruction) -> None:
        parts = self.take(instruction.arg or 2)
        self.push(frozenset([Row((frozenset([Named("slice")]), *parts))]))

    def _slice(self, base: Value, start: Value) -> Value:
        """A slice; its elements have known positions if it begins at the first."""
        found: set[Thing] = set()
        first = start <= {Constant(None), Constant(0)}
        for thing in base:
            if isinstance(thing, At):
                found.add(At(thing.path, "start" if first and thing.part != "other" else "other"))
            elif isinstance(thing, (Many, Row)):
                found.add(Many(elements_of(frozenset([thing]), -1)))
            else:
                self.use([thing], "takes a part of")
                found |= OTHER
        return frozenset(found)

    def _element(self, base: Value, key: Value) -> Value:
        row = next((t for t in key if isinstance(t, Row)), None)
        if row is not None and row.parts[0] == frozenset([Named("slice")]):
            return self._slice(base, row.parts[1])
        single = next(iter(key)) if len(key) == 1 else None
        found: set[Thing] = set()
        for thing in base:
            if isinstance(thing, At) and not thing.part and len(thing.path) < _LONGEST:
                found.add(At((*thing.path, _step(single))))
            elif isinstance(thing, Row) and isinstance(single, Constant):
                at = single.value
                if isinstance(at, int) and -len(thing.parts) <= at < len(thing.parts):
                    found |= thing.parts[at]
                else:
                    found |= elements_of(base, -1)
            elif isinstance(thing, (Many, Row, At)):
                found |= elements_of(frozenset([thing]), -1)
            else:
                self.use([thing], "takes an element of")
                found |= OTHER
        self.use([t for t in key if not isinstance(t, At)], "uses as a key")
        return frozenset(found)

    def _on_unpack_sequence(self, instruction: dis.Instruction) -> None:
        value, count = self.pop(), instruction.arg or 0
        parts: list[set[Thing]] = [set() for _ in range(count)]
        for thing in value:
            if isinstance(thing, Row) and len(thing.parts) == count:
                for part, new in zip(parts, thing.parts, strict=True):
                    part |= new
                continue
            if isinstance(thing, (At, Many)):
                elements = elements_of(frozenset([thing]), -1)
            else:
                self.use([thing], "unpacks")
                elements = OTHER
            for part in parts:
                part |= elements
        self.push(*[frozenset(part) for part in parts[::-1]])

    def _on_get_iter(self, instruction: dis.Instruction) -> None:
        pass

    def _operate(self, instruction: dis.Instruction) -> None:
        left, right = self.take(2)
        if instruction.argrepr == "[]":
            self.push(self._element(left, right))
            return
        for value in (left, right):
            if instruction.opname.startswith(("COMPARE", "CONTAINS")):
                self.ask(value, "compares")
            else:
                self.use(value, "computes with")
        self.push(OTHER)

    # Containers

    def _on_build_map(self, instruction: dis.Instruction) -> None:
        for value in self.take(2 * (instruction.arg or 0)):
            self.use(value, "stores")
        self.push(OTHER)

    def _on_build_const_key_map(self, instruction: dis.Instruction) -> None:
        for value in self.take(1 + (instruction.arg or 0)):
            self.use(value, "stores")
        self.push(OTHER)

    def _on_list_append(self, instruction: dis.Instruction) -> None:
        added, depth = self.pop(), instruction.arg or 1
        self._add(depth, added)

    _on_set_add = _on_list_append

    def _on_list_extend(self, instruction: dis.Instruction) -> None:
        added, depth = self.pop(), instruction.arg or 1
        self._add(depth, elements_of(added, -1))

    _on_set_update = _on_list_extend

    def _add(self, depth: int, added: Value) -> None:
        if depth > len(self.stack):
            self.use(added, "stores")
            return
        old = elements_of(self.stack[-depth], 0)
        self.stack[-depth] = frozenset([Many(frozenset((*old, *added)))])

    def _on_list_to_tuple(self, instruction: dis.Instruction) -> None:
        pass

    def _on_call_intrinsic_1(self, instruction: dis.Instruction) -> None:
        if "LIST_TO_TUPLE" not in instruction.argrepr:
            self.use(self.pop(), "uses")
            self.push(OTHER)


def view_of(callee: Value, arguments: list[Value]) -> Value | None:
    """The result of a call that only leads to modules, such as ``self.layers.children()``.

    Example:
        >>> view_of(frozenset([Named("print")]), []) is None
        True
    """
    found: set[Thing] = set()
    for thing in callee:
        if isinstance(thing, At) and not thing.part and thing.path and not arguments:
            step = _VIEWS.get(str(thing.path[-1]))
            if step is None:
                return None
            elements: Value = frozenset([At((*thing.path[:-1], step))])
            if thing.path[-1] in _IN_PAIRS:
                elements = frozenset([Row((OTHER, elements))])
            found.add(Many(elements))
        elif isinstance(thing, Named) and thing.name in _ITERATING:
            found |= _iterated(thing.name, arguments)
        elif isinstance(thing, Named) and thing.name == "getattr" and len(arguments) > 1:
            found |= _read(arguments)
        else:
            return None
    return frozenset(found) or None


def _step(key: Thing | None) -> Step:
    """The step to an element, from what its key may be; None for several things."""
    if isinstance(key, Constant) and key.value is not None:
        return Item(key.value)
    return Each(key.loop if isinstance(key, Index) and key.loop else -1, whole=False)


def _read(arguments: list[Value]) -> Value:
    """The result of ``getattr``."""
    base, key = arguments[0], arguments[1]
    single = next(iter(key)) if len(key) == 1 else None
    found: set[Thing] = set()
    for thing in base:
        if isinstance(thing, At) and not thing.part and len(thing.path) < _LONGEST:
            text = single.value if isinstance(single, Constant) else None
            step: Step = text if isinstance(text, str) else Each(-1)
            found.add(At((*thing.path, step)))
        elif isinstance(thing, (Result, Argument)):
            found.add(Attribute(thing, "getattr"))
        else:
            found |= OTHER
    for value in arguments[2:]:
        found |= value - {Constant(None)}
    return frozenset(found)


def _iterated(name: str, arguments: list[Value]) -> Value:
    elements = [elements_of(value, 0) for value in arguments]
    if name == "range":
        return frozenset([Many(frozenset([Index()]))])
    if name == "zip":
        return frozenset([Many(frozenset([Row(tuple(map(not_whole, elements)))]))])
    if not elements:
        return frozenset([Many(frozenset())])
    if name == "enumerate":
        index: Value = frozenset([Index(0 if len(arguments) == 1 else -1)])
        return frozenset([Many(frozenset([Row((index, elements[0]))]))])
    if name in ("iter", "list", "tuple"):
        return frozenset([Many(elements[0])])
    return frozenset([Many(elements_of(frozenset([Many(elements[0])]), -1))])


__all__ = ["ASKS", "Elements", "view_of"]
