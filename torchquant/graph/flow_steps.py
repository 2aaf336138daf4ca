"""What each instruction of Python's bytecode, 3.10 to 3.14, does to the stack and the variables."""

from __future__ import annotations

import dis
import sys
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from torchquant.graph.flow_elements import Elements, view_of
from torchquant.graph.flow_values import (
    NULL,
    OTHER,
    At,
    Constant,
    IsNone,
    Local,
    Many,
    Named,
    Result,
    Row,
    Site,
    Swallows,
    Value,
)

_VERSION = sys.version_info[:2]
_LONGEST = 8  # steps of a path
_QUIET_NAMES = """CACHE COPY_FREE_VARS EXTENDED_ARG JUMP_ABSOLUTE JUMP_BACKWARD
    JUMP_BACKWARD_NO_INTERRUPT JUMP_FORWARD MAKE_CELL NOP NOT_TAKEN POP_BLOCK PRECALL RESUME
    SETUP_ANNOTATIONS TO_BOOL"""
_QUIET = frozenset(_QUIET_NAMES.split())
_CONSTANTS = ("LOAD_CONST", "LOAD_SMALL_INT", "LOAD_CONST_IMMORTAL")
# What other instructions take from the stack, and how many new values they put there.
_TAKE: dict[str, tuple[int, int]] = {
    "BEFORE_WITH": (1, 2),
    "CHECK_EXC_MATCH": (1, 1),
    "DELETE_ATTR": (1, 0),
    "DELETE_DEREF": (0, 0),
    "DELETE_SUBSCR": (2, 0),
    "DICT_MERGE": (1, 0),
    "DICT_UPDATE": (1, 0),
    "GET_LEN": (0, 1),
    "IMPORT_FROM": (0, 1),
    "IMPORT_NAME": (2, 1),
    "JUMP_IF_NOT_EXC_MATCH": (2, 0),
    "LOAD_ASSERTION_ERROR": (0, 1),
    "LOAD_BUILD_CLASS": (0, 1),
    "LOAD_COMMON_CONSTANT": (0, 1),
    "LOAD_SPECIAL": (1, 2),
    "MAP_ADD": (2, 0),
    "POP_EXCEPT": (3 if _VERSION < (3, 11) else 1, 0),
    "PUSH_EXC_INFO": (1, 2),
    "RETURN_GENERATOR": (0, 1),
    "SETUP_WITH": (1, 2),
    "STORE_GLOBAL": (1, 0),
    "STORE_NAME": (1, 0),
}
_TEXT = ("FORMAT_SIMPLE", "FORMAT_VALUE", "FORMAT_WITH_SPEC", "CONVERT_VALUE", "BUILD_STRING")
_COUNTED = ("BUILD_TUPLE", "BUILD_LIST", "BUILD_SET")


@dataclass
class State:
    """What the stack and the variables may hold before an instruction."""

    stack: tuple[Value, ...]
    variables: dict[str, Value] = field(default_factory=dict)

    def joined(self, other: State) -> State:
        """What they hold if either state is possible."""
        depth = min(len(self.stack), len(other.stack))
        pairs = zip(
            self.stack[-depth:] if depth else (), other.stack[-depth:] if depth else (), strict=True
        )
        names = {**self.variables, **other.variables}
        nothing: Value = frozenset()
        return State(
            tuple(a | b for a, b in pairs),
            {n: self.variables.get(n, nothing) | other.variables.get(n, nothing) for n in names},
        )


class Machine(Elements):
    """Runs single instructions; a class below notes what they use and call.

    Example:
        >>> Machine((lambda x: x).__code__).variables
        {}
    """

    def __init__(self, code: CodeType) -> None:
        super().__init__()
        self.code = code
        self.shared_names = frozenset((*code.co_cellvars, *code.co_freevars))
        self.variables: dict[str, Value] = {}
        self.keywords = 0

    # What a class below defines

    def call(
        self, offset: int, callee: Value, arguments: list[Value] | None, others: Value
    ) -> Site | None:
        """Something is called; ``arguments`` is None if their number is unknown."""

    def stored(self, name: str, value: Value) -> None:
        """A variable gets a value."""

    def shared(self, name: str, value: Value) -> None:
        """A variable that inner functions see gets a value."""

    def cell(self, name: str) -> Value:
        """What such a variable may hold."""
        return OTHER

    def defined(self, code: CodeType) -> None:
        """A function is defined."""

    # Steps

    def run_step(self, instruction: dis.Instruction, state: State) -> State:
        """The state after an instruction, if it does not jump."""
        self.stack, self.variables = list(state.stack), dict(state.variables)
        self._run(instruction)
        return State(tuple(self.stack), self.variables)

    def jumped(self, instruction: dis.Instruction, before: State, after: State) -> State:
        """The state where an instruction jumps to."""
        name = instruction.opname
        if name.endswith("OR_POP"):  # the value stays
            return State(before.stack, after.variables)
        change = dis.stack_effect(instruction.opcode, instruction.arg, jump=True)
        here = dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
        if change == here:
            return after
        stack = after.stack
        more = change - here
        stack = (*stack, *[OTHER] * more) if more > 0 else stack[:more]
        return State(stack, after.variables)

    def left_loop(self, instruction: dis.Instruction, state: State) -> State:
        """The state after a loop: since Python 3.12 the iterator is still there."""
        if _VERSION < (3, 12):
            return State(state.stack[:-1], state.variables)
        extra = () if _VERSION >= (3, 13) else (OTHER,)
        return State((*state.stack, *extra), state.variables)

    def _run(self, instruction: dis.Instruction) -> None:
        name, value, argument = instruction.opname, instruction.argval, instruction.arg or 0
        if name in _QUIET:
            return
        method = getattr(self, f"_on_{name.lower()}", None)
        if method is not None:
            method(instruction)
        elif name in _CONSTANTS:
            self.push(_constant(value))
        elif name in _COUNTED:
            parts = tuple(self.take(argument))
            if name == "BUILD_TUPLE":
                self.push(frozenset([Row(parts)]))
            else:
                self.push(frozenset([Many(frozenset(t for part in parts for t in part))]))
        elif name in _TAKE:
            taken, put = _TAKE[name]
            for one in self.take(taken):
                self.use(one, "uses")
            self.push(*[OTHER] * put)
        elif name in _TEXT:
            count = 1 - dis.stack_effect(instruction.opcode, instruction.arg)
            for one in self.take(count):
                self.ask(one, "prints")
            self.push(OTHER)
        elif name.startswith(("LOAD_FAST", "STORE_FAST")):
            self._variables(name, value)
        elif name.startswith("POP_JUMP"):
            tested = self.pop()
            self.ask(tested, "compares" if "NONE" in name else "tests")
        elif name in ("LOAD_GLOBAL", "LOAD_NAME"):
            self._null_around(
                argument, name == "LOAD_GLOBAL" and _VERSION >= (3, 11), Named(str(value))
            )
        elif name in ("RETURN_VALUE", "YIELD_VALUE", "RETURN_CONST"):
            if name != "RETURN_CONST":
                self.use(self.pop(), "returns")
            if name == "YIELD_VALUE":
                self.push(OTHER)
        elif name.startswith(("BINARY_", "INPLACE_", "COMPARE_", "CONTAINS_")):
            self._operate(instruction)
        elif name.startswith("UNARY_"):
            self._unary(name)
        else:
            self._unknown(instruction)

    def _unknown(self, instruction: dis.Instruction) -> None:
        """An instruction that is not followed: it may do anything with what is on the stack."""
        for value in self.stack:
            self.use(value, "uses")
        change = dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
        if change >= 0:
            self.push(*[OTHER] * change)
        else:
            self.take(-change)
            if self.stack:
                self.stack[-1] = OTHER

    # Variables

    def _variables(self, name: str, value: Any) -> None:
        names = value if isinstance(value, tuple) else (value,)
        kinds = ["LOAD" if name.startswith("LOAD") else "STORE"] * len(names)
        if name == "STORE_FAST_LOAD_FAST":
            kinds = ["STORE", "LOAD"]
        for kind, variable in zip(kinds, names, strict=True):
            if kind == "STORE":
                self._store(variable, self.pop())
            else:
                self.push(self._load(variable))
        if name == "LOAD_FAST_AND_CLEAR":
            self.variables.pop(names[0], None)

    def _store(self, name: str, value: Value) -> None:
        self.stored(name, value)
        if name in self.shared_names:
            self.shared(name, value)
        self.variables[name] = value

    def _load(self, name: str) -> Value:
        return self.cell(name) if name in self.shared_names else self.variables.get(name, OTHER)

    def _on_load_deref(self, instruction: dis.Instruction) -> None:
        self.push(self.cell(str(instruction.argval)))

    _on_load_classderef = _on_load_deref
    _on_load_from_dict_or_deref = _on_load_deref

    def _on_store_deref(self, instruction: dis.Instruction) -> None:
        self._store(str(instruction.argval), self.pop())

    def _on_load_closure(self, instruction: dis.Instruction) -> None:
        self.push(OTHER)

    def _on_delete_fast(self, instruction: dis.Instruction) -> None:
        self.variables.pop(str(instruction.argval), None)

    # The stack

    def _on_push_null(self, instruction: dis.Instruction) -> None:
        self.push(NULL)

    def _on_gen_start(self, instruction: dis.Instruction) -> None:
        self.pop()

    def _on_pop_top(self, instruction: dis.Instruction) -> None:
        self.pop()

    _on_pop_iter = _on_pop_top

    def _on_end_for(self, instruction: dis.Instruction) -> None:
        self.take(2 if _VERSION < (3, 13) else 1 if _VERSION < (3, 14) else 0)

    def _on_copy(self, instruction: dis.Instruction) -> None:
        depth = instruction.arg or 1
        self.push(self.stack[-depth] if depth <= len(self.stack) else OTHER)

    def _on_dup_top(self, instruction: dis.Instruction) -> None:
        self.push(self.stack[-1] if self.stack else OTHER)

    def _on_dup_top_two(self, instruction: dis.Instruction) -> None:
        two = self.take(2)
        self.push(*two, *two)

    def _on_swap(self, instruction: dis.Instruction) -> None:
        depth = instruction.arg or 2
        values = self.take(depth)
        values[0], values[-1] = values[-1], values[0]
        self.push(*values)

    def _rotate(self, count: int) -> None:
        values = self.take(count)
        self.push(values[-1], *values[:-1])

    def _on_rot_two(self, instruction: dis.Instruction) -> None:
        self._rotate(2)

    def _on_rot_three(self, instruction: dis.Instruction) -> None:
        self._rotate(3)

    def _on_rot_four(self, instruction: dis.Instruction) -> None:
        self._rotate(4)

    def _on_rot_n(self, instruction: dis.Instruction) -> None:
        self._rotate(instruction.arg or 2)

    # Tests

    def _on_is_op(self, instruction: dis.Instruction) -> None:
        left, right = self.take(2)
        none: Value = frozenset([Constant(None)])
        tested = left if right == none else right if left == none else None
        thing = next(iter(tested)) if tested is not None and len(tested) == 1 else None
        if isinstance(thing, At) and not thing.part:
            self.ask(frozenset([thing]), "compares")
            self.push(frozenset([IsNone(thing.path, not instruction.arg)]))
        else:
            self.push(OTHER)

    def _unary(self, name: str) -> None:
        value = self.pop()
        thing = next(iter(value)) if len(value) == 1 else None
        if name == "UNARY_NOT" and isinstance(thing, IsNone):
            self.push(frozenset([IsNone(thing.path, not thing.answer)]))
            return
        if name != "UNARY_NOT":
            self.use(value, "computes with")
        else:
            self.ask(value, "tests")
        self.push(OTHER)

    # Functions

    def _on_make_function(self, instruction: dis.Instruction) -> None:
        flags = 0 if _VERSION >= (3, 13) else (instruction.arg or 0)
        if _VERSION < (3, 11):
            self.pop()  # its name
        code = self.pop()
        for _ in range(bin(flags).count("1")):
            self.use(self.pop(), "keeps in a function")
        found = [thing for thing in code if isinstance(thing, Local)]
        for thing in found:
            self.defined(thing.code)
        self.push(frozenset(found) or OTHER)

    def _on_set_function_attribute(self, instruction: dis.Instruction) -> None:
        function = self.pop()
        self.use(self.pop(), "keeps in a function")
        self.push(function)

    def _on_with_except_start(self, instruction: dis.Instruction) -> None:
        self.push(frozenset([Swallows()]))

    def _on_kw_names(self, instruction: dis.Instruction) -> None:
        self.keywords = len(self.code.co_consts[instruction.arg or 0])

    def _on_call(self, instruction: dis.Instruction) -> None:
        keywords, self.keywords = self.keywords, 0
        self._call(instruction, instruction.arg or 0, keywords, slots=2)

    def _on_call_kw(self, instruction: dis.Instruction) -> None:
        self._call(instruction, instruction.arg or 0, self._names(), slots=2)

    def _on_call_function_kw(self, instruction: dis.Instruction) -> None:
        self._call(instruction, instruction.arg or 0, self._names(), slots=1)

    def _on_call_function(self, instruction: dis.Instruction) -> None:
        self._call(instruction, instruction.arg or 0, 0, slots=1)

    def _on_call_method(self, instruction: dis.Instruction) -> None:
        self._call(instruction, instruction.arg or 0, 0, slots=2)

    def _names(self) -> int:
        """The number of arguments by name; their names are on the stack."""
        names = next(iter(self.pop()))
        return names.value if isinstance(names, Constant) and isinstance(names.value, int) else 0

    def _on_call_function_ex(self, instruction: dis.Instruction) -> None:
        keywords = bool((instruction.arg or 0) & 1) or _VERSION >= (3, 14)
        given = self.take(2 if keywords else 1)
        slots = [self.pop() for _ in range(1 if _VERSION < (3, 11) else 2)]
        called = next((one for one in slots if one != NULL), OTHER)
        everything = frozenset(thing for value in given for thing in value)
        self._made(instruction, called, None, everything)

    def _call(self, instruction: dis.Instruction, count: int, keywords: int, slots: int) -> None:
        arguments = self.take(count)
        first = [one for one in self.take(slots) if one != NULL]
        callee = first[0] if first else OTHER
        arguments = [*first[1:], *arguments]
        named = arguments[len(arguments) - keywords :] if keywords else []
        plain = arguments[: len(arguments) - keywords]
        others = frozenset(thing for value in named for thing in value)
        self._made(instruction, callee, plain, others)

    def _made(
        self,
        instruction: dis.Instruction,
        callee: Value,
        arguments: list[Value] | None,
        others: Value,
    ) -> None:
        self.iterate(callee, arguments or [])
        strict = callee == frozenset([Named("zip")]) and others <= OTHER
        known = arguments is not None and (not others or strict)
        view = view_of(callee, arguments or []) if known else None
        if view is not None:
            self.push(view)
            return
        site = self.call(instruction.offset, callee, arguments, others)
        self.push(OTHER if site is None else frozenset([Result(site)]))


def _constant(value: Any) -> Value:
    if isinstance(value, CodeType):
        return frozenset([Local(value)])
    if isinstance(value, tuple):  # perhaps the names of arguments
        return frozenset([Constant(len(value))])
    if isinstance(value, slice):  # since Python 3.14
        return frozenset([Row((frozenset([Named("slice")]), _constant(value.start)))])
    if value is None or type(value) in (int, str):
        return frozenset([Constant(value)])
    return OTHER


__all__ = ["Machine", "State"]
