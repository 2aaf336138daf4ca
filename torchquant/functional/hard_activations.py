"""Activation functions of a few fp32 operations, with the bits of torch's own CPU kernels.

As in :mod:`torchquant.functional.activations`, one line is one operation with one rounding. torch
on a CPU runs the same operations in the same order; the tests compare all of them with
``torch.equal``. NaN gives NaN, and relu, relu6 and leaky_relu keep the sign of -0.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.functional._arithmetic import at_least, at_most, divide
from torchquant.functional._checks import require_dtype

_FP32 = (torch.float32,)
_LEAKY_SLOPE = float.fromhex("0x1.47ae14p-7")  # 0.01 in fp32


def relu(input: Tensor) -> Tensor:
    """``max(0, x)``: +0 for x < 0, otherwise x itself: NaN stays NaN and -0.0 stays -0.0.

    Args:
        input: fp32 tensor of any shape.

    Returns:
        fp32 tensor of the same shape.

    Raises:
        TypeError: ``input`` is not float32.

    Example:
        >>> relu(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """
    require_dtype("relu", "input", input, _FP32)
    return at_least(0.0, input)


def relu6(input: Tensor) -> Tensor:
    """``min(max(0, x), 6)``.

    Args:
        input: fp32 tensor of any shape.

    Returns:
        fp32 tensor of the same shape, within [0, 6].

    Raises:
        TypeError: ``input`` is not float32.

    Example:
        >>> relu6(torch.tensor([-1.0, 2.0, 7.0]))
        tensor([0., 2., 6.])
    """
    require_dtype("relu6", "input", input, _FP32)
    a = at_least(0.0, input)
    return at_most(6.0, a)


def hardsigmoid(input: Tensor) -> Tensor:
    """``min(max(0, x + 3), 6) / 6``, a sigmoid made of three straight lines.

    Args:
        input: fp32 tensor of any shape.

    Returns:
        fp32 tensor of the same shape, within [0, 1].

    Raises:
        TypeError: ``input`` is not float32.

    Example:
        >>> hardsigmoid(torch.tensor([-4.0, 0.0, 4.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    require_dtype("hardsigmoid", "input", input, _FP32)
    a = input + 3.0
    b = at_least(0.0, a)
    c = at_most(6.0, b)
    return divide(c, 6.0)


def hardswish(input: Tensor) -> Tensor:
    """``x * min(max(0, x + 3), 6) / 6``, in this order: the product comes before the division.

    The product overflows to infinity for x above 5.6e37, and -inf gives NaN.

    Args:
        input: fp32 tensor of any shape.

    Returns:
        fp32 tensor of the same shape.

    Raises:
        TypeError: ``input`` is not float32.

    Source: Howard et al., "Searching for MobileNetV3" (2019).

    Example:
        >>> hardswish(torch.tensor([-4.0, -1.0, 0.0, 4.0]))
        tensor([-0.0000, -0.3333,  0.0000,  4.0000])
    """
    require_dtype("hardswish", "input", input, _FP32)
    a = input + 3.0
    b = at_least(0.0, a)
    c = at_most(6.0, b)
    d = input * c
    return divide(d, 6.0)


def leaky_relu(input: Tensor) -> Tensor:
    """``max(x, 0.01 x)``, a ReLU with the slope 0.01 for x < 0.

    Args:
        input: fp32 tensor of any shape.

    Returns:
        fp32 tensor of the same shape.

    Raises:
        TypeError: ``input`` is not float32.

    Example:
        >>> leaky_relu(torch.tensor([-1.0, 2.0]))
        tensor([-0.0100,  2.0000])
    """
    require_dtype("leaky_relu", "input", input, _FP32)
    a = input * _LEAKY_SLOPE
    return a.where(a >= input, input)
