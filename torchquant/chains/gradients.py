"""Gradients of a region that programs computed: its interpreter runs again in the backward pass.

So a call in which nobody disabled gradients is as fast as any other, and keeps no values of inner
layers in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Run = Callable[[Sequence[Any]], Any]
# For the tensors that require gradients: which tensors of the result do, None if the result holds
# objects that are not understood.
Learned = MutableMapping[tuple[Any, ...], "list[bool] | None"]

_MOST_LEARNED = 16
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def recomputed(
    fast: Run,
    slow: Run,
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    learned: Learned,
) -> Any:
    """The result of ``fast``, with the gradients of ``slow``.

    The first call runs ``slow`` besides, to see which tensors of the result require gradients.

    Args:
        fast: computes the result without gradients.
        slow: computes the same bits with operators that have gradients.
        inputs: the arguments of both.
        parameters: other tensors with which ``slow`` computes.
        learned: what earlier calls with these functions have shown.

    Example:
        >>> x, learned = torch.tensor([3.0], requires_grad=True), {}
        >>> square = lambda inputs: inputs[0] ** 2
        >>> for _ in range(2):
        ...     y = recomputed(square, square, [x], [], learned)
        >>> y.backward()
        >>> y.detach(), x.grad
        (tensor([9.]), tensor([6.]))
    """
    given = [*inputs, *parameters]
    key = (*(item.requires_grad for item in inputs), *map(id, parameters))
    if key not in learned:
        if len(learned) >= _MOST_LEARNED:
            learned.clear()
        learned[key] = _required(slow, inputs, given)
    required = learned[key]
    if required is None:
        return slow(inputs)
    if not any(required):
        with torch.no_grad():
            return fast(inputs)
    found: list[Any] = []  # what ``fast`` returned
    outputs = _Recomputed.apply(fast, slow, len(inputs), found, required, *given)
    tensors = iter(outputs if isinstance(outputs, tuple) else (outputs,))
    return _rebuilt(found[0], tensors, given)


def _required(slow: Run, inputs: Sequence[Tensor], given: Sequence[Tensor]) -> list[bool] | None:
    """Which tensors of the result require gradients; None if the result is not understood."""
    # torch.utils.checkpoint counts what is saved, in the forward pass and again later.
    with torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
        result = slow(inputs)
        made = _tensors(result, given)
        return [t.requires_grad for t in made] if _is_understood(result) else None


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        fast: Run,
        slow: Run,
        count: int,
        found: list[Any],
        required: list[bool],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.slow, ctx.count = slow, count
        ctx.save_for_backward(*tensors)
        result = fast(tensors[:count])
        found.append(result)
        made = _tensors(result, tensors)
        pairs = zip(made, required, strict=True)
        ctx.mark_non_differentiable(*(tensor for tensor, needed in pairs if not needed))
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[5:]
        inputs = [
            tensor.detach().requires_grad_(need)
            for tensor, need in zip(saved[: ctx.count], needed, strict=False)
        ]
        every = [*inputs, *saved[ctx.count :]]
        # Autocast was off in the forward pass, or no program would have run.
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            outputs = _tensors(ctx.slow(inputs), every)
        places = [place for place, need in enumerate(needed) if need]
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
        return None, None, None, None, None, *results


def _is_computed(tensor: Tensor, given: Sequence[Tensor]) -> bool:
    """True for a tensor that may have gradients and is none of the given ones."""
    numbers = tensor.is_floating_point() or tensor.is_complex()
    return numbers and all(tensor is not one for one in given)


def _is_understood(value: Any) -> bool:
    """True if all tensors in a result can be found."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return all(map(_is_understood, value))
    return isinstance(value, (Tensor, *_PLAIN))


def _tensors(value: Any, given: Sequence[Tensor]) -> list[Tensor]:
    """The computed tensors in a result, in their order."""
    if isinstance(value, Tensor):
        return [value] if _is_computed(value, given) else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item, given)]
    return []


def _rebuilt(value: Any, tensors: Any, given: Sequence[Tensor]) -> Any:
    """A result with other tensors in the places of its computed ones."""
    if isinstance(value, Tensor):
        return next(tensors) if _is_computed(value, given) else value
    if isinstance(value, tuple):
        items = [_rebuilt(item, tensors, given) for item in value]
        if type(value) is tuple:
            return tuple(items)
        # torch.return_types take a sequence, named tuples take the items.
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return [_rebuilt(item, tensors, given) for item in value]
    if isinstance(value, Mapping):
        return type(value)({key: _rebuilt(item, tensors, given) for key, item in value.items()})  # type: ignore[call-arg]
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
