"""The call of a layer, as it happens: may the layer compute more than its own output?

A layer may apply the activation that follows it, and compute the outputs of the layers after it
that read the same tensor, only if nobody can notice. In each call the layer looks at the function
that calls it. The bytecode around the call (:mod:`torchquant.graph.call_sites`) says what happens
to the result next. The modules that the calling object holds at this moment say which modules these
are. The layer computes its own output alone in every other situation: another method or place calls
it, it or its neighbour has hooks, the result is used twice, a neighbour was replaced, a mode of
torch watches the operators.

There is no earlier proof that could become wrong later, and no user code runs to find out.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from torchquant.graph.call_sites import Call, CallSites, Item, Path, call_sites
from torchquant.graph.modules import has_hooks
from torchquant.graph.purity import is_pure
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.replaced_activation import ReplacedActivation

# forward <- _call_impl <- _wrapped_call_impl <- caller of the layer. A hook adds a frame, and a
# wrapper is another function, so a layer with hooks or wrappers does not find its caller.
_CALL_IMPL = nn.Module._call_impl.__code__
_WRAPPED_CALL_IMPL = nn.Module._wrapped_call_impl.__code__
_call_of_module: Any = nn.Module.__call__

_SEQUENTIAL = nn.Sequential.forward.__code__
_KNOWN_SEQUENTIAL = _SEQUENTIAL.co_varnames == ("self", "input", "module")
# Types whose operators and methods are no user code.
_PLAIN_DATA = (int, float, bool, str, tuple, type(None), torch.Size, torch.Tensor, nn.Parameter)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_MAX_SITES = 20_000
_F_LOCALS_IS_A_COPY = sys.version_info < (3, 13)

_module_getattr = nn.Module.__getattr__
_object_getattribute: Any = object.__getattribute__
_trace_function, _profile_function = sys.gettrace, sys.getprofile
_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack

# By (id of the code, offset). An entry holds its code, so that an id cannot be used again.
_sites: dict[tuple[int, int], tuple[CodeType, Call | None]] = {}
_functions: dict[int, CallSites] = {}  # by the id of the code
# By id: the module, its class, and whether its forward only computes.
_quiet: dict[int, tuple[weakref.ref[nn.Module], type, bool]] = {}


def call_at(frame: FrameType) -> Call | None:
    """The call that a frame executes, if its surroundings permit to compute more; or None."""
    code = frame.f_code
    found = _sites.get((id(code), frame.f_lasti))
    if found is None or found[0] is not code:
        found = _learn(code, frame.f_lasti)
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


def _learn(code: CodeType, offset: int) -> tuple[CodeType, Call | None]:
    if len(_sites) >= _MAX_SITES:  # functions that are made again and again
        _sites.clear()
    call: Call | None
    if code is _SEQUENTIAL:
        call = Call(code, "self", offset, offset + 1, follow=()) if _KNOWN_SEQUENTIAL else None
    else:
        call = _calls_of(code).at(offset)
        if call is not None and call.follow is None and not call.chain and not call.in_chain:
            call = None
    entry = _sites[(id(code), offset)] = (code, call)
    return entry


def _calls_of(code: CodeType) -> CallSites:
    """The calls of a function; the same objects each time, so that calls can be compared."""
    known = _functions.get(id(code))
    if known is None or known.code is not code:
        if len(_functions) >= _MAX_SITES:
            _functions.clear()
        known = _functions[id(code)] = call_sites(code)
    return known


def calling_frame(first: FrameType) -> FrameType | None:
    """The frame that calls a module, or None if other code than torch's runs between the two.

    Args:
        first: the frame that calls the module's forward.
    """
    if first.f_code is not _CALL_IMPL:
        return None
    second = first.f_back
    if second is None or second.f_code is not _WRAPPED_CALL_IMPL:
        return None
    return second.f_back


def activation_after(layer: nn.Module, frame: FrameType, call: Call) -> ReplacedActivation | None:
    """The activation module that receives the output of ``layer``, and nothing else does; or None.

    Args:
        layer: the layer that is called.
        frame: the frame of the caller.
        call: the call that the frame executes.
    """
    if call.follow is None:
        return None
    if call.code is _SEQUENTIAL and frame.f_locals.get("module") is not layer:
        return None  # the module that is called uses the forward of the layer
    return follower(layer, owner_of(frame, call), call)


def follower(layer: nn.Module, owner: Any, call: Call) -> ReplacedActivation | None:
    """:func:`activation_after` for a call whose owner is known."""
    if call.follow is None:
        return None
    try:
        if call.code is _SEQUENTIAL:
            place = _next_in(owner, layer)
        elif module_at(owner, call.path) is layer:
            place = module_at(owner, call.follow)
        else:
            return None
        if not isinstance(place, ReplacedActivation):
            return None
        if call.earlier and not all(is_quiet(module_at(owner, path)) for path in call.earlier):
            return None
        state = place.__dict__
        if (
            state["_forward_pre_hooks"]
            or state["_forward_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
            or place._compiled_call_impl is not None
            or place.is_patched()
        ):
            return None
    except (AttributeError, KeyError):  # the owner is no ordinary module
        return None
    return place


def activation_after_call(layer: nn.Module) -> ReplacedActivation | None:
    """:func:`activation_after` for the call in which a layer's forward calls this function."""
    try:
        frame = calling_frame(sys._getframe(2))
    except ValueError:  # the call stack is shallower
        return None
    call = None if frame is None else call_at(frame)
    return None if frame is None or call is None else activation_after(layer, frame, call)


def is_quiet(module: Any) -> bool:
    """True if a call of the module only computes its result: no hooks, no effects."""
    known = _quiet.get(id(module))
    if known is None or known[0]() is not module or known[1] is not type(module):
        if not isinstance(module, nn.Module):
            return False
        ours = isinstance(module, (QuantizedModule, TrainedModule, ReplacedActivation))
        known = (weakref.ref(module), type(module), ours or is_pure(module))
        if len(_quiet) >= _MAX_SITES:
            _quiet.clear()
        _quiet[id(module)] = known
    return known[2] and not has_hooks(module) and "forward" not in module.__dict__


def reads_run_no_code(owner: Any, paths: Iterable[Path]) -> bool:
    """True if reading some paths from the owner of a call, and using the values, runs no user code.

    A property, a ``__getattr__`` or an operator of a class may change a tensor.
    """
    try:
        return all(_is_plain(owner, path) for path in paths)
    except (AttributeError, KeyError):  # the owner is no ordinary module
        return False


def _is_plain(owner: Any, path: Path) -> bool:
    module = module_at(owner, path)
    if isinstance(module, nn.Module):
        return True
    for step in path[:-1]:
        owner = module_at(owner, (step,))
    name = path[-1]
    cls = type(owner)
    if isinstance(name, Item) or cls.__getattribute__ is not _object_getattribute:
        return False
    places = [owner.__dict__, *map(vars, cls.__mro__)]
    if name in owner.__dict__ and not any(name in place for place in places[1:]):
        return type(owner.__dict__[name]) in _PLAIN_DATA
    if name not in owner.__dict__ and hasattr(cls, name):  # a constant of the class
        found = next((place[name] for place in places if name in place), None)
        return type(found) in _PLAIN_DATA
    tensor = owner._parameters.get(name, owner._buffers.get(name))
    return cls.__getattr__ is _module_getattr and type(tensor) in _PLAIN_DATA


def owner_of(frame: FrameType, call: Call) -> Any:
    """The object that the first parameter of the calling function holds."""
    variables = frame.f_locals
    owner = variables.get(call.owner)
    if _F_LOCALS_IS_A_COPY:
        variables.clear()  # the copy would keep tensors alive until the caller returns
    return owner


def module_at(owner: Any, path: Path) -> Any:
    """The module that ``owner.a.b`` yields for the path ("a", "b"), or None if that is uncertain.

    No code of the owner's class runs. The result is None if a class computes attributes itself.
    """
    for step in path:
        cls = type(owner)
        if isinstance(step, Item):
            key = step.key
            if cls not in _CONTAINERS or (isinstance(key, int) and key < 0):
                return None
            owner = owner._modules.get(str(key))
            continue
        if (
            cls.__getattr__ is not _module_getattr
            or cls.__getattribute__ is not _object_getattribute
            or hasattr(cls, step)
            or step in owner.__dict__
        ):
            return None
        owner = owner.__dict__["_modules"].get(step)
    return owner


def _next_in(sequential: Any, layer: nn.Module) -> Any:
    """The module after ``layer`` in a Sequential, or None if that is not always the same one."""
    if type(sequential).__iter__ is not nn.Sequential.__iter__:
        return None
    following: Any = None
    modules = list(sequential.__dict__["_modules"].values())
    for index, module in enumerate(modules):
        if module is layer:
            after = modules[index + 1] if index + 1 < len(modules) else None
            if after is None or (following is not None and after is not following):
                return None
            following = after
    return following


__all__ = [
    "activation_after",
    "activation_after_call",
    "call_at",
    "calling_frame",
    "follower",
    "is_quiet",
    "module_at",
    "owner_of",
    "reads_run_no_code",
]
