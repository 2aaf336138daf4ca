"""What the interpreter computes with the bits of the kernels: rounding, and activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant import ops
from torchquant.chains.interpreter import Substitute
from torchquant.nn.inputs import on_nested

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def round_to(value: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """A value as integers represent it, in the value's memory format.

    Args:
        value: floats of any shape, or a nested tensor.
        scale: float32 ``[1]``.
        zero_point: int32 ``[1]``.
        qmin, qmax: the range of the integers.

    Example:
        >>> zero_point = torch.zeros(1, dtype=torch.int32)
        >>> round_to(torch.tensor([0.26, 9.0]), torch.tensor([0.5]), zero_point, -8, 7)
        tensor([0.5000, 3.5000])
    """
    if value.is_nested:
        return on_nested(lambda part: round_to(part, scale, zero_point, qmin, qmax), value)
    if _is_channels_last(value):  # the operator returns contiguous tensors
        value = value.permute(0, 2, 3, 1)
        y = ops.fake_quantize(value, scale, zero_point, qmin=qmin, qmax=qmax)
        return y.permute(0, 3, 1, 2)
    return ops.fake_quantize(value, scale, zero_point, qmin=qmin, qmax=qmax)


def activated(function: str) -> Substitute:
    """An activation with the bits of the kernels, in the place of the call that computes it.

    Example:
        >>> activated("relu")(torch.tensor([-1.0, 2.0]), True)
        tensor([0., 2.])
    """

    def result(value: Tensor, *rest: Any) -> Any:
        if value.dtype not in FLOATS:
            return NotImplemented
        if value.is_nested:
            return on_nested(lambda part: ops.activation(part, function), value)
        return ops.activation(value, function)

    return result


def _is_channels_last(value: Tensor) -> bool:
    if torch._C._functorch.is_batchedtensor(value):  # vmap does not know it
        return False
    last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return last and not value.is_contiguous()
