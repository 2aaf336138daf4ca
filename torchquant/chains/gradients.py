"""Gradients of a region that programs computed: its interpreter runs again in the backward pass.

So a call in which nobody disabled gradients is as fast as any other, and keeps no values of inner
layers in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Run = Callable[[Sequence[Any]], Any]


def recomputed(fast: Run, slow: Run, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Any:
    """The result of ``fast``, with the gradients of ``slow``.

    Args:
        fast: computes the result without gradients.
        slow: computes the same bits with operators that have gradients.
        inputs: the arguments of both.
        parameters: other tensors with which ``slow`` computes.

    Example:
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> y = recomputed(lambda inputs: inputs[0] ** 2, lambda inputs: inputs[0] ** 2, [x], [])
        >>> y.backward()
        >>> y.detach(), x.grad
        (tensor([9.]), tensor([6.]))
    """
    found: list[Any] = []  # what ``fast`` returned
    outputs = _Recomputed.apply(fast, slow, len(inputs), found, *inputs, *parameters)
    tensors = iter(outputs if isinstance(outputs, tuple) else (outputs,))
    return _rebuilt(found[0], tensors)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fast: Run, slow: Run, count: int, found: list[Any], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.slow, ctx.count = slow, count
        ctx.save_for_backward(*tensors)
        result = fast(tensors[:count])
        found.append(result)
        return tuple(_tensors(result))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        inputs = [
            tensor.detach().requires_grad_(need)
            for tensor, need in zip(saved[: ctx.count], needed, strict=False)
        ]
        with torch.enable_grad():
            outputs = _tensors(ctx.slow(inputs))
        places = [place for place, need in enumerate(needed) if need]
        every = [*inputs, *saved[ctx.count :]]
        pairs = [pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad]
        made = torch.autograd.grad(
            [output for output, _ in pairs],
            [every[place] for place in places],
            [grad for _, grad in pairs],
            allow_unused=True,
        )
        results: list[Any] = [None] * len(every)
        for place, grad in zip(places, made, strict=True):
            results[place] = grad
        return None, None, None, None, *results


def _tensors(value: Any) -> list[Tensor]:
    """The float tensors in a result, in their order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _rebuilt(value: Any, tensors: Any) -> Any:
    """A result with other float tensors in the places of its own."""
    if isinstance(value, Tensor):
        return next(tensors) if value.is_floating_point() else value
    if isinstance(value, tuple):
        items = [_rebuilt(item, tensors) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_rebuilt(item, tensors) for item in value]
    if isinstance(value, Mapping):
        return type(value)({key: _rebuilt(item, tensors) for key, item in value.items()})  # type: ignore[call-arg]
    return value


def trained(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The parameters of some modules that require gradients, each once.

    Example:
        >>> [p.shape for p in trained([nn.Linear(2, 3)])]
        [torch.Size([3, 2]), torch.Size([3])]
    """
    found = {
        id(parameter): parameter
        for module in modules
        for parameter in module.parameters()
        if parameter.requires_grad
    }
    return list(found.values())
