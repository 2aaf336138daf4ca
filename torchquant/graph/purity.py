"""Can a module's forward do anything but compute its result? Answered without running it.

Recognising a module by its values means to run it. A forward that writes a file, counts its calls
or keeps a tensor must not be run behind the user's back, and two layers must not be computed
together if such a forward runs between them. A forward is pure here if its bytecode reads the
module's attributes, calls functions of torch and methods of tensors that do not work in place, and
stores nothing but variables. Everything that this module does not recognise counts as impure.
"""

from __future__ import annotations

import builtins
import dis
import functools
from collections import OrderedDict
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

_STORES = frozenset(("STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "STORE_NAME", "STORE_DEREF"))
_OTHER = frozenset(
    (
        *("DELETE_ATTR", "DELETE_SUBSCR", "DELETE_GLOBAL", "DELETE_NAME", "DELETE_DEREF"),
        *("IMPORT_NAME", "IMPORT_FROM", "YIELD_VALUE", "YIELD_FROM", "SEND", "GET_AWAITABLE"),
        *("LOAD_DEREF", "LOAD_CLASSDEREF", "MAKE_FUNCTION", "LOAD_BUILD_CLASS", "SETUP_WITH"),
        *("BEFORE_WITH", "LOAD_SPECIAL", "LOAD_NAME", "LOAD_SUPER_ATTR"),
    )
)
_BUILTINS = frozenset(
    (
        *(
            "len",
            "range",
            "int",
            "float",
            "bool",
            "isinstance",
            "tuple",
            "list",
            "dict",
            "max",
            "min",
        ),
        *("abs", "str", "enumerate", "zip", "sum", "any", "all", "slice", "type", "round"),
        *("ValueError", "TypeError", "RuntimeError", "AssertionError", "NotImplementedError"),
    )
)
# Modules whose functions only compute; torch's functions that change state are excluded by name.
_MODULES = ("torch", "torch.nn.functional", "torch.nn", "torch.special", "torch.linalg", "math")
_CHANGES_STATE = (
    "save",
    "load",
    "set_",
    "manual_seed",
    "seed",
    "use_",
    "compile",
    "enable",
    "init",
)
_COMPREHENSIONS = ("<listcomp>", "<genexpr>", "<setcomp>", "<dictcomp>")
_MAX_DEPTH = 4


def is_pure(module: nn.Module, *, in_place: bool = False, fixed: bool = False) -> bool:
    """True if the module's forward surely does nothing but compute its result.

    Modules of ``torch.nn`` are pure except those that keep statistics or work in place.

    Args:
        module: the module; it is not run.
        in_place: whether methods of tensors may work in place, which is harmless in a copy.
        fixed: whether the result may depend only on the input, on constants and on attributes of
            the module itself, and not on tensors, submodules, attributes of the class or variables
            outside of the function, which can change without the module.

    Example:
        >>> class Counting(nn.Module):
        ...     def forward(self, x):
        ...         self.calls = 1
        ...         return x
        >>> is_pure(nn.GELU()), is_pure(Counting())
        (True, False)
    """
    cls = type(module)
    cls = getattr(cls, "_torchquant_original_class", cls)  # of a norm that an operator computes
    if "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
        return False
    if cls.__module__.startswith("torch.nn.modules."):
        if fixed and module._modules:
            return False
        quiet = not module._buffers and (in_place or not getattr(module, "inplace", False))
        return quiet and all(is_pure(child, in_place=in_place) for child in module.children())
    if cls.__module__.startswith("torchquant.nn."):
        return True
    return _Reader(module, in_place, fixed).is_pure(cls.forward, 0)


def may_run(module: nn.Module) -> bool:
    """True if a copy of the module may run to show what it computes, without other effects.

    Its forward is pure, but for work in place, or belongs to one of the known libraries, as do the
    forwards of the classes from which its class is derived.

    Example:
        >>> class Printing(nn.LayerNorm):
        ...     __module__ = "mine"
        ...     def forward(self, input):
        ...         print(input)
        ...         return super().forward(input)
        >>> may_run(nn.LayerNorm(4)), may_run(Printing(4))
        (True, False)
    """
    cls = type(module)
    cls = getattr(cls, "_torchquant_original_class", cls)
    if "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
        return False
    reader = _Reader(module, in_place=True, fixed=False, inherits=True)
    return all(
        base.__module__.partition(".")[0] in _LIBRARIES or reader.is_pure(vars(base)["forward"], 0)
        for base in cls.__mro__
        if "forward" in vars(base)
    )


def effect_of(module: nn.Module) -> str | None:
    """What the module's own forward may do besides computing its result, or None.

    Submodules may be called, because the caller asks about each of them. Work in place is no effect
    here: the caller looks for it in the recorded operations.

    Example:
        >>> layer = nn.ReLU()
        >>> layer.forward = print
        >>> effect_of(nn.Sequential()), effect_of(layer)
        (None, 'the forward of ReLU is not that of its class')
    """
    cls = type(module)
    if "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
        return f"the forward of {cls.__name__} is not that of its class"
    for base in cls.__mro__:
        forward = vars(base).get("forward")
        if forward is None:
            continue
        if base.__module__.partition(".")[0] in _TRACED_LIBRARIES:
            return None
        reader = _Reader(module, in_place=True, fixed=False, inherits=True, submodules=True)
        if not reader.is_pure(forward, 0):
            found = f" ({reader.found})" if reader.found else ""
            return f"{base.__name__}.forward may do more than compute its result{found}"
        if "super" not in forward.__code__.co_names:
            return None
    return None


_LIBRARIES = ("torch", "torchquant", "transformers", "timm", "torchvision", "diffusers")
_TRACED_LIBRARIES = ("torch", "torchquant", "timm", "torchvision")
_UNKNOWN = object()
_TABLES = (tuple, list, dict, OrderedDict)
_DATA = (int, float, str, tuple, torch.Tensor)


def _can_change(module: nn.Module, name: str, value: Any) -> bool:
    """True if an attribute's value can change without an assignment to it."""
    if isinstance(value, (nn.Module, torch.Tensor)):
        return True
    return name not in module.__dict__ and not callable(value)


class _Reader:
    """Reads the functions that a module's forward calls."""

    def __init__(
        self,
        module: nn.Module,
        in_place: bool,
        fixed: bool,
        inherits: bool = False,
        submodules: bool = False,
    ) -> None:
        self.module = module
        self.in_place = in_place
        self.fixed = fixed
        self.inherits = inherits  # whether super().forward may be called
        self.submodules = submodules  # whether modules below this one may be called
        self.known = {id(child) for child in module.modules()} if submodules else set()
        self.tensors = {id(t) for t in (*module.parameters(), *module.buffers())}
        self.found = ""  # the name at which the first function that is not pure was left

    def is_pure(self, function: Any, depth: int, *, bound: bool = True) -> bool:
        """True if a function, or a method of the module if ``bound``, only computes."""
        if isinstance(function, MethodType):
            if function.__self__ is not self.module:
                return False
            function, bound = function.__func__, True
        if not isinstance(function, FunctionType) or depth > _MAX_DEPTH:
            return False
        if str(function.__module__).startswith("torch."):
            return True
        if self.submodules and str(function.__module__).partition(".")[0] in _TRACED_LIBRARIES:
            return True
        inherits = self.inherits and function.__code__.co_freevars == ("__class__",)
        if getattr(function, "__wrapped__", None) is not None:
            return False
        if function.__closure__ and not inherits:
            return False
        return self._is_pure_code(function, depth, bound)

    def _is_pure_code(self, function: FunctionType, depth: int, bound: bool) -> bool:
        code = function.__code__
        owner = code.co_varnames[0] if bound and code.co_argcount else None
        return self._only_computes(code, function.__globals__, owner, depth, frozenset())

    def _only_computes(
        self,
        code: CodeType,
        variables: dict[str, Any],
        owner: str | None,
        depth: int,
        outer: frozenset[str],
    ) -> bool:
        """True if the code does; ``outer`` names the variables of the function around it."""
        shared = outer | frozenset(code.co_cellvars) if self.submodules else frozenset()
        value: Any = None  # what the last instructions loaded, if it is known
        for instruction in _instructions(code):
            name, argument = instruction.opname, instruction.argval
            if self.submodules:
                if isinstance(argument, str):
                    self.found = argument
                if isinstance(argument, CodeType) and not (
                    argument.co_name in _COMPREHENSIONS
                    and self._only_computes(argument, variables, owner, depth, shared)
                ):
                    return False
                if _is_of_comprehension(instruction, code, shared):
                    value = self.module if argument == owner else None
                    continue
                if _works_in_place(instruction):
                    value = None
                    continue
            if self.inherits and argument in ("super", "__class__"):
                value = super
                continue
            if self.inherits and (value is super or name == "LOAD_SUPER_ATTR"):
                if name in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                    value = None
                    if argument != "forward":
                        return False
                continue  # the call of super()
            if not _is_harmless(instruction, self.in_place):
                return False
            if name == "LOAD_GLOBAL":
                missing = argument not in variables
                value = getattr(builtins, argument, None) if missing else variables[argument]
                if argument not in _BUILTINS if missing else not self._is_known(value, depth):
                    return False
                if self.fixed and isinstance(value, _DATA):
                    return False
            elif name.startswith("LOAD_FAST"):
                last = argument[-1] if isinstance(argument, tuple) else argument
                value = self.module if last == owner else None
            elif name in ("LOAD_ATTR", "LOAD_METHOD"):
                if argument.endswith("_") and not argument.endswith("__") and not self.in_place:
                    return False
                base, value = value, _attribute(value, argument)
                if value is _UNKNOWN or not self._is_known(value, depth):
                    return False
                if self.fixed and base is self.module and _can_change(base, argument, value):
                    return False
            elif name not in ("PUSH_NULL", "CACHE", "PRECALL", "EXTENDED_ARG", "RESUME"):
                value = None
        return True

    def _is_known(self, value: Any, depth: int) -> bool:
        """True if reading or calling the value has no effects."""
        if isinstance(value, torch.Tensor):
            # Another tensor is no placeholder in a record: work on it would be done at once.
            return not self.submodules or id(value) in self.tensors
        if value is None or isinstance(value, (int, float, str, tuple, torch.dtype)):
            return True
        if isinstance(value, ModuleType):
            return value.__name__ in _MODULES or (self.submodules and value.__name__ == "operator")
        if isinstance(value, BuiltinFunctionType):
            owner = str(getattr(value, "__module__", None))  # of a method of an object: None
            return owner == "math" or owner.startswith("torch")
        if isinstance(value, functools.partial):
            return "inplace" not in value.keywords and self._is_known(value.func, depth)
        of = value.__self__ if isinstance(value, MethodType) else None
        if isinstance(of, nn.Module) and of is not self.module and id(of) in self.known:
            other = _Reader(of, True, False, inherits=True, submodules=True)
            return other.is_pure(value.__func__, depth + 1)
        if isinstance(value, (FunctionType, MethodType)):
            return self.is_pure(value, depth + 1, bound=False)
        if isinstance(value, nn.Module):
            if id(value) in self.known:
                return True
            leaf = not value._modules and is_pure(value, in_place=self.in_place)
            return value is self.module or leaf
        if isinstance(value, type):
            named = value.__bases__ == (tuple,) and hasattr(value, "_fields")
            return named or value in (torch.Tensor, float, int, bool, *_TABLES)
        return type(value).__module__.startswith("torch")


def _is_of_comprehension(
    instruction: dis.Instruction, code: CodeType, shared: frozenset[str]
) -> bool:
    """True if the instruction belongs to a comprehension, or to the variables that it reads."""
    name, argument = instruction.opname, instruction.argval
    if name in ("LOAD_DEREF", "STORE_DEREF", "LOAD_CLASSDEREF"):
        return argument in shared and argument != "__class__"
    if name == "YIELD_VALUE":
        return code.co_name == "<genexpr>"
    return name == "MAKE_FUNCTION"  # the code of the function was read before


def _instructions(code: CodeType) -> Iterator[dis.Instruction]:
    """The instructions, in which the names of arguments are the tuple of these names.

    Python 3.11 does not look them up by itself.
    """
    for instruction in dis.get_instructions(code):
        if instruction.opname == "KW_NAMES" and instruction.arg is not None:
            instruction = instruction._replace(argval=code.co_consts[instruction.arg])
        yield instruction


def _works_in_place(instruction: dis.Instruction) -> bool:
    """True for ``x += y`` on a variable, and for an argument ``inplace``."""
    name, argument, text = instruction.opname, instruction.argval, instruction.argrepr
    if name.startswith("INPLACE_") or (name == "BINARY_OP" and text.endswith("=")):
        return True
    named = name in ("KW_NAMES", "LOAD_CONST") and isinstance(argument, tuple)
    return named and "inplace" in argument and "out" not in argument


def _is_harmless(instruction: dis.Instruction, in_place: bool) -> bool:
    """False if the instruction stores something, or names an argument that asks for it.

    An argument that asks for work in place is harmless if ``in_place``.
    """
    name, argument, text = instruction.opname, instruction.argval, instruction.argrepr
    if name in _STORES or name in _OTHER or name.startswith("INPLACE_"):
        return False
    if name == "BINARY_OP" and text.endswith("=") and text not in ("==", "<=", ">=", "!="):
        return False
    names = argument if name in ("KW_NAMES", "LOAD_CONST") and type(argument) is tuple else ()
    return not ("out" in names or ("inplace" in names and not in_place))


def _attribute(base: Any, name: str) -> Any:
    """The attribute of a torch module, a torch namespace, or None for an attribute of a tensor."""
    if base is None:
        return None
    if isinstance(base, nn.Module):
        in_class = getattr(type(base), name, None)
        computed = hasattr(type(in_class), "__get__") and not isinstance(in_class, FunctionType)
        if computed or type(base).__getattr__ is not nn.Module.__getattr__:
            return _UNKNOWN
        return getattr(base, name, _UNKNOWN)
    if isinstance(base, ModuleType):
        if any(name.startswith(word) for word in _CHANGES_STATE):
            return _UNKNOWN
        return getattr(base, name, _UNKNOWN)
    return None


__all__ = ["is_pure"]
