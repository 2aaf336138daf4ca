"""What is known about a call in a function, and about the values that flow between calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import CodeType
from typing import NamedTuple

# How a module is reached from the owner: attributes, and keys of containers such as a ModuleList.
Path = tuple["str | Item", ...]


class Item(NamedTuple):
    """A step of a path: the element of a container."""

    key: int | str


@dataclass(eq=False)
class Value:
    """A value on the stack or in a variable; two values are the same if they are one object."""

    path: Path | None = None  # the attributes that lead from the owner to the value
    loaded_at: int = -1  # for a path: the number of events before it was read
    call: Call | None = None  # the call that returned the value
    fresh: bool = False  # a tensor that a call on the variable, or a pure method, created
    method_of: Value | None = None  # a method of this value
    name: str = ""  # of a global variable, or of an attribute
    is_global: bool = False
    null: bool = False
    constant: bool = False
    key: int | str | None = None  # of a constant
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
        receiver: the path of that module.
        earlier: the paths of modules that are called after the receiver is read and before this
            call, as in ``self.act(self.fc(self.norm(x)))``.
        chain: this call and the next calls that pass the same variable to modules of the owner,
            without code in between that could change the tensor; empty if there is only this call.
        in_chain: True if the call belongs to the chain of an earlier call.
        between: the paths of modules that are called between these calls, on results of the calls.
        others: ``between`` without the path of ``follow``.
        follows: the calls of the chain that have a ``follow``, each with its place in the chain.
        reads: the paths that the function reads between these calls.
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
    receiver: Path = ()
    earlier: tuple[Path, ...] = ()
    chain: tuple[Call, ...] = ()
    in_chain: bool = False
    between: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()
    follows: tuple[tuple[int, Call], ...] = ()
    reads: tuple[Path, ...] = ()
    function: str = ""
    argument: Value | None = None
    result: Value = field(default_factory=Value)
    event: int = 0

    @property
    def name(self) -> str:
        """The name of the called module in the module that holds it."""
        step = self.path[-1]
        return str(step.key) if isinstance(step, Item) else step
