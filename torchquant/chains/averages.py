"""Average pooling of int8 values in plain torch: the exact sum of integers, then two roundings.

``y = fl(float(S) * fl(scale * fl(1 / count)))``, where S is the exact sum of ``q - zero_point`` in
the window and padding adds 0. Gradients are those of the float function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from torchquant.chains.operations import AdaptiveAvgPool, AvgPool


def average(input: Tensor, scale: Tensor, operation: AvgPool | AdaptiveAvgPool) -> Tensor:
    """The averages of a value that holds multiples of ``scale``.

    Args:
        input: float32 ``[n, c, h, w]`` or ``[n, c, l]``.
        scale: float32 ``[1]``, the scale of the integers of input.
        operation: the windows.

    Example:
        >>> average(torch.tensor([[[[0.5, 1.0], [1.5, 0.0]]]]), torch.tensor([0.5]),
        ...         AdaptiveAvgPool((1, 1)))
        tensor([[[[0.7500]]]])
    """
    x = input if input.dim() == 4 else input.unsqueeze(2)
    integers = torch.round(x.detach().to(torch.float32) * (1.0 / scale)).to(torch.float64)
    ones = torch.ones_like(integers[:1, :1])
    if isinstance(operation, AvgPool):
        sums, counts = _windows(operation, integers), _counts(operation, ones)
        real = _float_windows(operation)
    else:
        rows, columns = (
            size if wanted is None else wanted
            for size, wanted in zip(x.shape[2:], operation.size, strict=True)
        )
        sums, counts = _adaptive(integers, rows, columns), _adaptive(ones, rows, columns)
        real = _float_adaptive(rows, columns)
    factor = scale * (1.0 / counts.to(torch.float32))
    y = sums.to(torch.float32) * factor
    if x.requires_grad:
        smooth = real(x)
        y = y + (smooth - smooth.detach())
    if isinstance(operation, AdaptiveAvgPool) and operation.flat:
        return y.flatten(1)
    return y if input.dim() == 4 else y.squeeze(2)


def _windows(operation: AvgPool, x: Tensor) -> Tensor:
    arguments = operation.kernel, operation.stride, operation.padding, operation.ceil_mode
    return F.avg_pool2d(x, *arguments, True, 1)


def _counts(operation: AvgPool, ones: Tensor) -> Tensor:
    """The divisor of each window."""
    if operation.divisor is not None:
        return torch.full_like(_windows(operation, ones), operation.divisor)
    if not operation.count_include_pad:
        return _windows(operation, ones)
    rows, columns = operation.padding
    padded = F.pad(ones, (columns, columns, rows, rows), value=1.0)
    return F.avg_pool2d(padded, operation.kernel, operation.stride, 0, operation.ceil_mode, True, 1)


def _float_windows(operation: AvgPool) -> Callable[[Tensor], Tensor]:
    def real(x: Tensor) -> Tensor:
        return F.avg_pool2d(
            x,
            operation.kernel,
            operation.stride,
            operation.padding,
            operation.ceil_mode,
            operation.count_include_pad,
            operation.divisor,
        )

    return real


def _adaptive(x: Tensor, rows: int, columns: int) -> Tensor:
    """The sums of the windows of adaptive pooling."""
    high, wide = x.shape[2:]
    sums = [
        x[:, :, i * high // rows : -(-(i + 1) * high // rows)].sum(2, keepdim=True)
        for i in range(rows)
    ]
    x = torch.cat(sums, 2)
    sums = [
        x[:, :, :, j * wide // columns : -(-(j + 1) * wide // columns)].sum(3, keepdim=True)
        for j in range(columns)
    ]
    return torch.cat(sums, 3)


def _float_adaptive(rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    return lambda x: F.adaptive_avg_pool2d(x, (rows, columns))
