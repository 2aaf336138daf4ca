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
from collections.abc import Iterator
from types import CodeType

from torchquant.graph.calls import Call
from torchquant.graph.segment import ENDS, Segment, Step, is_known

_LOOKS_AT_VARIABLES = frozenset(
    (
        *("locals", "vars", "eval", "exec", "_getframe", "currentframe"),
        *("breakpoint", "set_trace"),  # debuggers
    )
)


class CallSites:
    """The calls of one function; see :func:`call_sites`.

    Attributes:
        owner: the name of the first parameter, from which paths start; None if it is no plain
            variable, or is assigned again.
        calls: the calls of modules of the owner with one positional argument.
    """

    def __init__(self, code: CodeType, modules: frozenset[str] | None = None) -> None:
        self.code = code
        self.owner = _owner(code)
        self.calls: list[Call] = []
        if self.owner is None:
            return
        for segment in _segments(code):
            self.calls += Segment(code, self.owner, segment, modules).run()

    def at(self, offset: int) -> Call | None:
        """The call whose instruction covers ``offset``, as in ``frame.f_lasti``."""
        for call in self.calls:
            if call.start <= offset < call.end:
                return call
        return None


def call_sites(code: CodeType, modules: frozenset[str] | None = None) -> CallSites:
    """The calls of a function, from its bytecode.

    Args:
        code: the function's code.
        modules: the global variables that hold modules of Python, such as ``torch``; to read an
            attribute of another object may run code. None for all global variables.

    Example:
        >>> def forward(self, x):
        ...     h = self.fc(x)
        ...     return self.act(h)
        >>> [(call.path, call.follow) for call in call_sites(forward.__code__).calls]
        [(('fc',), ('act',)), (('act',), None)]
    """
    return CallSites(code, modules)


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


def _segments(code: CodeType) -> Iterator[list[Step]]:
    """Runs of instructions that are entered at the first and left at the last one only."""
    instructions = list(dis.get_instructions(code))
    ends = [i.offset for i in instructions[1:]] + [len(code.co_code)]
    segment: list[Step] = []
    for instruction, end in zip(instructions, ends, strict=True):
        if instruction.is_jump_target and segment:
            yield segment
            segment = []
        segment.append(Step(instruction, end))
        if not is_known(instruction.opname) or instruction.opname in ENDS:
            yield segment
            segment = []
    if segment:
        yield segment
