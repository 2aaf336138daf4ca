"""Where modules and results of calls go in a function, read from its bytecode on all its branches.

The function is run on sets of things that a value may be (:mod:`torchquant.graph.flow_values`)
until the sets stop growing. No user code runs. An instruction that is not known counts as a use of
all values on the stack. This file imports nothing but the standard library and its two neighbours,
so it can be tested with each version of Python.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import CodeType

from torchquant.graph.flow_steps import Machine, State
from torchquant.graph.flow_values import (
    OTHER,
    Argument,
    At,
    CallOf,
    IsNone,
    Local,
    Named,
    Result,
    Site,
    Step,
    Swallows,
    Thing,
    Use,
    Value,
    aged,
    parts_of,
)

Present = Callable[[tuple[Step, ...]], "bool | None"]

_LOOKS_AT_VARIABLES = frozenset(("locals", "vars", "eval", "exec", "breakpoint"))
_LOOKS_AT_FRAMES = frozenset(("_getframe", "currentframe", "set_trace"))
OUTER = "<outer>"  # the name of variables of the function around the method
_LEAVES = ("RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE")
_ALWAYS_JUMPS = ("JUMP_FORWARD", "JUMP_ABSOLUTE", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT")
_MOST_ROUNDS = 200  # of the instructions of a function


@dataclass
class Flow:
    """What a function does with modules and results.

    Attributes:
        calls: its calls.
        uses: everything else that is done with modules, results and arguments.
        in_turn: the calls of ``for layer in layers: x = layer(x)``, where each run through the loop
            passes on what the one before got.
        complete: False if the function was too large to be read.
    """

    calls: dict[Site, CallOf] = field(default_factory=dict)
    uses: set[Use] = field(default_factory=set)
    in_turn: set[Site] = field(default_factory=set)
    complete: bool = True


def flow_of(code: CodeType, present: Present = lambda path: None) -> Flow:
    """Read a method; its first argument is the owner.

    Args:
        code: the code of the method.
        present: takes a path; True if a module is there, False if its place is empty, None if that
            is not known. Branches that test it are then left out.

    Example:
        >>> def forward(self, x):
        ...     return self.norm(self.conv(x))
        >>> flow = flow_of(forward.__code__)
        >>> [next(iter(call.callee)).path for call in flow.calls.values()]
        [('conv',), ('norm',)]
        >>> [use.how for use in flow.uses]
        ['returns']
    """
    flow = Flow()
    functions = _Functions(flow, present)
    owner = [frozenset([At(())])] if code.co_argcount else []
    rest = [frozenset([Argument(i)]) for i in range(max(code.co_argcount - 1, 0))]
    functions.bind(code, dict(zip(code.co_varnames, [*owner, *rest], strict=False)))
    functions.run()
    return flow


@dataclass
class _Function:
    """A function that is read: what its variables may be when it starts, and all its cells."""

    code: CodeType
    start: dict[str, Value] = field(default_factory=dict)
    due: bool = True


class _Functions:
    """A method and the functions inside of it, which share variables."""

    def __init__(self, flow: Flow, present: Present) -> None:
        self.flow = flow
        self.present = present
        self.known: dict[int, _Function] = {}
        self.cells: dict[str, Value] = {}

    def bind(self, code: CodeType, values: Mapping[str, Value]) -> None:
        """A function may start with these values, besides others."""
        function = self.known.setdefault(id(code), _Function(code))
        for name, value in values.items():
            new = function.start.get(name, frozenset()) | value
            if new != function.start.get(name):
                function.start[name] = new
                function.due = True

    def share(self, name: str, value: Value) -> None:
        """A variable that several functions see may have a value."""
        new = self.cells.get(name, frozenset()) | value
        if new != self.cells.get(name):
            self.cells[name] = new
            for function in self.known.values():
                function.due = True

    def run(self) -> None:
        for _ in range(_MOST_ROUNDS):
            due = [function for function in self.known.values() if function.due]
            if not due:
                return
            for function in due:
                function.due = False
                _Reading(self, function).run()
        self.flow.complete = False


class _Reading(Machine):
    """One pass over a function, from its start to all its ends."""

    def __init__(self, functions: _Functions, function: _Function) -> None:
        super().__init__(function.code)
        self.functions = functions
        self.flow = functions.flow
        self.start = function.start
        self.instructions = list(dis.get_instructions(self.code))
        self.by_name = any(
            (one.opname in ("LOAD_GLOBAL", "LOAD_NAME") and one.argval in _LOOKS_AT_VARIABLES)
            or one.argval in _LOOKS_AT_FRAMES
            for one in self.instructions
            if isinstance(one.argval, str)
        )
        self.places = {one.offset: place for place, one in enumerate(self.instructions)}
        self.handlers = _handlers(self.code, self.instructions)
        self.states: dict[int, State] = {}
        self.due: list[int] = []
        self.back: dict[int, dict[str, Value]] = {}  # what goes from the end of a loop to its start

    def run(self) -> None:
        values = {
            name: self.start.get(name, OTHER)
            for name in self.code.co_varnames[: _arguments(self.code)]
        }
        for name, value in self.start.items():
            values.setdefault(name, value)
        for name in set(self.code.co_cellvars) & set(values):
            self.functions.share(name, values[name])
        self.enter(0, State((), values))
        rounds = 0
        while self.due:
            rounds += 1
            if rounds > _MOST_ROUNDS * len(self.instructions):
                self.flow.complete = False
                return
            self.visit(self.due.pop())
        for place in self.back:
            self._find_turns(place)

    def enter(self, place: int, state: State) -> None:
        """An instruction may run in a state."""
        old = self.states.get(place)
        new = state if old is None else old.joined(state)
        if new != old:
            self.states[place] = new
            self.due.append(place)

    def visit(self, place: int) -> None:
        instruction, state = self.instructions[place], self.states[place]
        name = instruction.opname
        for target, depth, more in self.handlers.get(place, ()):
            stack = (*state.stack[:depth], *[OTHER] * more)
            self.enter(self.places[target], State(stack, state.variables))
        if name == "FOR_ITER":
            self._loop(place, instruction, state)
            return
        truth = self._test(name, state)
        after = self.run_step(instruction, state)
        if name in _LEAVES:
            return
        if instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs:
            jumped = self.jumped(instruction, state, after)
            target = self.places[instruction.argval]
            if truth is not False:
                if target <= place:
                    back = self.back.setdefault(target, {})
                    for key, value in jumped.variables.items():
                        back[key] = back.get(key, frozenset()) | value
                self.enter(target, jumped)
            if truth is True or name in _ALWAYS_JUMPS:
                return
        if place + 1 < len(self.instructions):
            self.enter(place + 1, after)

    def _loop(self, place: int, instruction: dis.Instruction, state: State) -> None:
        """FOR_ITER: take an element, or leave the loop."""
        again, done = (self._older(state, instruction.offset, done) for done in (False, True))
        iterator = state.stack[-1] if state.stack else OTHER
        element = self.taken(iterator, instruction.offset)
        self.enter(place + 1, State((*again.stack[:-1], iterator, element), again.variables))
        self.enter(self.places[instruction.argval], self.left_loop(instruction, done))

    def _older(self, state: State, loop: int, done: bool) -> State:
        """The state of a loop's start in its next run, or after the loop."""

        def in_loop(site: Site) -> bool:
            call = self.flow.calls.get(site)
            return call is not None and any(
                isinstance(thing, At) and _has(thing.path, loop) for thing in call.callee
            )

        return State(
            tuple(aged(value, loop, in_loop, done) for value in state.stack),
            {k: aged(v, loop, in_loop, done) for k, v in state.variables.items()},
        )

    def _find_turns(self, place: int) -> None:
        """Find the calls whose argument is always what they returned in the run before."""
        loop, state = self.instructions[place].offset, self.states[place]
        start = self._older(state, loop, done=False).variables
        for site, call in self.flow.calls.items():
            if site.code_id != id(self.code) or len(call.arguments) != 1:
                continue
            if not any(isinstance(t, At) and _has(t.path[-1:], loop) for t in call.callee):
                continue
            names = [name for name, value in start.items() if value == call.arguments[0]]
            only = frozenset([Result(site)])
            self.flow.in_turn.discard(site)
            if names and all(self.back[place].get(name) == only for name in names):
                self.flow.in_turn.add(site)

    def _test(self, name: str, state: State) -> bool | None:
        """Whether a jump on a test is taken; None if that is not known, or it is no such jump."""
        if "JUMP" not in name or "IF_" not in name or not state.stack or len(state.stack[-1]) != 1:
            return None
        (thing,) = state.stack[-1]
        if isinstance(thing, Swallows):
            return "TRUE" not in name
        if isinstance(thing, At) and not thing.part:
            there = self.functions.present(thing.path)
            if there is None:
                return None
            if name.endswith("NOT_NONE") or (name.endswith("IF_TRUE") or "TRUE_OR" in name):
                return there
            return not there
        if isinstance(thing, IsNone):
            there = self.functions.present(thing.path)
            if there is None or name.endswith("NONE"):
                return None
            answer = thing.answer is not there
            return answer if "TRUE" in name else not answer
        return None

    # ------------------------------------------------------------ what the machine reports

    def use(self, value: Iterable[Thing], how: str) -> None:
        for thing in parts_of(value):
            if isinstance(thing, Local):
                self.escaped(thing.code)
            else:
                self.flow.uses.add(Use(thing, how))

    def escaped(self, code: CodeType) -> None:
        """A function of the method may be called with anything."""
        names = code.co_varnames[: _arguments(code)]
        self.functions.bind(code, dict.fromkeys(names, OTHER))

    def call(
        self, offset: int, callee: Value, arguments: list[Value] | None, others: Value
    ) -> Site | None:
        """Note a call; None if it is one of a function that the method defines."""
        for thing in callee:
            if isinstance(thing, Local):
                if arguments is None or others:
                    self.escaped(thing.code)
                    self.use([t for v in arguments or () for t in v] + [*others], "passes on")
                else:
                    names = thing.code.co_varnames
                    self.functions.bind(thing.code, dict(zip(names, arguments, strict=False)))
        if callee and all(isinstance(thing, Local) for thing in callee):
            return None
        site = Site(id(self.code), offset)
        found = self.flow.calls.setdefault(site, CallOf())
        before = len(found.callee)
        found.callee |= callee
        found.others |= others
        if arguments is None:
            found.counts.add(-1)
        else:
            found.counts.add(len(arguments))
            while len(found.arguments) < len(arguments):
                found.arguments.append(set())
            for known, new in zip(found.arguments, arguments, strict=False):
                known |= new
        for value in arguments or ():
            for thing in parts_of(value):
                if isinstance(thing, Local):
                    self.escaped(thing.code)
        if len(found.callee) != before:  # it may call the element of a loop
            self.due += [
                p
                for p, one in enumerate(self.instructions)
                if one.opname == "FOR_ITER" and p in self.states
            ]
        return site

    def stored(self, name: str, value: Value) -> None:
        """A variable of which its function's insides, or others, may know."""
        if self.by_name:
            self.use(value, "keeps in a variable that is looked up by name")

    def shared(self, name: str, value: Value) -> None:
        self.functions.share(name, value)

    def cell(self, name: str) -> Value:
        known = self.functions.cells.get(name)
        return frozenset([Named(OUTER)]) if known is None else known

    def defined(self, code: CodeType) -> None:
        self.functions.known.setdefault(id(code), _Function(code, {}, due=True))


def _has(path: tuple[Step, ...], loop: int) -> bool:
    return any(getattr(step, "loop", None) == loop for step in path)


def _arguments(code: CodeType) -> int:
    """The number of arguments, with those by name and * and **."""
    return (
        code.co_argcount
        + code.co_kwonlyargcount
        + bool(code.co_flags & 0x04)
        + bool(code.co_flags & 0x08)
    )


def _handlers(
    code: CodeType, instructions: list[dis.Instruction]
) -> dict[int, list[tuple[int, int, int]]]:
    """For each instruction in a try statement, where an exception leads.

    With the target come the number of values that stay on the stack, and of those that are added.
    """
    found: dict[int, list[tuple[int, int, int]]] = {}
    parse = getattr(dis, "_parse_exception_table", None)
    if parse is None:  # Python 3.10 has no table
        for start, instruction in enumerate(instructions):
            if instruction.opname in ("SETUP_FINALLY", "SETUP_WITH"):
                for place in range(start + 1, len(instructions)):
                    if instructions[place].offset >= instruction.argval:
                        break
                    found.setdefault(place, []).append((instruction.argval, 0, 6))
        return found
    for entry in parse(code):
        for place, instruction in enumerate(instructions):
            if entry.start <= instruction.offset < entry.end:
                more = 2 if entry.lasti else 1
                found.setdefault(place, []).append((entry.target, entry.depth, more))
    return found


__all__ = ["Flow", "flow_of"]
