"""Activation: an elementwise activation function as a module, computed by the kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchquant import functional, ops
from torchquant._extension import load
from torchquant.nn.inputs import special_output

_fast_activation = load().activation


class Activation(nn.Module):
    """An activation function, selected by name; one pass, and the same bits on every device.

    Args:
        name: "none", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "relu6", "hardswish",
            "hardsigmoid" or "leaky_relu".

    Raises:
        ValueError: ``name`` is not one of the names above.

    Example:
        >>> Activation("gelu")(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.1587,  0.0000,  0.8413])
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in functional.ACTIVATIONS:
            raise ValueError(
                f"Activation: name must be one of {', '.join(functional.ACTIVATIONS)}, got {name!r}"
            )
        self.name = name

    def forward(self, input: Tensor) -> Tensor:
        """Apply the function to each element.

        Args:
            input: float32, bfloat16 or float16, of any shape.

        Returns:
            A tensor of the shape and dtype of ``input``.
        """
        # Outside of torch.compile the call bypasses torch.ops, which saves 2 us.
        fast = type(input) is Tensor and not input.is_nested
        if fast and not torch.compiler.is_dynamo_compiling():
            return _fast_activation(input, self.name)  # type: ignore[no-any-return]
        special = special_output(self, input)
        return ops.activation(input, self.name) if special is None else special

    def extra_repr(self) -> str:
        return self.name
