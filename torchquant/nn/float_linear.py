"""Float linear layers: which of them can be quantized, and which are too small to benefit."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.float_parameters import (
    finite_refusal,
    instance_refusal,
    parameter_refusal,
    place_refusal,
)
from torchquant.nn.linear_probe import is_transposed, other_class

_MAX_IN_FEATURES = 1 << 23  # csrc/formats/int8_tiles.h: the sum of a row fits in int32

# A layer below one of these sizes stays in float: the packed weight is padded to 16 outputs and 64
# inputs, so a small layer does not shrink, and the call costs more than the arithmetic. The sizes
# are constants, so that a model is converted in the same way on every machine.
MIN_OUT_FEATURES = 16
MIN_IN_FEATURES = 32
MIN_WEIGHTS = 4096


def looks_linear(module: nn.Module) -> bool:
    """True if users expect a quantizer to take the module.

    These are nn.Linear, its subclasses, and modules that compute the same: GPT-2's Conv1D, whose
    weight is transposed.

    Example:
        >>> looks_linear(nn.Linear(4, 4)), looks_linear(nn.ReLU())
        (True, False)
    """
    if isinstance(module, nn.Linear):
        return True
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag, torch.jit.ScriptModule)):
        return False
    weight = module._parameters.get("weight")
    if weight is None or is_lazy(weight) or weight.dim() != 2:
        return False
    return type(module).__name__ == "Conv1D" or other_class(module) is None


def refusal(module: nn.Module) -> str | None:
    """The reason why the type or structure of a module rules out QuantizedLinear, or None."""
    reason = instance_refusal(module)
    if reason is not None:
        return reason
    reason = other_class(module)
    if reason is not None:
        kind = "subclass of nn.Linear" if isinstance(module, nn.Linear) else "not an nn.Linear"
        return f"{type(module).__name__} ({kind}: {reason})"
    return parameter_refusal(module)


def value_refusal(module: nn.Module) -> str | None:
    """The reason why the values of a layer that :func:`refusal` accepts rule it out, or None."""
    parameter = module._parameters["weight"]
    assert parameter is not None
    weight = parameter.detach()
    reason = place_refusal(weight)
    if reason is not None:
        return reason
    if weight.dim() != 2 or not 1 <= weight_shape(module)[1] <= _MAX_IN_FEATURES:
        return f"weight of shape {list(weight.shape)}"
    if weight.numel() == 0:
        return f"weight of shape {list(weight.shape)}"
    return finite_refusal(weight)


def too_small(module: nn.Module) -> bool:
    """True if a linear layer is too small to benefit from int8; depends on its shape alone.

    Example:
        >>> too_small(nn.Linear(768, 10)), too_small(nn.Linear(64, 64))
        (True, False)
    """
    out_features, in_features = weight_shape(module)
    return (
        out_features < MIN_OUT_FEATURES
        or in_features < MIN_IN_FEATURES
        or out_features * in_features < MIN_WEIGHTS
    )


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """``(outputs, inputs)`` of a linear layer, float or quantized.

    Example:
        >>> weight_shape(nn.Linear(64, 32))
        (32, 64)
    """
    if isinstance(module, (nn.Linear, QuantizedModule, TrainedModule)):
        return module.out_features, module.in_features  # type: ignore[return-value]
    rows, columns = module._parameters["weight"].shape  # type: ignore[union-attr]
    transposed = type(module).__name__ == "Conv1D" or is_transposed(module)
    return (columns, rows) if transposed else (rows, columns)
