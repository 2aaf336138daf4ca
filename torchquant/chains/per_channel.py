"""Recognises calls with one number for each channel, which is a parameter or a Python number.

The numbers may be results of calls that read only parameters, such as ``gamma.view(1, -1, 1, 1)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.chains.arguments import arguments_of
from torchquant.chains.operations import Affine, Norm, Operation, Shape
from torchquant.functional import norm_as_affine
from torchquant.graph.trace import Call, Ref, Trace, called, filled

# What may be computed with parameters alone: always the same.
_PURE = frozenset(
    (
        *("view", "reshape", "unsqueeze", "squeeze", "getitem", "transpose", "permute", "flatten"),
        *("mul", "add", "sub", "div", "neg", "exp", "sqrt", "rsqrt", "sigmoid", "abs", "tanh"),
        *("expand", "contiguous", "to", "float", "detach", "clamp"),
    )
)


def constants(trace: Trace) -> set[int]:
    """The calls whose results follow from parameters and buffers alone.

    Example:
        >>> calls = Call("input", "x"), Call("tensor", "gamma"), Call("method", "view", (Ref(1), 3))
        >>> constants(Trace(calls, Ref(0), ("x",), {}, ()))
        {1, 2}
    """
    found: set[int] = set()
    for index, call in enumerate(trace.calls):
        if call.kind == "tensor":
            found.add(index)
        elif call.kind in ("function", "method") and call.reads():
            pure = arguments_of(call, None)[0] in _PURE
            if pure and all(read in found for read in call.reads()):
                found.add(index)
    return found


def with_numbers(
    trace: Trace,
    modules: Sequence[nn.Module | None],
    operations: Sequence[Operation],
    shapes: Sequence[Shape],
) -> list[Operation]:
    """The operations, in which those with one number for each channel are known.

    Args:
        trace: the calls.
        modules: the module that each of them calls, or None.
        operations: what they compute, as far as it is known.
        shapes: the shapes of their results.
    """
    known = constants(trace)
    found = list(operations)
    for index, call in enumerate(trace.calls):
        if index in known or call.kind in ("input", "tensor"):
            continue
        name, values = arguments_of(call, modules[index])
        recognizer = _KNOWN.get(name)
        if recognizer is None or not values:
            continue
        operation = recognizer(values, _Around(call, modules[index], shapes, shapes[index], known))
        if operation is not None:
            found[index] = operation
    return found


class _Around:
    """What surrounds a call."""

    def __init__(
        self,
        call: Call,
        module: nn.Module | None,
        shapes: Sequence[Shape],
        shape: Shape,
        constants: set[int],
    ) -> None:
        self.call, self.module, self.shapes = call, module, shapes
        self.shape, self.constants = shape, constants

    def is_value(self, item: Any) -> bool:
        """True if an argument is a result that has the shape of the call's."""
        if not isinstance(item, Ref) or item.index in self.constants or self.shape is None:
            return False
        return self.shapes[item.index] == self.shape and len(self.shape) in (2, 3, 4)

    def number(self, item: Any) -> tuple[Ref | float, int | None] | None:
        """A number, or numbers by channel, with their dimension; None if it is something else."""
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            return float(item), None
        shape, whole = self.shape, None
        if isinstance(item, Ref) and item.index in self.constants:
            whole = self.shapes[item.index]
        if whole is None or shape is None or len(whole) > len(shape):
            return None
        sizes = (1,) * (len(shape) - len(whole)) + tuple(whole)
        long = [dim for dim, size in enumerate(sizes) if size != 1]
        if not long:
            return item, None
        fits = len(long) == 1 and sizes[long[0]] == shape[long[0]]
        return (item, long[0]) if fits and long[0] in (1, len(shape) - 1) else None


def _mul(values: Mapping[str, Any], around: _Around) -> Operation | None:
    value, found = _sides(values, around)
    if found is None:
        return None
    return Affine(value, _channels(around, found[1]), gain=found[0], dim=found[1])


def _add(values: Mapping[str, Any], around: _Around) -> Operation | None:
    value, found = _sides(values, around)
    if found is None or values.get("alpha", 1) != 1:
        return None
    return Affine(value, _channels(around, found[1]), shift=found[0], dim=found[1])


def _sub(values: Mapping[str, Any], around: _Around) -> Operation | None:
    if values.get("alpha", 1) != 1:
        return None
    left, right = values.get("input"), values.get("other")
    if isinstance(left, Ref) and around.is_value(left):
        found = around.number(right)
        if found is None:
            return None
        channels = _channels(around, found[1])
        return Affine(left.index, channels, shift=found[0], negative=True, dim=found[1])
    found = around.number(left)
    if found is None or not isinstance(right, Ref) or not around.is_value(right):
        return None
    # fmaf(x, -1, shift) is rounded once, as the difference is.
    return Affine(right.index, _channels(around, found[1]), -1.0, found[0], dim=found[1])


def _div(values: Mapping[str, Any], around: _Around) -> Operation | None:
    left: Any = values.get("input")
    right: Any = values.get("other")
    if not isinstance(left, Ref) or not around.is_value(left) or values.get("rounding_mode"):
        return None
    number = isinstance(right, (int, float)) and not isinstance(right, bool) and right != 0
    if not number or not math.isfinite(right) or abs(math.frexp(right)[0]) != 0.5:
        return None  # only the reciprocals of powers of 2 are exact
    return Affine(left.index, _channels(around, None), gain=1.0 / right, dim=None)


def _sides(
    values: Mapping[str, Any], around: _Around
) -> tuple[int, tuple[Ref | float, int | None] | None]:
    left, right = values.get("input"), values.get("other")
    for value, number in ((left, right), (right, left)):
        if isinstance(value, Ref) and around.is_value(value):
            return value.index, around.number(number)
    return -1, None


def _channels(around: _Around, dim: int | None) -> int:
    assert around.shape is not None
    return around.shape[1 if dim is None else dim]


def _batch_norm(values: Mapping[str, Any], around: _Around) -> Operation | None:
    module, item = around.module, values.get("input")
    if module is None or not isinstance(item, Ref) or not around.is_value(item):
        return None
    if module._buffers.get("running_mean") is None or module._buffers.get("running_var") is None:
        return None
    return Affine(item.index, _channels(around, 1), norm=True)


def _layer_norm(values: Mapping[str, Any], around: _Around) -> Operation | None:
    item, sizes, shape = values.get("input"), values.get("normalized_shape"), around.shape
    if not isinstance(item, Ref) or shape is None or around.shapes[item.index] != shape:
        return None
    if isinstance(sizes, int):
        sizes = (sizes,)
    if not isinstance(sizes, (tuple, list)) or tuple(sizes) != shape[-1:] or len(shape) < 2:
        return None
    weight, bias, eps = values.get("weight"), values.get("bias"), values.get("eps", 1e-5)
    given = [one for one in (weight, bias) if one is not None]
    if not isinstance(eps, float) or not all(
        isinstance(one, Ref) and one.index in around.constants for one in given
    ):
        return None
    if weight is None and bias is not None:
        return None
    return Norm(item.index, shape[-1], eps, weight, bias, around.module is not None)


_KNOWN = {
    "mul": _mul,
    "add": _add,
    "sub": _sub,
    "div": _div,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
}


class Numbers:
    """The numbers of the recognised calls, as they are now.

    Args:
        trace: the calls.
        root: the module that was recorded.

    Example:
        >>> calls = Call("input", "x"), Call("module", "0", (Ref(0),))
        >>> net = nn.Sequential(nn.BatchNorm1d(2, eps=0.0)).eval()
        >>> numbers = Numbers(Trace(calls, Ref(1), ("x",), {}, ()), net)
        >>> numbers.of(1, Affine(0, 2, norm=True))
        (tensor([1., 1.]), tensor([0., 0.]))
    """

    def __init__(self, trace: Trace, root: nn.Module) -> None:
        self.trace, self.root = trace, root

    def of(self, index: int, operation: Affine | Norm) -> tuple[Tensor | None, Tensor | None]:
        """Gain and shift, or weight and bias: float32 ``[channels]``, or None."""
        if isinstance(operation, Affine) and operation.norm:
            module: Any = self.root.get_submodule(self.trace.calls[index].target)
            with torch.no_grad():
                statistics = module.running_mean, module.running_var
                return norm_as_affine(*statistics, module.weight, module.bias, module.eps)
        if isinstance(operation, Norm):
            if operation.module:
                norm: Any = self.root.get_submodule(self.trace.calls[index].target)
                pair = norm.weight, norm.bias
            else:
                pair = operation.weight, operation.bias
        else:
            pair = operation.gain, operation.shift
        first, second = (self._tensor(item, operation.channels) for item in pair)
        if isinstance(operation, Affine) and operation.negative and second is not None:
            second = -second
        return first, second

    def _tensor(self, item: Any, channels: int) -> Tensor | None:
        if item is None:
            return None
        if isinstance(item, Ref):
            item = self._result(item.index)
        if not isinstance(item, Tensor):
            return torch.full((channels,), item, dtype=torch.float32)
        flat = item.detach().to(torch.float32).reshape(-1)
        return flat.expand(channels).contiguous()

    def _result(self, index: int) -> Any:
        call = self.trace.calls[index]
        if call.kind == "tensor":
            owner, _, name = call.target.rpartition(".")
            return getattr(self.root.get_submodule(owner), name)
        args: Any = filled(call.args, self._result)
        kwargs: Any = filled(dict(call.kwargs), self._result)
        with torch.no_grad():
            return called(call, args, kwargs)
