"""Float convolutions: which of them can be quantized, and which stay in float."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from torchquant.configs import Dynamic
from torchquant.nn.float_parameters import (
    finite_refusal,
    instance_refusal,
    parameter_refusal,
    place_refusal,
)

_MAX_TERMS = 1 << 23  # the sum of the products of one output fits in int32

# With dynamic activations, a layer below one of these sizes, counted in each group, stays in float:
# to find the range of a sample and to quantize it costs more than the arithmetic saves. The sizes
# are constants, so that a model is converted in the same way on every machine.
MIN_OUT_CHANNELS = 16
MIN_TERMS = 32
MIN_WEIGHTS = 4096


def looks_like(module: nn.Module, dimensions: int) -> bool:
    """True if users expect a quantizer to take the module as a convolution.

    These are nn.Conv1d or nn.Conv2d, and their subclasses.

    Args:
        module: any module.
        dimensions: the number of spatial dimensions, 1 or 2.

    Example:
        >>> looks_like(nn.Conv2d(3, 8, 3), 2), looks_like(nn.Conv1d(3, 8, 3), 2)
        (True, False)
    """
    return isinstance(module, float_class(dimensions))


def float_class(dimensions: int) -> type[nn.Conv1d] | type[nn.Conv2d]:
    """The class of float convolutions with 1 or 2 spatial dimensions.

    Example:
        >>> float_class(2).__name__
        'Conv2d'
    """
    return nn.Conv1d if dimensions == 1 else nn.Conv2d


def refusal(module: nn.Module) -> str | None:
    """The reason why the type or structure of a module rules out a quantized convolution, or None.

    Example:
        >>> refusal(nn.LazyConv2d(8, 3))
        'LazyConv2d (its parameters have no values yet; run the model once)'
    """
    reason = instance_refusal(module)
    if reason is not None:
        return reason
    parameters = [p for p in module._parameters.values() if p is not None]
    if any(map(is_lazy, parameters)):
        name = type(module).__name__
        return f"{name} (its parameters have no values yet; run the model once)"
    if type(module) not in (nn.Conv1d, nn.Conv2d):
        parent = next((c for c in (nn.Conv1d, nn.Conv2d) if isinstance(module, c)), None)
        kind = "not a convolution" if parent is None else f"a subclass of nn.{parent.__name__}"
        return f"{type(module).__name__} ({kind})"
    return parameter_refusal(module)


def value_refusal(module: nn.Module) -> str | None:
    """The reason why the values of a layer that :func:`refusal` accepts rule it out, or None.

    Example:
        >>> value_refusal(nn.Conv2d(4, 8, 3, device="meta"))
        'on the meta device, without values; load its weights first'
    """
    parameter = module._parameters["weight"]
    assert parameter is not None
    weight = parameter.detach()
    reason = place_refusal(weight)
    if reason is not None:
        return reason
    if tuple(weight.shape) != weight_shape(module) or weight.numel() == 0:
        return f"weight of shape {list(weight.shape)}"
    if prod(weight.shape[1:]) > _MAX_TERMS:
        return f"weight of shape {list(weight.shape)}, with sums of more than {_MAX_TERMS} products"
    return finite_refusal(weight)


def too_small(module: nn.Module) -> bool:
    """True if a layer is too small to benefit from dynamic activations; depends on its shape alone.

    Example:
        >>> too_small(nn.Conv2d(3, 32, 3)), too_small(nn.Conv2d(64, 64, 3))
        (True, False)
    """
    out_channels, *rest = weight_shape(module)
    groups: Any = module.groups
    outputs, terms = out_channels // groups, prod(rest)
    return outputs < MIN_OUT_CHANNELS or terms < MIN_TERMS or out_channels * terms < MIN_WEIGHTS


def unsuited(module: nn.Module, config: Any) -> str | None:
    """The reason why a layer does not benefit from a configuration, or None.

    It depends on the shape of the layer and on the kind of activations alone. Static activations
    suit every layer, because the data of a chain of layers stays in integers.

    Args:
        module: a convolution.
        config: a configuration of a layer, deployed or in training.

    Example:
        >>> from torchquant.configs import QuantizationConfig, Static
        >>> depthwise = nn.Conv2d(64, 64, 3, groups=64)
        >>> unsuited(depthwise, QuantizationConfig())
        'depthwise: it does not benefit from dynamic activations'
        >>> print(unsuited(depthwise, QuantizationConfig(activations=Static())))
        None
    """
    if not isinstance(config.activations, Dynamic):
        return None
    if weight_shape(module)[1] == 1 and module.groups != 1:
        return "depthwise: it does not benefit from dynamic activations"
    return "too small to benefit" if too_small(module) else None


def weight_shape(module: Any) -> tuple[int, ...]:
    """``(out_channels, in_channels / groups, *kernel_size)`` of a convolution, of any form.

    Example:
        >>> weight_shape(nn.Conv1d(8, 16, 5, groups=2))
        (16, 4, 5)
    """
    return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)


__all__ = [
    "float_class",
    "looks_like",
    "refusal",
    "too_small",
    "unsuited",
    "value_refusal",
    "weight_shape",
]
