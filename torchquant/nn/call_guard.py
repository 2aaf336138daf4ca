"""The call of a layer, as it happens: may the layer compute more than its own output?

A layer may apply the activation that follows it, and compute the outputs of the layers after it
that read the same tensor, only if nobody can notice. In each call the layer looks at the function
that calls it. The bytecode around the call (:mod:`torchquant.graph.call_sites`) says what happens
to the result next. The modules that the calling object holds at this moment say which modules these
are. The layer computes its own output alone in every other situation: another method or place calls
it, it or its neighbour has hooks, the result is used twice, a neighbour was replaced, a mode of
torch watches the operators.

There is no earlier proof that could become wrong later, and no user code runs to find out.

Two kinds of code can still notice: code that reads the variables of another function (through
``sys._getframe``, ``sys.monitoring`` or a traceback), and a ``__del__`` that changes the memory of
a tensor which counts no changes, between two layers that read this tensor.
"""

from __future__ import annotations

import weakref
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._extension import load
from torchquant.graph.calls import Call, Item, Path
from torchquant.graph.modules import has_hooks
from torchquant.graph.purity import is_pure
from torchquant.nn import caller as specification
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.replaced_activation import ReplacedActivation, has_same_bits

_library = load()
_library.set_up_caller(
    specification.CALL_IMPL,
    specification.WRAPPED_CALL_IMPL,
    specification.MODULE_GETATTR,
    specification.OBJECT_GETATTRIBUTE,
    specification.ITEMS,
    ReplacedActivation,
    nn.Module,
    nn.Module.__call__,
    specification.learn,
)
# As in torchquant.nn.caller.
caller, local, module_at = _library.caller, _library.local, _library.module_at
follower, is_plain_activation = _library.follower, _library.is_plain_activation
holder = _library.holder

# Types whose operators and methods are no user code.
_PLAIN_DATA = (int, float, bool, str, tuple, type(None), torch.Size, torch.Tensor, nn.Parameter)
_MAX_MODULES = 20_000
# By id: the module, its class, and whether its forward only computes.
_quiet: dict[int, tuple[weakref.ref[nn.Module], type, bool]] = {}


def activation_after(
    layer: nn.Module, input: Tensor, frame: FrameType, call: Call
) -> ReplacedActivation | None:
    """The activation module that receives the output of ``layer``, and nothing else does; or None.

    Args:
        layer: the layer that is called.
        input: the input of the layer.
        frame: the frame of the caller.
        call: the call that the frame executes.
    """
    if call.follow is None:
        return None
    if call.code is specification.SEQUENTIAL and local(frame, 2) is not layer:
        return None  # the module that is called uses the forward of the layer
    return activation_of(layer, input, local(frame, 0), call)


def activation_of(
    layer: nn.Module, input: Tensor, owner: Any, call: Call
) -> ReplacedActivation | None:
    """:func:`activation_after` for a call whose owner is known."""
    if call.follow is None:
        return None
    try:
        if call.code is specification.SEQUENTIAL:
            place = _next_in(owner, layer)
            place = place if is_plain_activation(place) else None
        else:
            place = follower(layer, owner, call.path, call.follow)
        if place is None or not has_same_bits(place.function, input):
            return None
        if call.earlier and not all(is_quiet(module_at(owner, path)) for path in call.earlier):
            return None
    except (AttributeError, KeyError):  # the owner is no ordinary module
        return None
    return place  # type: ignore[no-any-return]


def activation_after_call(layer: nn.Module, input: Tensor) -> ReplacedActivation | None:
    """:func:`activation_after` for the call in which a layer's forward calls this function."""
    found = caller(1)
    return None if found is None else activation_after(layer, input, *found)


def is_quiet(module: Any) -> bool:
    """True if a call of the module only computes its result: no hooks, no effects."""
    known = _quiet.get(id(module))
    if known is None or known[0]() is not module or known[1] is not type(module):
        if not isinstance(module, nn.Module):
            return False
        ours = isinstance(module, (QuantizedModule, TrainedModule, ReplacedActivation))
        known = (weakref.ref(module), type(module), ours or is_pure(module))
        if len(_quiet) >= _MAX_MODULES:
            _quiet.clear()
        _quiet[id(module)] = known
    return known[2] and not has_hooks(module) and "forward" not in module.__dict__


def reads_run_no_code(owner: Any, paths: tuple[Path, ...]) -> bool:
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
    if isinstance(name, Item) or cls.__getattribute__ is not specification.OBJECT_GETATTRIBUTE:
        return False
    places = [owner.__dict__, *map(vars, cls.__mro__)]
    if name in owner.__dict__ and not any(name in place for place in places[1:]):
        return type(owner.__dict__[name]) in _PLAIN_DATA
    if name not in owner.__dict__ and hasattr(cls, name):  # a constant of the class
        found = next((place[name] for place in places if name in place), None)
        return type(found) in _PLAIN_DATA
    tensor = owner._parameters.get(name, owner._buffers.get(name))
    return cls.__getattr__ is specification.MODULE_GETATTR and type(tensor) in _PLAIN_DATA


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
