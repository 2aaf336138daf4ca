"""Which class of quantized linear layer has a configuration."""

from __future__ import annotations

from typing import Any

from torchquant.configs import Dynamic
from torchquant.nn.intx_linear import QuantizedIntxLinear
from torchquant.nn.intx_weight import group_size_of, most_inputs
from torchquant.nn.linear import QuantizedLinear


def linear_class(config: Any, shape: tuple[int, ...] | None = None) -> Any:
    """The class of the layer that has ``config``.

    :class:`QuantizedIntxLinear` has weights in groups, weights beside float activations, and
    weights of fewer than 8 bits beside dynamic activations. Everything else is a
    :class:`QuantizedLinear`, and so is a layer with too many inputs for one scale of fewer bits.

    Args:
        config: the configuration of a quantized layer.
        shape: the shape of the weight; None for a layer of any shape.

    Example:
        >>> from torchquant import IntxActivationIntxWeightConfig as Config
        >>> linear_class(Config(8)).__name__, linear_class(Config(4)).__name__
        ('QuantizedLinear', 'QuantizedIntxLinear')
        >>> linear_class(Config(4), (64, 100_000)).__name__
        'QuantizedLinear'
    """
    weights, activations = config.weights, config.activations
    if group_size_of(weights) is not None or activations is None:
        return QuantizedIntxLinear
    fits = shape is None or shape[1] <= most_inputs(weights.bits)
    small = weights.bits < 8 and isinstance(activations, Dynamic) and fits
    return QuantizedIntxLinear if small else QuantizedLinear


__all__ = ["linear_class"]
