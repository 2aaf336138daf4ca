"""Average pooling of int8 values on their float values: the integers of the specification.

Gradients are those of the float function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchquant import functional
from torchquant.chains.operations import AdaptiveAvgPool, AvgPool


def average(
    input: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    operation: AvgPool | AdaptiveAvgPool,
) -> Tensor:
    """The averages of a value that holds multiples of ``scale``, or any floats.

    Args:
        input: ``[n, c, h, w]`` or ``[n, c, l]``.
        scale: float32 ``[1]``, the scale of the integers of input; None if it has none.
        zero_point: int32 ``[1]``, their zero point.
        operation: the windows.

    Example:
        >>> x, zero_point = torch.tensor([[[[0.5, 1.0], [1.5, 0.0]]]]), torch.tensor([3]).int()
        >>> average(x, torch.tensor([0.5]), zero_point, AdaptiveAvgPool((1, 1)))
        tensor([[[[0.7500]]]])
    """
    x = input if input.dim() == 4 else input.unsqueeze(2)
    if scale is None:
        y, real = _of_floats(x, operation)
    else:
        y, real = _of_integers(x, scale, zero_point, operation)
    y = y.to(x.dtype) + (real - real.detach())  # gradients; NaN stays NaN
    if isinstance(operation, AdaptiveAvgPool) and operation.flat:
        return y.flatten(1)
    return y if input.dim() == 4 else y.squeeze(2)


def _of_floats(x: Tensor, operation: AvgPool | AdaptiveAvgPool) -> tuple[Tensor, Tensor]:
    """The averages in the order of the specification, and those of torch."""
    wide = x.detach().to(torch.float32)
    if isinstance(operation, AvgPool):
        sizes: Any = (operation.kernel, operation.stride, operation.padding)
        rest: Any = (operation.ceil_mode, operation.count_include_pad, operation.divisor)
        return functional.float_avg_pool(wide, *sizes, *rest), F.avg_pool2d(x, *sizes, *rest)
    size: Any = operation.size
    return functional.float_adaptive_avg_pool(wide, size), F.adaptive_avg_pool2d(x, size)


def _of_integers(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, operation: AvgPool | AdaptiveAvgPool
) -> tuple[Tensor, Tensor]:
    integers = functional.quantize(x.detach(), scale, zero_point, dtype=torch.int8)
    if isinstance(operation, AvgPool):
        sizes: Any = (operation.kernel, operation.stride, operation.padding)
        rest: Any = (operation.ceil_mode, operation.count_include_pad, operation.divisor)
        y = functional.int8_avg_pool(integers, scale, zero_point, *sizes, *rest)
        real = F.avg_pool2d(x, *sizes, *rest)
    else:
        y = functional.int8_adaptive_avg_pool(integers, scale, zero_point, operation.size)
        size: Any = operation.size
        real = F.adaptive_avg_pool2d(x, size)
    return y, real
