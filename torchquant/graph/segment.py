"""Runs straight bytecode on values that stand for what the stack and the variables hold."""

from __future__ import annotations

import dis
import sys
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torchquant.graph.calls import Call, Item, Path, Value

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
# Of these, the methods whose arguments may be tensors; a tensor's class may run code of its own.
_METHODS_OF_TWO = frozenset(
    (
        *("to", "type_as", "mul", "add", "sub", "div", "repeat_interleave"),
        *("view_as", "reshape_as", "expand_as"),
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
ENDS = frozenset(("RETURN_VALUE", "RETURN_CONST"))


@dataclass
class Step:
    """An instruction, and the offset of the next one."""

    instruction: dis.Instruction
    end: int


def is_known(name: str) -> bool:
    return (
        hasattr(Segment, f"on_{name.lower()}")
        or any(
            name in names for names in (_IGNORED, _LOADS, _PAIRS_OF_LOADS, _CONSTANTS, _UNARY, ENDS)
        )
        or (_VERSION == (3, 10) and name.startswith(("BINARY_", "INPLACE_")))
    )


class Segment:
    """Runs a segment on values that stand for what the stack and the variables hold."""

    def __init__(
        self, code: CodeType, owner: str, steps: list[Step], modules: frozenset[str] | None = None
    ) -> None:
        self.code, self.owner, self.steps = code, owner, steps
        self.modules = modules  # global variables that hold modules of Python; None for all
        self.stack: list[Value] = []
        self.variables: dict[str, Value] = {owner: Value(path=())}
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
        # A handler of exceptions may read the variables after a call that is in a try statement.
        returns = last in ENDS and not getattr(self.code, "co_exceptiontable", b"")
        for call in self.calls:
            self._find_follow(call, returns)
        for call in self.calls:
            self._find_chain(call)
        return [call for call in self.calls if call.path and call.argument is not None]

    # ------------------------------------------------------------ values

    def push(self, value: Value) -> None:
        self.stack.append(value)

    def pop(self) -> Value:
        return self.stack.pop() if self.stack else Value()

    def use(self) -> Value:
        value = self.pop()
        value.uses += 1
        return value

    def load(self, name: str) -> Value:
        value = self.variables.setdefault(name, Value())
        if value.path == ():
            return Value(path=(), loaded_at=len(self.events))
        return value

    def store(self, name: str, value: Value) -> None:
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
            key = instruction.argval
            known = type(key) in (int, str)
            self.push(Value(constant=True, key=key if known else None))
        elif name in _UNARY:
            self._operate(1, instruction)
        elif name in ENDS:
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
        self.push(Value(null=True))

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
        self.push(self.stack[-depth] if depth <= len(self.stack) else Value())

    def on_dup_top(self, instruction: dis.Instruction) -> None:
        self.push(self.stack[-1] if self.stack else Value())

    def on_swap(self, instruction: dis.Instruction) -> None:
        depth = instruction.arg or 2
        while len(self.stack) < depth:
            self.stack.insert(0, Value())
        self.stack[-1], self.stack[-depth] = self.stack[-depth], self.stack[-1]

    def on_load_global(self, instruction: dis.Instruction) -> None:
        with_null = _VERSION >= (3, 11) and bool((instruction.arg or 0) & 1)
        if with_null and _VERSION < (3, 13):
            self.push(Value(null=True))
        self.push(Value(name=str(instruction.argval), is_global=True))
        if with_null and _VERSION >= (3, 13):
            self.push(Value(null=True))

    def on_load_method(self, instruction: dis.Instruction) -> None:
        self._attribute(instruction.argval)
        self.push(Value(null=True))

    def on_load_attr(self, instruction: dis.Instruction) -> None:
        self._attribute(instruction.argval)
        if _VERSION >= (3, 12) and (instruction.arg or 0) & 1:
            self.push(Value(null=True))

    def _attribute(self, name: str) -> None:
        base = self.pop()
        if base.path is not None:
            path = (*base.path, name)
            self.reads.append((len(self.events), path))
            self.push(Value(path=path, loaded_at=base.loaded_at))
            return
        base.uses += 1
        if base.call is not None:
            base.call.function = name
        of_module = base.is_global and (self.modules is None or base.name in self.modules)
        harmless = (base.fresh and name in PURE_METHODS) or of_module
        if not harmless:
            self.events.append("an attribute")
        self.push(Value(method_of=base, name=name))

    def on_build_tuple(self, instruction: dis.Instruction) -> None:
        for _ in range(instruction.arg or 0):
            self.use()
        self.push(Value())

    on_build_list = on_build_tuple

    def on_binary_op(self, instruction: dis.Instruction) -> None:
        if instruction.argrepr == "[]":  # an operator since Python 3.14
            self.on_binary_subscr(instruction)
        else:
            self._operate(2, instruction)

    def on_binary_subscr(self, instruction: dis.Instruction) -> None:
        container, key = (self.stack[-2], self.stack[-1]) if len(self.stack) > 1 else (Value(),) * 2
        if container.path and key.key is not None:
            del self.stack[-2:]
            path = (*container.path, Item(key.key))
            self.reads.append((len(self.events), path))
            self.push(Value(path=path, loaded_at=container.loaded_at))
        else:
            self._operate(2, instruction)

    def _operate(self, count: int, instruction: dis.Instruction) -> None:
        operands = [self.use() for _ in range(count)]
        left, rest = operands[-1], operands[:-1]  # the method of the left one runs
        fresh = left.fresh and all(o.fresh or o.constant or o.path for o in rest)
        if not fresh:
            self.events.append("an operator")
        self.push(Value(fresh=fresh))

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
        target = called[0] if len(called) == 1 else Value()
        call = Call(self.code, self.owner, instruction.offset, self.end, event=len(self.events))
        if target.path:
            call.path = target.path
            call.argument = arguments[0] if len(arguments) == 1 and not keywords else None
            call.result = Value(call=call, fresh=True, loaded_at=target.loaded_at)
            self.calls.append(call)
            self.events.append(call)
            self.push(call.result)
            return
        for argument in arguments:
            if argument.call is not None:
                argument.call.function = target.name
        base = target.method_of
        pure = base is not None and base.fresh and target.name in PURE_METHODS
        if target.name in _METHODS_OF_TWO:
            pure = pure and all(a.fresh or a.constant or a.path for a in arguments)
        if not pure:  # a pure method is no event
            self.events.append("a call")
        self.push(Value(fresh=pure))

    # ------------------------------------------------------------ answers

    def _find_follow(self, call: Call, returns: bool) -> None:
        """Set ``follow`` of the call whose result is the argument of ``call``."""
        before = None if call.argument is None else call.argument.call
        if before is None or before.argument is None or not call.path:
            return
        value, before.receiver = before.result, call.path
        first = call.result.loaded_at
        earlier = [
            event.path for event in self.events[first : before.event] if isinstance(event, Call)
        ]
        if value.uses != 1:
            before.obstacle = "its output is also used elsewhere"
        elif call.event != before.event + 1:
            before.obstacle = "other code runs between the two"
        elif len(earlier) < before.event - first or not self._reads_only(call):
            before.obstacle = "other code runs between reading the module and calling the layer"
        elif not self._is_dead(value, returns):
            before.obstacle = "its output is kept in a variable"
        else:
            before.follow, before.earlier = call.path, tuple(earlier)

    def _reads_only(self, call: Call) -> bool:
        """True if no attribute but those of the path of ``call`` is read between the two calls."""
        between = [path for at, path in self.reads if at == call.event]
        return all(call.path[: len(path)] == path for path in between)

    def _is_dead(self, value: Value, returns: bool) -> bool:
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
        chain = [call]
        between: list[Path] = []
        pending: list[Path] = []
        for event in self.events[call.event + 1 :]:
            if isinstance(event, str) or event.argument is None:
                break
            if event.argument is value:
                chain.append(event)
                between += pending
                pending.clear()
            elif event.argument.fresh:
                pending.append(event.path)
            else:
                break
        if len(chain) > 1:
            call.chain, call.between = tuple(chain), tuple(between)
            call.others = tuple(path for path in between if path != call.follow)
            call.follows = tuple((i, c) for i, c in enumerate(chain) if c.follow is not None)
            last = chain[-1].event
            reads = [path for at, path in self.reads if call.event < at <= last]
            call.reads = tuple(dict.fromkeys(reads))
            for later in chain[1:]:
                later.in_chain = True
