"""The float dtypes in which layers work, by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FLOAT_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def as_float32(value: Tensor) -> Tensor:
    """``value`` as float32; a parameter stays a parameter."""
    if value.dtype == torch.float32:
        return value
    converted = value.detach().to(torch.float32)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(converted, value.requires_grad)
    return converted


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without the prefix ``torch.``.

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


__all__ = ["dtype_name"]
