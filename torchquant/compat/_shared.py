"""Checks and small arithmetic that the modules of torchquant.compat share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def require_float(who: str, name: str, value: object) -> Tensor:
    """``value`` as a float tensor, half types widened to fp32; raise if it is not one."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{who}: {name} must be a float tensor, got {_kind(value)}")
    return value if value.dtype == torch.float64 else value.to(torch.float32)


def require_integer(who: str, name: str, value: object) -> None:
    """Raise unless ``value`` is an integer tensor."""
    if not isinstance(value, Tensor) or not holds_integers(value):
        raise TypeError(f"{who}: {name} must be an integer tensor, got {_kind(value)}")


def holds_integers(value: Tensor) -> bool:
    """Whether the tensor's type is an integer type."""
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def no_nan(x: Tensor, replacement: int | Tensor) -> Tensor:
    """``x`` with every NaN replaced."""
    return torch.where(x.isnan(), replacement, x)


def scaled(difference: Tensor, scale: float | Tensor) -> Tensor:
    """``difference * scale`` in the scale's type; fp32, rounded once, if it is a number."""
    if isinstance(scale, Tensor):
        return difference.to(scale.dtype) * scale
    # A Python number is a float64: multiply in float64, round once.
    return (difference.to(torch.float64) * scale).to(torch.float32)


def finite_range(who: str, name: str, x: Tensor) -> tuple[float, float]:
    """Least and greatest element of a float tensor; raise if it is empty or not finite."""
    x = require_float(who, name, x)
    if x.numel() == 0:
        raise ValueError(f"{who}: {name} must not be empty, got shape {list(x.shape)}")
    least, greatest = x.min().item(), x.max().item()
    if not (math.isfinite(least) and math.isfinite(greatest)):
        raise ValueError(f"{who}: {name} must be finite, got a range of {least} to {greatest}")
    return least, greatest
