"""Activation functions, elementwise."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.ops._register import fake

__all__ = ["activation", "gated_activation"]


def activation(input: Tensor, activation: str, *, dtype: torch.dtype | None = None) -> Tensor:
    """Apply an activation function in one pass over memory.

    The arithmetic is that of the activations fused into the linear operators.

    Args:
        input: float32, bfloat16 or float16 of any shape and strides; widened to float32 exactly.
        activation: none, relu, gelu, gelu_tanh, silu, tanh, sigmoid, relu6, hardswish, hardsigmoid
            or leaky_relu.
        dtype: float32, bfloat16 or float16, to which the result is rounded once; input's when None.

    Returns:
        A tensor of input's shape and, where input is dense in memory, its strides. Its bits are
        those of ``torchquant.functional.ACTIVATIONS[activation]`` on every device.

    Raises:
        TypeError: ``input`` or ``dtype`` is not float32, bfloat16 or float16.
        ValueError: no activation has that name.

    Gradients: to ``input``, including gradients of gradients.

    Example:
        >>> activation(torch.tensor([-1.0, 0.0, 1.0]), "gelu")
        tensor([-0.1587,  0.0000,  0.8413])
    """
    return torch.ops.torchquant.activation.default(input, activation, dtype)  # type: ignore[no-any-return]


@fake("activation")
def _(input: Tensor, activation: str, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(input, dtype=dtype)


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Compute ``activation(gate) * up`` in one pass, as gated feed-forward layers do.

    Args:
        gate, up: float32, bfloat16 or float16 of one shape and dtype; halves of one tensor
            (``x.chunk(2, dim=-1)``) are read in place.
        activation: silu (SwiGLU), gelu or gelu_tanh (GEGLU), sigmoid (GLU), ...

    Returns:
        A tensor of gate's shape and dtype. The product is taken in float32 and rounded once.

    Raises:
        TypeError: ``gate`` is not float32, bfloat16 or float16, or ``up`` has another dtype.
        ValueError: the shapes or devices differ, or no activation has that name.

    Gradients: to ``gate`` and ``up``, including gradients of gradients.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).

    Example:
        >>> gated_activation(torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 2.0]), "silu")
        tensor([-0.5379,  1.4621])
    """
    return torch.ops.torchquant.gated_activation.default(gate, up, activation)  # type: ignore[no-any-return]


@fake("gated_activation")
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty_like(gate)
