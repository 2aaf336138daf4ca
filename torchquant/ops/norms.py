"""Norms over the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.ops._register import fake

__all__ = ["layer_norm", "rms_norm"]


def rms_norm(
    input: Tensor, weight: Tensor | None, eps: float, *, cast_before_weight: bool = False
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in float32.

    Args:
        input: float32, bfloat16 or float16 ``[..., K]``, K not 0.
        weight: float32, bfloat16 or float16 ``[K]``, or None.
        eps: added to the mean square.
        cast_before_weight: round ``x / rms`` to input's dtype before the weight multiplies, as
            transformers' RMSNorm of Llama does; without it there is one rounding, at the end, as in
            ``torch.nn.RMSNorm``. With float32 input they are the same.

    Returns:
        Of input's shape and dtype, contiguous; the bits of
        :func:`torchquant.functional.rms_norm` on every device and with any number of threads.

    Raises:
        TypeError: ``input`` or ``weight`` is not float32, bfloat16 or float16.
        ValueError: a shape or a device does not fit, or ``eps`` is negative or not finite.

    Gradients: to ``input`` and ``weight``, including gradients of gradients.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization" (2019).

    Example:
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
        tensor([[0.8485, 2.2627]])
    """
    return torch.ops.torchquant.rms_norm.default(input, weight, eps, cast_before_weight)  # type: ignore[no-any-return]


@fake("rms_norm")
def _(input: Tensor, weight: Tensor | None, eps: float, cast_before_weight: bool = False) -> Tensor:
    return torch.empty(input.shape, dtype=input.dtype, device=input.device)


def layer_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
) -> Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimension, in float32.

    Args:
        input: float32, bfloat16 or float16 ``[..., K]``, K not 0.
        weight: float32, bfloat16 or float16 ``[K]``, or None.
        bias: float32, bfloat16 or float16 ``[K]``, only together with a weight; or None.
        eps: added to the variance.
        residual: of input's shape and dtype, added to input first (in float32, so that a bfloat16
            sum is not rounded in between), or None.

    Returns:
        Of input's shape and dtype, contiguous; the bits of
        :func:`torchquant.functional.layer_norm` on every device and with any number of threads.

    Raises:
        TypeError: a tensor is not float32, bfloat16 or float16, or ``residual`` has another dtype
            than ``input``.
        ValueError: a shape or a device does not fit, ``bias`` is given without ``weight``, or
            ``eps`` is negative or not finite.

    Gradients: to all four tensors, including gradients of gradients.

    Source: Ba, Kiros & Hinton, "Layer Normalization" (2016).

    Example:
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), torch.ones(2), torch.tensor([0.0, 5.0]), 0.0)
        tensor([[-1.,  6.]])
    """
    return torch.ops.torchquant.layer_norm.default(input, weight, bias, eps, residual)  # type: ignore[no-any-return]


@fake("layer_norm")
def _(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
) -> Tensor:
    return torch.empty(input.shape, dtype=input.dtype, device=input.device)
