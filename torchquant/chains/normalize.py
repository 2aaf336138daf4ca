"""Norms of a region with the bits of the kernels; gradients are those of the float functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchquant import functional, ops
from torchquant.chains.interpreter import Substitute
from torchquant.chains.operations import Affine, Norm, Operation
from torchquant.chains.per_channel import Numbers
from torchquant.graph.trace import Ref, Trace


def normalizing(
    trace: Trace, root: nn.Module, index: int, operation: Operation
) -> Substitute | None:
    """The function with the bits of the kernels of a batch norm or a layer norm, or None.

    Args:
        trace: the calls of a region.
        root: the module that was recorded.
        index: the index of a call.
        operation: what it computes.
    """
    if isinstance(operation, Norm):
        return _layer_norm(trace, root, index, operation)
    if not isinstance(operation, Affine) or not operation.norm:
        return None
    module, numbers = root.get_submodule(trace.calls[index].target), Numbers(trace, root)

    def normalized(value: Tensor) -> Any:
        if value.dtype is not torch.float32:
            return NotImplemented
        y = functional.channel_affine(value.detach(), *numbers.of(index, operation))
        if torch.is_grad_enabled():
            real = type(module).forward(module, value)
            y = y + (real - real.detach())
        return y

    return normalized


def _layer_norm(trace: Trace, root: nn.Module, index: int, operation: Norm) -> Substitute:
    call = trace.calls[index]
    module: Any = root.get_submodule(call.target) if operation.module else None
    places = {read: place for place, read in enumerate(call.reads())}

    def normalized(*arguments: Tensor) -> Any:
        if arguments[places[operation.source]].dtype is not torch.float32:
            return NotImplemented
        if module is not None:
            weight, bias = module.weight, module.bias
        else:
            weight, bias = (
                arguments[places[item.index]] if isinstance(item, Ref) else None
                for item in (operation.weight, operation.bias)
            )
        return ops.layer_norm(arguments[places[operation.source]], weight, bias, operation.eps)

    return normalized
