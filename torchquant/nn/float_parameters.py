"""What rules a float layer out, whatever its kind: its parameters, their dtype and their values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchquant.nn.dtypes import FLOAT_DTYPES, dtype_name
from torchquant.ops._arguments import has_kernels


def instance_refusal(module: nn.Module) -> str | None:
    """The reason why a module does not compute what its class computes, or None.

    Example:
        >>> module = nn.Linear(2, 2)
        >>> module.forward = lambda input: input
        >>> instance_refusal(module), instance_refusal(nn.Linear(2, 2))
        ('forward replaced on the instance', None)
    """
    if getattr(module, "parametrizations", None):
        return f"{type(module).__name__} (parametrized)"
    if "forward" in module.__dict__:
        return "forward replaced on the instance"
    return None


def parameter_refusal(module: nn.Module) -> str | None:
    """The reason why a layer has no plain float weight and bias, or None.

    Example:
        >>> parameter_refusal(nn.Linear(2, 2, dtype=torch.float64))
        'weight of dtype float64'
    """
    for name in ("weight", "bias"):
        if name not in module._parameters:
            return f"{name} computed from other tensors (weight_norm, spectral_norm, pruning)"
    weight = module._parameters["weight"]
    if type(weight) is not nn.Parameter:
        return f"weight of type {type(weight).__name__}"
    if weight.dtype not in FLOAT_DTYPES.values():
        return f"weight of dtype {dtype_name(weight.dtype)}"
    return None


def place_refusal(weight: Tensor) -> str | None:
    """The reason why a weight has no values that kernels can read, or None.

    Example:
        >>> place_refusal(torch.ones(2, device="meta"))
        'on the meta device, without values; load its weights first'
    """
    if weight.is_meta:
        return "on the meta device, without values; load its weights first"
    if not has_kernels(weight):
        return f"on {weight.device}; move it to the CPU or to a CUDA device first"
    return None


def finite_refusal(weight: Tensor) -> str | None:
    """The reason why the values of a weight rule it out, or None.

    Example:
        >>> finite_refusal(torch.tensor([1.0, float("nan")]))
        'its weight holds NaN or infinity; check the checkpoint'
    """
    least, greatest = torch.aminmax(weight)  # allocates no tensor of the weight's size
    if not (torch.isfinite(least) and torch.isfinite(greatest)):
        return "its weight holds NaN or infinity; check the checkpoint"
    return None


__all__ = ["finite_refusal", "instance_refusal", "parameter_refusal", "place_refusal"]
