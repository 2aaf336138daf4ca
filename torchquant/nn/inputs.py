"""Inputs of a layer that are no plain tensors: nested tensors, and proxies of torch.fx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.graph.modules import has_hooks


def special_output(layer: nn.Module, input: Any) -> Any:
    """The output of a layer that applies to the last dimension, or None for an ordinary input.

    A nested tensor gives a nested tensor of the same structure. A proxy of torch.fx gives one node
    that calls the layer, because tracers treat only the layers of torch itself as one node.

    Example:
        >>> special_output(nn.Identity(), torch.ones(2)) is None
        True
    """
    if isinstance(input, torch.fx.Proxy):
        return _one_node(layer, input)
    if isinstance(input, Tensor) and input.is_nested:
        return on_nested(
            layer.forward, input
        )  # the hooks of the layer run around the nested tensor
    return None


def _one_node(layer: nn.Module, input: torch.fx.Proxy) -> Any:
    """None if the tracer cannot call the layer as a module; the operators are traced then."""
    if has_hooks(layer):  # they run now, and would run again when the node runs
        return None
    tracer: Any = input.tracer
    try:
        name = tracer.path_of_module(layer)
    except (AttributeError, NameError):  # not a tracer of modules, or not in its model
        return None
    return tracer.create_proxy("call_module", name, (input,), {}) if name else None


def on_nested(function: Callable[[Tensor], Tensor], input: Any) -> Tensor:
    """A function of rows or elements, applied to what is in a nested tensor.

    Example:
        >>> pair = torch.nested.nested_tensor([torch.ones(2), torch.ones(1)], layout=torch.jagged)
        >>> [part.tolist() for part in on_nested(torch.neg, pair).unbind()]
        [[-1.0, -1.0], [-1.0]]
    """
    if input.layout is not torch.jagged:
        return torch.nested.as_nested_tensor([function(part) for part in input.unbind()])
    values = function(input.values())
    structure = {"offsets": input.offsets(), "lengths": input.lengths()}
    return torch.nested.nested_tensor_from_jagged(values, **structure, jagged_dim=_ragged(input))


def _ragged(input: Any) -> int:
    """The dimension of a jagged tensor whose size differs; torch has no public name for it."""
    return next(i for i, size in enumerate(input.shape) if i and not isinstance(size, int))
