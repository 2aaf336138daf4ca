"""Which tensors of other modules a method reads, from its bytecode; the method is not run.

``self.fc.weight`` and the like are found: attributes that are read one after the other, beginning
at the method's first argument, also through local variables, subscripts and loops. The names of
instructions differ between versions of Python. This file handles 3.10 to 3.14, and imports nothing
but the standard library, so that it can be tested with each of them.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType

Path = tuple[str, ...]
ELEMENT = "[]"  # in a path: an element of a container

_QUESTION_NAMES = """device dim dtype element_size get_device is_contiguous is_cpu is_cuda
    is_floating_point is_meta itemsize layout nbytes ndim nelement numel requires_grad shape size
    stride"""
_QUESTIONS = frozenset(_QUESTION_NAMES.split())
_INSPECTING = frozenset(("hasattr", "id", "isinstance", "len", "type"))
# Instructions that do nothing to the value on the stack, or only prepare a call.
_SILENT_NAMES = """CACHE COPY COPY_FREE_VARS DUP_TOP EXTENDED_ARG KW_NAMES MAKE_CELL NOP NOT_TAKEN
    PRECALL PUSH_NULL RESUME"""
_SILENT = frozenset(_SILENT_NAMES.split())
_STATEMENT_ENDS = ("STORE_", "POP_TOP", "RETURN_", "POP_JUMP", "END_FOR", "YIELD_")


@dataclass(frozen=True)
class AttributeRead:
    """One place where a method reads an attribute of another object.

    Args:
        path: the attributes that lead from ``self`` to the object.
        values: False if only the shape, dtype, device or type of the attribute is asked for.
        changes: True if the attribute is assigned or changed in place.
    """

    path: Path
    values: bool
    changes: bool = False


def attribute_reads(
    code: CodeType, attribute: str, known: Mapping[str, frozenset[Path]] | None = None
) -> list[AttributeRead]:
    """The places where a method reads ``attribute`` of objects that ``self`` leads to.

    Args:
        code: the code of the method.
        attribute: the name of the attribute, for example ``weight``.
        known: variables of the enclosing function, and the paths that they may hold.

    Example:
        >>> def forward(self, x):
        ...     return x.to(self.up.weight.dtype) @ self.down.weight
        >>> [(read.path, read.values) for read in attribute_reads(forward.__code__, "weight")]
        [(('up',), False), (('down',), True)]
    """
    scan = _Scan(attribute, dict(known or {}))
    if known is None and code.co_argcount:
        scan.variables[code.co_varnames[0]] = frozenset([()])
    for _ in range(2):  # the second time with the variables that a loop assigns further down
        scan.found.clear()
        for name, value in _steps(code):
            scan.step(name, value)
        scan.end()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a comprehension, a lambda or an inner function
            inner = {**scan.variables, ".0": scan.loops}
            scan.found += attribute_reads(constant, attribute, inner)
    return scan.found


def _steps(code: CodeType) -> Iterator[tuple[str, object]]:
    """The instructions as (name, value), with combined loads and stores taken apart."""
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if isinstance(value, tuple) and name.startswith(("LOAD_FAST", "STORE_FAST")):
            first, second = value
            names = ("LOAD_FAST", "LOAD_FAST") if name.startswith("LOAD") else ("STORE_FAST",) * 2
            if name == "STORE_FAST_LOAD_FAST":
                names = ("STORE_FAST", "LOAD_FAST")
            yield names[0], first
            yield names[1], second
        elif name not in _SILENT:
            yield name, value


class _Scan:
    """The state of a walk through the instructions of one method."""

    def __init__(self, attribute: str, variables: dict[str, frozenset[Path]]) -> None:
        self.attribute = attribute
        self.variables = variables
        self.found: list[AttributeRead] = []
        self.loops: frozenset[Path] = frozenset()  # the elements of all iterators
        self._paths: frozenset[Path] | None = None  # of the value on top of the stack
        self._callee = ""  # the last name before this value, perhaps the function it is given to
        self._last = ""
        self._seen: set[Path] = set()  # all paths since the beginning of the statement
        self._iterated: frozenset[Path] = frozenset()  # the elements of the last iterator
        self._elements: frozenset[Path] = frozenset()  # what a loop assigns next
        self._stores = 0  # the number of variables that the loop assigns
        self._compared: frozenset[Path] | None = None  # perhaps compared with None

    def step(self, name: str, value: object) -> None:
        """Take the next instruction into account."""
        if self._compared is not None:
            self._use(self._compared, values=name != "IS_OP", changes=False)
            self._compared = None
        if name.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE", "LOAD_NAME")):
            self._ended(name, value)
            self._callee, self._last = self._last, str(value)
            self._paths = self.variables.get(str(value))
            if value == ".0":  # the iterator of a comprehension
                self._iterated, self._paths = self._paths or frozenset(), None
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            self._attribute_of(str(value))
        elif name.startswith("STORE_ATTR"):
            self._stored(str(value))
        elif name.startswith(("STORE_FAST", "STORE_DEREF", "STORE_NAME")):
            self._assigned(str(value))
        elif name.startswith("BINARY_SUBSCR") or (name == "BINARY_OP" and value == "[]"):
            self._element()
        elif name == "LOAD_CONST" or name == "LOAD_SMALL_INT":
            self._constant_loaded(value)
        elif name == "GET_ITER":
            self._ended(name, value)
            paths = frozenset((*path, ELEMENT) for path in self._seen)
            self.loops |= paths
            self._iterated = paths
        elif name == "FOR_ITER":
            self._ended(name, value)
            self._elements, self._stores = self._iterated, 1
        elif name == "UNPACK_SEQUENCE":
            self._ended(name, value)
            self._stores = int(str(value)) if self._stores else 0
        else:
            self._ended(name, value)
            if name == "LOAD_GLOBAL":
                self._callee, self._last = self._last, str(value)
        if name.startswith(_STATEMENT_ENDS) and not self._stores:
            self._seen.clear()

    def end(self) -> None:
        """Take the end of the method into account."""
        self.step("", None)
        self._seen.clear()

    def _attribute_of(self, name: str) -> None:
        paths = self._paths
        if paths is not None and any(path[-1:] == (self.attribute,) for path in paths):
            self._use(paths, values=name not in _QUESTIONS, changes=_is_in_place(name))
            if name == "data":  # a change through it is a change of the weight
                return
            self._paths, self._last = None, name
            return
        self._paths = None if paths is None else frozenset((*path, name) for path in paths)
        self._last = name

    def _ended(self, name: str, value: object) -> None:
        """The value on the stack is used by an instruction that is not followed further."""
        paths, self._paths = self._paths, None
        if paths is None:
            return
        self._seen |= paths
        if not any(path[-1:] == (self.attribute,) for path in paths):
            return
        inspected = self._callee in _INSPECTING or name in (
            "IS_OP",
            "POP_JUMP_IF_NONE",
            "POP_JUMP_IF_NOT_NONE",
            "POP_JUMP_FORWARD_IF_NONE",
            "POP_JUMP_FORWARD_IF_NOT_NONE",
            "POP_TOP",
        )
        self._use(paths, values=not inspected, changes=_is_in_place(self._callee))

    def _constant_loaded(self, value: object) -> None:
        paths, callee = self._paths, self._callee
        if value is None and paths is not None:  # `is None` reads no value
            self._paths = None
            self._seen |= paths
            self._compared = paths
        elif value == self.attribute and callee == "getattr" and paths is not None:
            read = frozenset((*path, self.attribute) for path in paths)
            self._use(read, values=True, changes=False)
            self._paths = None
        elif not (paths and self._is_container(paths)):
            self._ended("LOAD_CONST", value)

    def _is_container(self, paths: frozenset[Path]) -> bool:
        """True if a subscript may follow: the constant is then the index."""
        return not any(path[-1:] == (self.attribute,) for path in paths)

    def _element(self) -> None:
        """A subscript: of the value itself, or of one before it, whose index was just loaded."""
        paths = self._paths
        if paths is None or any(path[-1:] == (self.attribute,) for path in paths):
            before = [path for path in self._seen if path[-1:] != (self.attribute,)]
            self._ended("BINARY_SUBSCR", None)
            paths = frozenset(before) if before else None
        self._paths = None if not paths else frozenset((*path, ELEMENT) for path in paths)
        self._last = ELEMENT

    def _stored(self, name: str) -> None:
        paths, self._paths = self._paths, None
        if paths is None and name == self.attribute:  # `self.fc.weight *= 2`
            self._use(frozenset(self._seen), values=True, changes=True)
        for path in paths or ():
            if name == self.attribute:
                self.found.append(AttributeRead(path, values=True, changes=True))
            elif path[-1:] == (self.attribute,):
                self.found.append(AttributeRead(path[:-1], values=True, changes=True))

    def _assigned(self, name: str) -> None:
        if self._stores:
            self._stores -= 1
            if self._elements:
                self.variables[name] = self.variables.get(name, frozenset()) | self._elements
        elif self._paths is not None:
            self.variables[name] = self.variables.get(name, frozenset()) | self._paths
        self._paths = None

    def _use(self, paths: frozenset[Path], values: bool, changes: bool) -> None:
        for path in paths:
            if path[-1:] == (self.attribute,):
                self.found.append(AttributeRead(path[:-1], values, changes))


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


__all__ = ["attribute_reads"]
