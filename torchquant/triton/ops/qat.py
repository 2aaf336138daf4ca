"""The operators of quantization-aware training, on Triton's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.triton.ops.fake_quantize import fake_quantize


def mm_fake_quantized(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
) -> Any:
    """See :func:`torchquant.ops.mm_fake_quantized`."""
    if weight.dim() != 2 or grad.dim() != 2 or grad.shape[1] != weight.shape[0]:
        return NotImplemented
    if grad.dtype != torch.float32 or weight.dtype != torch.float32 or grad.device != weight.device:
        return NotImplemented
    n = (weight.shape[0],)
    for tensor, dtype in ((scale, torch.float32), (zero_point, torch.int32)):
        if tensor is not None and (tensor.dtype != dtype or tensor.shape not in ((), (1,), n)):
            return NotImplemented
    if not -128 <= qmin <= 0 < qmax <= 127:
        return NotImplemented
    if zero_point is not None and zero_point.numel() == 1:
        zero_point = zero_point.reshape(1)
    values = fake_quantize(weight, scale.expand(n), zero_point, qmin, qmax, axis=0)
    if values is NotImplemented or grad.shape[0] == 0:
        return NotImplemented
    # Without autograd and autocast, which have handled the operator's call already.
    with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
        return torch.mm(grad, values)
