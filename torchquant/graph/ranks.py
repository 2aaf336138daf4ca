"""The number of dimensions of the results of a record, where its calls show it."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchquant.graph.trace import Call, Ref, Trace

_RANKS: dict[type[nn.Module], int] = {nn.Conv2d: 4, nn.Conv3d: 5}
# Modules and functions whose results have the dimensions of their first argument.
_SAME: tuple[type[nn.Module], ...] = (
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.Dropout,
    nn.GELU,
    nn.Hardswish,
    nn.Identity,
    nn.LeakyReLU,
    nn.Linear,
    nn.MaxPool2d,
    nn.PReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
)
_SAME_NAMES = frozenset(
    (
        *("relu", "relu_", "relu6", "gelu", "silu", "sigmoid", "tanh", "leaky_relu", "dropout"),
        *("hardswish", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "contiguous"),
    )
)


def ranks(trace: Trace, root: nn.Module) -> list[int | None]:
    """The dimensions of each result; None where the record does not show them.

    A convolution of images counts as called with a batch.

    Args:
        trace: the record.
        root: the module that was recorded.

    Example:
        >>> from torchquant.graph.trace import trace
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> ranks(trace(net, lambda module: True), net)
        [None, 2, 2]
    """
    found: list[int | None] = []
    for call in trace.calls:
        first = call.args[0] if call.args else None
        before = found[first.index] if isinstance(first, Ref) else None
        if call.kind == "module":
            found.append(_of_module(root.get_submodule(call.target), before))
        elif call.kind in ("function", "method"):
            found.append(_of_function(call, before))
        else:
            found.append(None)
    return found


def _of_module(module: Any, before: int | None) -> int | None:
    if isinstance(module, nn.Flatten):
        return 2 if (module.start_dim, module.end_dim) == (1, -1) else None
    if type(module) in _RANKS:
        return _RANKS[type(module)]
    return before if isinstance(module, _SAME) else None


def _of_function(call: Call, before: int | None) -> int | None:
    name = call.target.rpartition(":")[2].rpartition(".")[2]
    rest = call.args[1:]
    if name == "flatten":
        places = (*rest, *call.kwargs.values())
        return 2 if places in ((1,), (1, -1)) else None
    if name in ("view", "reshape"):
        sizes = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
        return len(sizes) if sizes and not call.kwargs else None
    if name == "mean" and before is not None:
        dims = call.kwargs.get("dim", rest[0] if rest else None)
        keeps = call.kwargs.get("keepdim", rest[1] if len(rest) > 1 else False)
        if isinstance(dims, (tuple, list)):
            return before if keeps else before - len(dims)
        return None
    return before if name in _SAME_NAMES else None


__all__ = ["ranks"]
