"""Activation modules that use the library's operators: the same objects, with a subclass as class.

:func:`replace_activation_` changes the class of a module to a subclass of its own class. The module
stays the same object with the same name, attributes, hooks and ``isinstance`` results. Its forward
uses one operator of the library where the module's own function is known, and the forward of its
own class everywhere else.

A layer before the activation may have applied the function already. In that case, and only then,
the layer marks its output, and the forward returns the marked tensor as it is
(:mod:`torchquant.nn.call_guard` says when a layer may do that).
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchquant import ops
from torchquant._extension import load

_fast_activation = load().activation
_is_compiling = torch.compiler.is_compiling  # torch.export too
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_EXACT = frozenset(("relu", "relu6"))  # they round nothing
_DEVICES = frozenset(("cpu", "cuda"))


class ReplacedActivation(nn.Module):
    """Mix-in of the classes that :func:`replace_activation_` makes; it has no instances.

    Attributes:
        original_class: the class that the module had before.
        original_forward: the forward of that class when the module was replaced.
        function: the function that the module computes, a name in ``functional.ACTIVATIONS``.
    """

    original_class: ClassVar[type[nn.Module]]
    original_forward: ClassVar[Any]
    function: str
    _uses_operator: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the values of the module's own class; other rounding is possible."""
        plain = False
        if len(args) == 1 and type(args[0]) is Tensor and not _is_dynamo_compiling():
            if args[0].__dict__.pop("_activated_for", None) is self:
                return args[0]
            plain = not args[0].is_nested
        if not isinstance(self, ReplacedActivation):  # a bound method that outlived the replacement
            return type(self).forward(self, *args, **kwargs)
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            input = args[0]
            if self._uses_operator and input.dtype in _DTYPES and input.device.type in _DEVICES:
                if plain and not self.is_patched():
                    return _fast_activation(input, self.function)
                if _is_compiling():  # the compiled program computes the bits of eager mode
                    return ops.activation(input, self.function)
        return self.original_class.forward(self, *args, **kwargs)

    def is_patched(self) -> bool:
        """True if somebody replaced the forward or the call of the module's own class."""
        cls: Any = type(self)
        own = cls.original_class
        return own.forward is not cls.original_forward or own.__call__ is not nn.Module.__call__

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the module computes with its own class if an option changes."""
        super().__setattr__(name, value)
        if name not in ("training", "forward") and not name.startswith("_"):
            restore_activation_(self)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name != "forward" and not name.startswith("_"):
            restore_activation_(self)

    def _get_name(self) -> str:
        return f"{self.original_class.__name__}[torchquant]"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        own = getattr(super(), "__getstate__", None)
        state = self.__dict__.copy() if own is None else own()
        return _rebuilt, (self.original_class,), state


def mark(output: Tensor, place: ReplacedActivation) -> Tensor:
    """Say that ``output`` holds the values of ``place`` already; ``place`` returns it as it is."""
    output._activated_for = place  # type: ignore[attr-defined]
    return output


def has_same_bits(function: str, input: Tensor) -> bool:
    """True if a layer that applies the function gives the bits of the layer and the module.

    The layer rounds its result to the dtype of the output once, the two round twice. ReLU and ReLU6
    commute with rounding, and a float32 output is not rounded.
    """
    full = input.dtype is torch.float32 and not _is_any_autocast_enabled()
    return full or function in _EXACT


def replace_activation_(module: nn.Module, function: str) -> None:
    """Let a module compute its function with the library's operator.

    Args:
        module: a module that computes ``function``; its class changes to a subclass.
        function: a name in ``functional.ACTIVATIONS``.

    Raises:
        TypeError: the class of the module cannot be changed.

    Example:
        >>> module = nn.GELU()
        >>> replace_activation_(module, "gelu")
        >>> module, isinstance(module, nn.GELU), module(torch.zeros(1))
        (GELU[torchquant](approximate='none'), True, tensor([0.]))
        >>> restore_activation_(module)
        >>> module
        GELU(approximate='none')
    """
    cls: Any = type(module)
    module.__class__ = _replacement(cls)
    # These are exact in torch, and a module that works in place must keep doing so.
    exact = function in _EXACT or bool(getattr(module, "inplace", False))
    module.__dict__.update(function=function, _uses_operator=not exact)


def restore_activation_(module: nn.Module) -> None:
    """Undo :func:`replace_activation_`; other modules stay unchanged."""
    if isinstance(module, ReplacedActivation):
        for name in ("function", "_uses_operator"):
            module.__dict__.pop(name, None)
        module.__class__ = module.original_class  # type: ignore[assignment]


@functools.cache
def _replacement(cls: Any) -> Any:
    body = {
        "original_class": cls,
        "original_forward": cls.forward,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    return type(cls)(cls.__name__, (ReplacedActivation, cls), body)


def _rebuilt(cls: Any) -> Any:
    """An empty module; called by pickle and copy, which set its state."""
    replacement = _replacement(cls)
    return replacement.__new__(replacement)
