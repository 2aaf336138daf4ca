"""What surrounds a call in a function, read from the function's bytecode; the function never runs.

A layer may compute more than its own output (the activation after it, the outputs of layers that
read the same tensor) only if no code can notice. This module answers that for one call: which
module receives the result, and nothing else does; and which calls on the same variable follow
without any code between them that could change the tensor.

Bytecode is what Python executes, so the answers do not depend on source files, decorators or
flags. Everything that this module does not recognise counts as code that could notice. An unknown
version of Python therefore loses speed, not correctness.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

Path = tuple[str, ...]

_VERSION = sys.version_info[:2]

# Methods of a tensor that only read it, return a view of it or a new tensor.
PURE_METHODS = frozenset(
    (
        *("view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten"),
        *("size", "dim", "numel", "chunk", "split", "unbind", "squeeze", "unsqueeze", "expand"),
        *("repeat", "to", "float", "type_as", "clone", "detach", "t", "mul", "add", "sub", "div"),
        *("repeat_interleave", "movedim", "swapaxes", "view_as", "reshape_as", "expand_as"),
    )
)
_IGNORED = frozenset(
    (
        "RESUME",
        "NOP",
        "CACHE",
        "PRECALL",
        "EXTENDED_ARG",
        "MAKE_CELL",
        "COPY_FREE_VARS",
        "NOT_TAKEN",
    )
)
_LOADS = frozenset(("LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW"))
_PAIRS_OF_LOADS = frozenset(("LOAD_FAST_LOAD_FAST", "LOAD_FAST_BORROW_LOAD_FAST_BORROW"))
_CONSTANTS = frozenset(("LOAD_CONST", "LOAD_SMALL_INT", "LOAD_CONST_IMMORTAL"))
_UNARY = frozenset(("UNARY_NEGATIVE", "UNARY_POSITIVE", "UNARY_INVERT"))
_LOOKS_AT_VARIABLES = frozenset(("locals", "vars", "eval", "exec", "_getframe", "currentframe"))
_ENDS = frozenset(("RETURN_VALUE", "RETURN_CONST"))


@dataclass(eq=False)
class _Value:
    """A value on the stack or in a variable; two values are the same if they are one object."""

    path: Path | None = None  # the attributes that lead from the owner to the value
    loaded_at: int = -1  # for a path: the number of events before it was read
    call: Call | None = None  # the call that returned the value
    fresh: bool = False  # a tensor that a call on the variable, or a pure method, created
    method_of: _Value | None = None  # a method of this value
    name: str = ""  # of a global variable, or of an attribute
    null: bool = False
    constant: bool = False
    uses: int = 0


@dataclass(eq=False)
class Call:
    """One call in a function.

    Attributes:
        start: offset of the call's instruction.
        end: offset of the instruction after it.
        path: the attributes that lead from the owner (the first parameter) to what is called; empty
            if something else is called.
        follow: the path of the module that receives the result; nothing else receives it, and no
            other code runs in between. None if there is no such module.
        obstacle: why ``follow`` is None although a module of the owner receives the result.
        chain: this call and the next calls that pass the same variable to modules of the owner,
            without code in between that could change the tensor; empty if there is only this call.
        in_chain: True if the call belongs to the chain of an earlier call.
        passes_follow: True if the module at ``follow`` is called before the second of these calls.
        function: the name of a function, not a module, that receives the result; or empty.
        code: the function that makes the call.
        owner: the name of the variable from which paths start.
    """

    code: CodeType
    owner: str
    start: int
    end: int
    path: Path = ()
    follow: Path | None = None
    obstacle: str = ""
    chain: tuple[Call, ...] = ()
    in_chain: bool = False
    passes_follow: bool = False
    function: str = ""
    argument: _Value | None = None
    result: _Value = field(default_factory=_Value)
    event: int = 0


class CallSites:
    """The calls of one function; see :func:`call_sites`.

    Attributes:
        owner: the name of the first parameter, from which paths start; None if it is no plain
            variable, or is assigned again.
        calls: the calls of modules of the owner with one positional argument.
    """

    def __init__(self, code: CodeType) -> None:
        self.code = code
        self.owner = _owner(code)
        self.calls: list[Call] = []
        if self.owner is None:
            return
        for segment in _segments(code):
            self.calls += _Segment(code, self.owner, segment).run()

    def at(self, offset: int) -> Call | None:
        """The call whose instruction covers ``offset``, as in ``frame.f_lasti``."""
        for call in self.calls:
            if call.start <= offset < call.end:
                return call
        return None


def call_sites(code: CodeType) -> CallSites:
    """The calls of a function, from its bytecode.

    Example:
        >>> def forward(self, x):
        ...     h = self.fc(x)
        ...     return self.act(h)
        >>> [(call.path, call.follow) for call in call_sites(forward.__code__).calls]
        [(('fc',), ('act',)), (('act',), None)]
    """
    return CallSites(code)


def _owner(code: CodeType) -> str | None:
    optimized = code.co_flags & inspect.CO_OPTIMIZED and code.co_flags & inspect.CO_NEWLOCALS
    if not optimized or not code.co_argcount or _LOOKS_AT_VARIABLES & set(code.co_names):
        return None
    owner = code.co_varnames[0]
    if owner in code.co_cellvars:
        return None
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name.startswith(("STORE_FAST", "DELETE_FAST", "LOAD_FAST_AND_CLEAR")):
            stored = instruction.argval
            first = stored[0] if isinstance(stored, tuple) else stored
            both = name == "STORE_FAST_STORE_FAST" and owner in stored
            if first == owner or both:
                return None
    return owner


@dataclass
class _Step:
    """An instruction, and the offset of the next one."""

    instruction: dis.Instruction
    end: int


def _segments(code: CodeType) -> Iterator[list[_Step]]:
    """Runs of instructions that are entered at the first and left at the last one only."""
    instructions = list(dis.get_instructions(code))
    ends = [i.offset for i in instructions[1:]] + [len(code.co_code)]
    segment: list[_Step] = []
    for instruction, end in zip(instructions, ends, strict=True):
        if instruction.is_jump_target and segment:
            yield segment
            segment = []
        segment.append(_Step(instruction, end))
        if not _is_known(instruction.opname) or instruction.opname in _ENDS:
            yield segment
            segment = []
    if segment:
        yield segment


def _is_known(name: str) -> bool:
    return (
        hasattr(_Segment, f"on_{name.lower()}")
        or any(
            name in names
            for names in (_IGNORED, _LOADS, _PAIRS_OF_LOADS, _CONSTANTS, _UNARY, _ENDS)
        )
        or (_VERSION == (3, 10) and name.startswith(("BINARY_", "INPLACE_")))
    )


class _Segment:
    """Runs a segment on values that stand for what the stack and the variables hold."""

    def __init__(self, code: CodeType, owner: str, steps: list[_Step]) -> None:
        self.code, self.owner, self.steps = code, owner, steps
        self.stack: list[_Value] = []
        self.variables: dict[str, _Value] = {owner: _Value(path=())}
        self.calls: list[Call] = []
        self.events: list[Call | str] = []  # what could run code of others, in order
        self.reads: list[tuple[int, Path]] = []  # attributes of the owner, after so many events
        self.keywords = False
        self.end = 0

    def run(self) -> list[Call]:
        last = ""
        for step in self.steps:
            last, self.end = step.instruction.opname, step.end
            self.step(step.instruction)
        returns = last in _ENDS
        for call in self.calls:
            self._find_follow(call, returns)
        for call in self.calls:
            self._find_chain(call)
        return [call for call in self.calls if call.path and call.argument is not None]

    # ------------------------------------------------------------ values

    def push(self, value: _Value) -> None:
        self.stack.append(value)

    def pop(self) -> _Value:
        return self.stack.pop() if self.stack else _Value()

    def use(self) -> _Value:
        value = self.pop()
        value.uses += 1
        return value

    def load(self, name: str) -> _Value:
        value = self.variables.setdefault(name, _Value())
        if value.path == ():
            return _Value(path=(), loaded_at=len(self.events))
        return value

    def store(self, name: str, value: _Value) -> None:
        self.variables[name] = value

    # ------------------------------------------------------------ instructions

    def step(self, instruction: dis.Instruction) -> None:
        name = instruction.opname
        if name in _IGNORED:
            return
        if name in _LOADS:
            self.push(self.load(instruction.argval))
        elif name in _PAIRS_OF_LOADS:
            for variable in instruction.argval:
                self.push(self.load(variable))
        elif name in _CONSTANTS:
            self.push(_Value(constant=True))
        elif name in _UNARY:
            self._operate(1, instruction)
        elif name in _ENDS:
            if name == "RETURN_VALUE":
                self.use()
        elif hasattr(self, f"on_{name.lower()}"):
            getattr(self, f"on_{name.lower()}")(instruction)
        elif _VERSION == (3, 10) and name.startswith(("BINARY_", "INPLACE_")):
            self._operate(2, instruction)
        else:  # it ends the segment; whatever is on the stack may be used by it
            for value in self.stack:
                value.uses += 1
            self.stack.clear()

    def on_push_null(self, instruction: dis.Instruction) -> None:
        self.push(_Value(null=True))

    def on_store_fast(self, instruction: dis.Instruction) -> None:
        self.store(instruction.argval, self.pop())

    def on_store_fast_load_fast(self, instruction: dis.Instruction) -> None:
        stored, loaded = instruction.argval
        self.store(stored, self.pop())
        self.push(self.load(loaded))

    def on_store_fast_store_fast(self, instruction: dis.Instruction) -> None:
        for name in instruction.argval:
            self.store(name, self.pop())

    def on_pop_top(self, instruction: dis.Instruction) -> None:
        self.use()

    def on_copy(self, instruction: dis.Instruction) -> None:
        depth = instruction.arg or 1
        self.push(self.stack[-depth] if depth <= len(self.stack) else _Value())

    def on_dup_top(self, instruction: dis.Instruction) -> None:
        self.push(self.stack[-1] if self.stack else _Value())

    def on_swap(self, instruction: dis.Instruction) -> None:
        depth = instruction.arg or 2
        while len(self.stack) < depth:
            self.stack.insert(0, _Value())
        self.stack[-1], self.stack[-depth] = self.stack[-depth], self.stack[-1]

    def on_load_global(self, instruction: dis.Instruction) -> None:
        with_null = _VERSION >= (3, 11) and bool((instruction.arg or 0) & 1)
        if with_null and _VERSION < (3, 13):
            self.push(_Value(null=True))
        self.push(_Value(name=str(instruction.argval)))
        if with_null and _VERSION >= (3, 13):
            self.push(_Value(null=True))

    def on_load_method(self, instruction: dis.Instruction) -> None:
        self._attribute(instruction.argval)
        self.push(_Value(null=True))

    def on_load_attr(self, instruction: dis.Instruction) -> None:
        self._attribute(instruction.argval)
        if _VERSION >= (3, 12) and (instruction.arg or 0) & 1:
            self.push(_Value(null=True))

    def _attribute(self, name: str) -> None:
        base = self.pop()
        if base.path is not None:
            path = (*base.path, name)
            self.reads.append((len(self.events), path))
            self.push(_Value(path=path, loaded_at=base.loaded_at))
            return
        base.uses += 1
        if not base.fresh or name not in PURE_METHODS:
            self.events.append("an attribute")
        self.push(_Value(method_of=base, name=name))

    def on_build_tuple(self, instruction: dis.Instruction) -> None:
        for _ in range(instruction.arg or 0):
            self.use()
        self.push(_Value())

    on_build_list = on_build_tuple

    def on_binary_op(self, instruction: dis.Instruction) -> None:
        self._operate(2, instruction)

    def on_binary_subscr(self, instruction: dis.Instruction) -> None:
        self._operate(2, instruction)

    def _operate(self, count: int, instruction: dis.Instruction) -> None:
        operands = [self.use() for _ in range(count)]
        left, rest = operands[-1], operands[:-1]  # the method of the left one runs
        fresh = left.fresh and all(o.fresh or o.constant or o.path for o in rest)
        if not fresh:
            self.events.append("an operator")
        self.push(_Value(fresh=fresh))

    def on_kw_names(self, instruction: dis.Instruction) -> None:
        self.keywords = True

    def on_call_function(self, instruction: dis.Instruction) -> None:
        self._call(instruction, instruction.arg or 0, slots=1)

    def on_call_method(self, instruction: dis.Instruction) -> None:
        self._call(instruction, instruction.arg or 0, slots=2)

    def on_call(self, instruction: dis.Instruction) -> None:
        self._call(instruction, instruction.arg or 0, slots=2)

    def on_call_kw(self, instruction: dis.Instruction) -> None:
        self.use()
        self.keywords = True
        self._call(instruction, instruction.arg or 0, slots=2)

    def on_call_function_kw(self, instruction: dis.Instruction) -> None:
        self.use()
        self.keywords = True
        self._call(instruction, instruction.arg or 0, slots=1)

    def on_call_function_ex(self, instruction: dis.Instruction) -> None:
        keywords = bool((instruction.arg or 0) & 1) or _VERSION >= (3, 14)
        slots = 1 if _VERSION < (3, 11) else 2
        self.keywords = True  # the number of arguments is unknown
        self._call(instruction, 2 if keywords else 1, slots=slots)

    def _call(self, instruction: dis.Instruction, count: int, slots: int) -> None:
        arguments = [self.use() for _ in range(count)][::-1]
        called = [value for value in (self.use() for _ in range(slots)) if not value.null]
        keywords, self.keywords = self.keywords, False
        target = called[0] if len(called) == 1 else _Value()
        call = Call(self.code, self.owner, instruction.offset, self.end, event=len(self.events))
        if target.path:
            call.path = target.path
            call.argument = arguments[0] if len(arguments) == 1 and not keywords else None
            call.result = _Value(call=call, fresh=True, loaded_at=target.loaded_at)
            self.calls.append(call)
            self.events.append(call)
            self.push(call.result)
            return
        for argument in arguments:
            if argument.call is not None:
                argument.call.function = target.name
        base = target.method_of
        pure = base is not None and base.fresh and target.name in PURE_METHODS
        if not pure:  # a pure method is no event
            self.events.append("a call")
        self.push(_Value(fresh=pure))

    # ------------------------------------------------------------ answers

    def _find_follow(self, call: Call, returns: bool) -> None:
        """Set ``follow`` of the call whose result is the argument of ``call``."""
        before = None if call.argument is None else call.argument.call
        if before is None or before.argument is None or not call.path:
            return
        value = before.result
        loaded = call.result.loaded_at
        if value.uses != 1:
            before.obstacle = "its output is also used elsewhere"
        elif call.event != before.event + 1:
            before.obstacle = "other code runs between the two"
        elif loaded < before.event or not self._reads_only(before, call):
            before.obstacle = "other code runs between reading the module and calling the layer"
        elif not self._is_dead(value, returns):
            before.obstacle = "its output is kept in a variable"
        else:
            before.follow = call.path

    def _reads_only(self, before: Call, call: Call) -> bool:
        """True if no attribute but those of the path of ``call`` is read between the two calls."""
        between = [path for at, path in self.reads if at == call.event]
        return all(call.path[: len(path)] == path for path in between)

    def _is_dead(self, value: _Value, returns: bool) -> bool:
        """True if no variable that is read later holds the value."""
        names = [name for name, held in self.variables.items() if held is value]
        return returns or not names or (len(names) == 1 and self._loads(names[0]) == 1)

    def _loads(self, name: str) -> int:
        """The number of instructions that read or delete a variable."""
        count = 0
        for instruction in dis.get_instructions(self.code):
            value: Any = instruction.argval
            if instruction.opname == "STORE_FAST_LOAD_FAST":
                value = value[1]
            if instruction.opname.startswith(("LOAD_", "DELETE_")) or "LOAD" in instruction.opname:
                count += value == name or (isinstance(value, tuple) and name in value)
        return count

    def _find_chain(self, call: Call) -> None:
        """Set the chain of calls on the variable that ``call`` passes."""
        value = call.argument
        if value is None or value.call is not None or value.path is not None or not call.path:
            return
        chain, passes_follow = [call], False
        for event in self.events[call.event + 1 :]:
            if isinstance(event, str) or event.argument is None:
                break
            if event.argument is value:
                chain.append(event)
            elif event.argument is call.result and chain[-1] is call and call.follow == event.path:
                passes_follow = True
            else:
                break
        if len(chain) > 1:
            call.chain, call.passes_follow = tuple(chain), passes_follow
            for later in chain[1:]:
                later.in_chain = True
