"""Configurations under the names that torchao gave them."""

from __future__ import annotations

from torchquant.configs.calibration import Calibration, calibration_named
from torchquant.configs.layers import Dynamic, Float, QuantizationConfig, Static, Weights
from torchquant.configs.part import require_bits, require_boolean
from torchquant.scheme import PER_CHANNEL, Granularity, PerGroup


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
    observer: Calibration | str | None = None,
    output: Static | Float | None = None,
) -> QuantizationConfig:
    """int8 weights with one scale per output channel; int8 activations with one scale per tensor.

    The scale of the activations has to be observed or learned before: observed with
    :func:`torchquant.prepare_` and :func:`torchquant.calibrate`, or in training with
    :func:`torchquant.prepare_qat_`; :func:`torchquant.convert_` then makes the layers.

    Args:
        activation_symmetric: if True, activations have no zero point.
        weight_symmetric: if True, weights are in [-127, 127]; if False, they are in [-128, 127],
            with one zero point per channel.
        activation_narrow_range: see :class:`Static`.
        observer: how the range of the activations is chosen: "histogram" (least squared error; used
            for None), "minmax", "moving_average", "percentile", "entropy", or a part with other
            arguments, such as ``torchquant.configs.Percentile(99.9)``.
        output: whether the value that leaves the layer is int8, see :class:`QuantizationConfig`.

    Returns:
        The configuration in parts.

    Raises:
        TypeError: a flag is not a bool, or observer or output is not one of these.
        ValueError: observer is a string that is no name.

    Example:
        >>> Int8StaticActivationInt8WeightConfig().activations.range
        (-128, 127)
        >>> Int8StaticActivationInt8WeightConfig(observer="entropy").activations.observer
        Entropy(bins=2048, levels=128)
    """
    who = "Int8StaticActivationInt8WeightConfig"
    flags = _flags(who, activation_symmetric, weight_symmetric)
    if activation_narrow_range is not None:
        require_boolean(who, "activation_narrow_range", activation_narrow_range, ", or None")
    chosen = calibration_named(who, observer)
    activations = Static(8, flags[0], activation_narrow_range, chosen)
    return QuantizationConfig(Weights(symmetric=flags[1]), activations, output)


def IntxActivationIntxWeightConfig(
    weight_bits: int = 4,
    activation_bits: int = 8,
    static: bool = False,
    activation_symmetric: bool = False,
    weight_symmetric: bool = True,
    observer: Calibration | str | None = None,
) -> QuantizationConfig:
    """Weights and activations of 2 to 8 bits each.

    In linear layers, weights take as many bits as they have. In convolutions, and in linear layers
    whose values stay int8 from layer to layer, they are stored as int8. Activations are multiplied
    as int8, whatever their number of bits.

    Args:
        weight_bits: 2 to 8; weights have one scale per output channel.
        activation_bits: 2 to 8.
        static: if True, activations have one scale, observed or learned before; if False, one scale
            per token, computed at run time.
        activation_symmetric: if True, activations have no zero point.
        weight_symmetric: if True, weights have no zero point.
        observer: how the range of static activations is chosen, see
            :func:`Int8StaticActivationInt8WeightConfig`.

    Returns:
        The configuration in parts.

    Raises:
        TypeError: a flag is not a bool, or observer is not of the types above.
        ValueError: weight_bits or activation_bits is not an integer from 2 to 8; observer is a
            string that is no name, or is given although activations are dynamic.

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
    chosen = calibration_named(who, observer)
    if chosen is not None and not static:
        raise ValueError(
            f"{who}: observer must be None for dynamic activations, got {observer!r}; their ranges "
            "are computed at run time, and static=True observes them"
        )
    activations: Dynamic | Static = Dynamic(activation_bits, flags[0])
    if static:
        activations = Static(activation_bits, flags[0], observer=chosen)
    return QuantizationConfig(Weights(weight_bits, flags[1]), activations)


def Int8DynamicActivationIntxWeightConfig(
    bits: int = 4,
    group_size: int | None = 32,
    symmetric: bool = True,
    activation_symmetric: bool = False,
) -> QuantizationConfig:
    """Weights of 2 to 8 bits in groups; int8 activations with one scale per token.

    The layers multiply integers. They need ``bits`` bits for a weight and 32 bits for the scale of
    a group, on disk and in memory, and 8 bits more for a zero point.

    Args:
        bits: 2 to 8 bits of a weight.
        group_size: the inputs of an output channel that share a scale; the last group may be
            shorter. None is one scale per output channel.
        symmetric: if True, weights have no zero point; if False, one zero point per scale.
        activation_symmetric: see :class:`Dynamic`.

    Returns:
        The configuration in parts.

    Raises:
        TypeError: a flag is not a bool.
        ValueError: bits is not an integer from 2 to 8, or group_size is not a positive integer.

    Example:
        >>> config = Int8DynamicActivationIntxWeightConfig(bits=4, group_size=128)
        >>> print(config.weights, "and", config.activations)
        int4 in groups of 128 and int8 per token with zero point
    """
    who = "Int8DynamicActivationIntxWeightConfig"
    require_boolean(who, "activation_symmetric", activation_symmetric)
    weights = _weights(who, bits, group_size, symmetric)
    return QuantizationConfig(weights, Dynamic(symmetric=activation_symmetric))


def IntxWeightOnlyConfig(
    bits: int = 4, group_size: int | None = 128, symmetric: bool = True
) -> QuantizationConfig:
    """Weights of 2 to 8 bits in groups; activations stay float.

    The layers multiply floats: each integer is converted in a register.
    :func:`Int8DynamicActivationIntxWeightConfig` is faster for many rows.

    It applies to embeddings, too: each row of a table is an output channel; see
    :func:`torchquant.quantize_`.

    Args:
        bits: 2 to 8 bits of a weight.
        group_size: the inputs of an output channel that share a scale; the last group may be
            shorter. None is one scale per output channel.
        symmetric: if True, weights have no zero point; if False, one zero point per scale.

    Returns:
        The configuration in parts.

    Raises:
        TypeError: symmetric is not a bool.
        ValueError: bits is not an integer from 2 to 8, or group_size is not a positive integer.

    Example:
        >>> print(IntxWeightOnlyConfig(bits=3).weights, IntxWeightOnlyConfig().activations)
        int3 in groups of 128 None
    """
    return QuantizationConfig(_weights("IntxWeightOnlyConfig", bits, group_size, symmetric), None)


def Int8WeightOnlyConfig(group_size: int | None = None) -> QuantizationConfig:
    """int8 weights with one scale per output channel, or per group; activations stay float.

    It applies to embeddings, too; see :func:`torchquant.quantize_`.

    Args:
        group_size: see :func:`IntxWeightOnlyConfig`; None is one scale per output channel.

    Returns:
        The configuration in parts.

    Raises:
        ValueError: group_size is not a positive integer.

    Example:
        >>> Int8WeightOnlyConfig() == IntxWeightOnlyConfig(8, group_size=None)
        True
    """
    return QuantizationConfig(_weights("Int8WeightOnlyConfig", 8, group_size, True), None)


def _weights(who: str, bits: int, group_size: int | None, symmetric: bool) -> Weights:
    require_bits(who, "bits", bits)
    require_boolean(who, "symmetric", symmetric)
    granularity: Granularity = PER_CHANNEL
    if group_size is not None:
        if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
            raise ValueError(
                f"{who}: group_size must be a positive integer, or None for one scale per output "
                f"channel, got {group_size!r}"
            )
        granularity = PerGroup(group_size)
    return Weights(bits, symmetric, granularity=granularity)


def _flags(who: str, activation: bool, weight: bool) -> tuple[bool, bool]:
    require_boolean(who, "activation_symmetric", activation)
    require_boolean(who, "weight_symmetric", weight)
    return activation, weight
