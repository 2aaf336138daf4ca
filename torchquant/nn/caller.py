"""The frames and modules around the call of a layer, read in Python: the specification.

:mod:`torchquant.nn.call_guard` uses the same functions in C++ (``csrc/caller.cpp``), which take a
tenth of the time. Tests compare the two, and plant faults here.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from torchquant.graph.call_sites import CallSites, call_sites
from torchquant.graph.calls import Call, Item, Path
from torchquant.nn.replaced_activation import ReplacedActivation

# forward <- _call_impl <- _wrapped_call_impl <- caller of the layer. A hook adds a frame, and a
# wrapper is another function, so a layer with hooks or wrappers does not find its caller.
CALL_IMPL = nn.Module._call_impl.__code__
WRAPPED_CALL_IMPL = nn.Module._wrapped_call_impl.__code__
SEQUENTIAL = nn.Sequential.forward.__code__
# The method that reads an element of a container; another one could run code.
ITEMS: dict[Any, Any] = {
    cls: cls.__getitem__ for cls in (nn.ModuleList, nn.ModuleDict, nn.Sequential)
}
MODULE_GETATTR: Any = nn.Module.__getattr__
OBJECT_GETATTRIBUTE: Any = object.__getattribute__

_KNOWN_SEQUENTIAL = SEQUENTIAL.co_varnames == ("self", "input", "module")
_MAX_SITES = 20_000
_F_LOCALS_IS_A_COPY = sys.version_info < (3, 13)

_trace_function, _profile_function = sys.gettrace, sys.getprofile
_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack

# By (id of the code, offset). An entry holds its code, so that an id cannot be used again.
_sites: dict[tuple[int, int], tuple[CodeType, Call | None]] = {}
_functions: dict[int, CallSites] = {}  # by the id of the code


def caller(skip: int) -> tuple[FrameType, Call] | None:
    """The frame that calls a module, and the call; None if nothing more may be computed in it.

    Args:
        skip: the number of frames between the module's forward and the code that asks.
    """
    try:
        frame = calling_frame(sys._getframe(skip + 2))
    except ValueError:  # the call stack is shallower
        return None
    call = None if frame is None else call_at(frame)
    return None if frame is None or call is None else (frame, call)


def calling_frame(first: FrameType) -> FrameType | None:
    """The frame that calls a module, or None if other code than torch's runs between the two.

    Args:
        first: the frame that calls the module's forward.
    """
    if first.f_code is not CALL_IMPL:
        return None
    second = first.f_back
    if second is None or second.f_code is not WRAPPED_CALL_IMPL:
        return None
    return second.f_back


def call_at(frame: FrameType) -> Call | None:
    """The call that a frame executes, if its surroundings permit to compute more; or None."""
    code = frame.f_code
    found = _sites.get((id(code), frame.f_lasti))
    if found is None or found[0] is not code:
        if len(_sites) >= _MAX_SITES:  # functions that are made again and again
            _sites.clear()
        found = _sites[(id(code), frame.f_lasti)] = (code, learn(frame))
    call = found[1]
    if call is None or _function_modes() or _dispatch_modes() or _watched():
        return None
    return call


def _watched() -> bool:
    """True if a Python function sees the values that functions return: a debugger, a profiler."""
    if _trace_function() is not None:
        return True
    profiler = _profile_function()
    return isinstance(profiler, (FunctionType, MethodType))  # others see times only


def learn(frame: FrameType) -> Call | None:
    """What surrounds the call of a frame; None if nothing more than the call can be computed."""
    code, offset = frame.f_code, frame.f_lasti
    if code is SEQUENTIAL:
        return Call(code, "self", offset, offset + 1, follow=()) if _KNOWN_SEQUENTIAL else None
    call = _calls_of(frame).at(offset)
    if call is not None and call.follow is None and not call.chain and not call.in_chain:
        return None
    return call


def _calls_of(frame: FrameType) -> CallSites:
    """The calls of a function; the same objects each time, so that calls can be compared."""
    code = frame.f_code
    known = _functions.get(id(code))
    if known is None or known.code is not code:
        if len(_functions) >= _MAX_SITES:
            _functions.clear()
        held = frame.f_globals
        modules = frozenset(n for n in code.co_names if type(held.get(n)) is ModuleType)
        known = _functions[id(code)] = call_sites(code, modules)
    return known


def local(frame: FrameType, index: int) -> Any:
    """The value of a function's parameter or variable by its index, or None."""
    variables = frame.f_locals
    value = variables.get(frame.f_code.co_varnames[index])
    if _F_LOCALS_IS_A_COPY:
        variables.clear()  # the copy would keep tensors alive until the caller returns
    return value


def module_at(owner: Any, path: Path) -> Any:
    """The module that ``owner.a.b`` yields for the path ("a", "b"), or None if that is uncertain.

    No code of the owner's class runs. The result is None if a class computes attributes itself.
    """
    for step in path:
        cls = type(owner)
        if isinstance(step, Item):
            key = step.key
            get = ITEMS.get(cls)
            if get is None or get is not cls.__getitem__ or (isinstance(key, int) and key < 0):
                return None
            owner = owner.__dict__["_modules"].get(str(key))
            continue
        if (
            cls.__getattr__ is not MODULE_GETATTR
            or cls.__getattribute__ is not OBJECT_GETATTRIBUTE
            or hasattr(cls, step)
            or step in owner.__dict__
        ):
            return None
        owner = owner.__dict__["_modules"].get(step)
    return owner


def holder(layer: Any, owner: Any, path: Path, reads: tuple[Path, ...]) -> Any:
    """The module that holds a layer at a path of the owner; None if another module is there.

    None also if a path in ``reads`` does not lead to a module.
    """
    try:
        modules = [module_at(owner, read) for read in reads]
        if layer is None or module_at(owner, path) is not layer:
            return None
        plain = all(isinstance(module, nn.Module) for module in modules)
        return module_at(owner, path[:-1]) if plain else None
    except (AttributeError, KeyError):  # the owner is no ordinary module
        return None


def follower(layer: nn.Module, owner: Any, path: Path, follow: Path) -> Any:
    """The activation at a path that receives the output of the layer at another path; or None."""
    try:
        if module_at(owner, path) is not layer:
            return None
        place = module_at(owner, follow)
        return place if is_plain_activation(place) else None
    except (AttributeError, KeyError):  # the owner is no ordinary module
        return None


def is_plain_activation(place: Any) -> bool:
    """True if a call of an activation runs its forward only: no hooks, no patched class."""
    if not isinstance(place, ReplacedActivation):
        return False
    state = place.__dict__
    hooks = (
        state["_forward_pre_hooks"]
        or state["_forward_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )
    if hooks or place._compiled_call_impl is not None:
        return False
    return "forward" not in state and not place.is_patched()


def forget() -> None:
    """Forget what is known about functions; for tests."""
    _sites.clear()
    _functions.clear()
