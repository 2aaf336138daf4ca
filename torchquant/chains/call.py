"""The arguments of a call of a region: those of the record, or others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchquant.graph.trace import Trace


def bound(trace: Trace, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | None:
    """The tensor arguments in their order; None if the record does not hold for the call.

    Example:
        >>> import torch
        >>> trace = Trace((), (), ("x",), {"scale": 1.0}, (), ("x", "scale"))
        >>> x = torch.zeros(2)
        >>> bound(trace, (), {"x": x}), bound(trace, (x, 2.0), {})
        ([tensor([0., 0.])], None)
    """
    names, order = trace.inputs, trace.order
    if len(args) == len(names) and not kwargs and order[: len(names)] == names:
        inputs = list(args)
    else:
        given = dict(zip(order, args, strict=False))
        if len(args) > len(order) or given.keys() & kwargs.keys():
            return None  # Python will say what is wrong
        given |= kwargs
        if not given.keys() <= {*names, *trace.defaults}:
            return None
        for name, default in trace.defaults.items():
            if not is_same(given.get(name, default), default):
                return None
        if not all(name in given for name in names):
            return None
        inputs = [given[name] for name in names]
    return inputs if all(isinstance(item, Tensor) for item in inputs) else None


def misfit(trace: Trace, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What of a call is not as in the record: the type or the value of an argument.

    Example:
        >>> misfit(Trace((), (), ("x",), {"scale": 1.0}, (), ("x", "scale")), ([],), {})
        'its argument x was no tensor but list'
    """
    given = {**dict(zip(trace.order, args, strict=False)), **kwargs}
    for name in trace.inputs:
        if not isinstance(given.get(name), Tensor):
            return f"its argument {name} was no tensor but {type(given.get(name)).__name__}"
    for name in given.keys() - set(trace.inputs):
        if not is_same(given[name], trace.defaults.get(name)):
            return f"its argument {name} had another value than the default"
    return "it was called with other arguments than those of its forward"


def is_same(value: Any, default: Any) -> bool:
    """True if an argument is the default, or an equal number or text, or a tuple of such."""
    if type(value) is type(default) is tuple and len(value) == len(default):
        return all(map(is_same, value, default))
    plain = type(value) is type(default) and isinstance(value, (bool, int, float, str, bytes))
    return value is default or (plain and value == default)
