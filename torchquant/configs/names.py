"""Configurations under the names that torchao gave them."""

from __future__ import annotations

from torchquant.configs.layers import Dynamic, QuantizationConfig, Static, Weights
from torchquant.configs.part import require_bits, require_boolean


def Int8DynamicActivationInt8WeightConfig(
    activation_symmetric: bool = False, weight_symmetric: bool = True
) -> QuantizationConfig:
    """int8 weights with one scale per output channel; int8 activations with one scale per token.

    This is the default for linear layers. Activation scales are computed at run time.

    Args:
        activation_symmetric: see :class:`Dynamic`.
        weight_symmetric: if True, weights are in [-127, 127]; if False, they are in [-128, 127],
            with one zero point per channel.

    Returns:
        The configuration in parts.

    Raises:
        TypeError: a flag is not a bool.

    Example:
        >>> Int8DynamicActivationInt8WeightConfig(activation_symmetric=True).activations
        Dynamic(bits=8, symmetric=True)
    """
    who = "Int8DynamicActivationInt8WeightConfig"
    flags = _flags(who, activation_symmetric, weight_symmetric)
    return QuantizationConfig(Weights(symmetric=flags[1]), Dynamic(symmetric=flags[0]))


def Int8StaticActivationInt8WeightConfig(
    activation_symmetric: bool = False,
    weight_symmetric: bool = True,
    activation_narrow_range: bool | None = None,
) -> QuantizationConfig:
    """int8 weights with one scale per output channel; int8 activations with one scale per tensor.

    The scale of the activations has to be observed or learned before, with
    :func:`torchquant.prepare_qat_` and :func:`torchquant.convert_`.

    Args:
        activation_symmetric: if True, activations have no zero point.
        weight_symmetric: if True, weights are in [-127, 127]; if False, they are in [-128, 127],
            with one zero point per channel.
        activation_narrow_range: see :class:`Static`.

    Returns:
        The configuration in parts.

    Raises:
        TypeError: a flag is not a bool.

    Example:
        >>> Int8StaticActivationInt8WeightConfig().activations.range
        (-128, 127)
    """
    who = "Int8StaticActivationInt8WeightConfig"
    flags = _flags(who, activation_symmetric, weight_symmetric)
    if activation_narrow_range is not None:
        require_boolean(who, "activation_narrow_range", activation_narrow_range, ", or None")
    activations = Static(8, flags[0], activation_narrow_range)
    return QuantizationConfig(Weights(symmetric=flags[1]), activations)


def IntxActivationIntxWeightConfig(
    weight_bits: int = 4,
    activation_bits: int = 8,
    static: bool = False,
    activation_symmetric: bool = False,
    weight_symmetric: bool = True,
) -> QuantizationConfig:
    """Weights and activations of 2 to 8 bits each, on the int8 kernels.

    Integers of fewer than 8 bits are stored and multiplied as int8. Layers with fewer bits are
    therefore neither smaller nor faster than layers with 8 bits.

    Args:
        weight_bits: 2 to 8; weights have one scale per output channel.
        activation_bits: 2 to 8.
        static: if True, activations have one scale, observed or learned before; if False, one scale
            per token, computed at run time.
        activation_symmetric: if True, activations have no zero point.
        weight_symmetric: if True, weights have no zero point.

    Returns:
        The configuration in parts.

    Raises:
        TypeError: a flag is not a bool.
        ValueError: weight_bits or activation_bits is not an integer from 2 to 8.

    Example:
        >>> config = IntxActivationIntxWeightConfig(weight_bits=4)
        >>> config.weights.range, config.activations.range
        ((-8, 7), (-128, 127))
    """
    who = "IntxActivationIntxWeightConfig"
    require_bits(who, "weight_bits", weight_bits)
    require_bits(who, "activation_bits", activation_bits)
    require_boolean(who, "static", static)
    flags = _flags(who, activation_symmetric, weight_symmetric)
    activations = Static if static else Dynamic
    return QuantizationConfig(
        Weights(weight_bits, flags[1]), activations(activation_bits, flags[0])
    )


def _flags(who: str, activation: bool, weight: bool) -> tuple[bool, bool]:
    require_boolean(who, "activation_symmetric", activation)
    require_boolean(who, "weight_symmetric", weight)
    return activation, weight
