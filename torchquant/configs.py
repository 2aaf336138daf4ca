"""Configurations of quantized layers, which consist of parts: one for weights, one for activations.

A configuration can be written in parts, such as
``QuantizationConfig(Weights(bits=4), Dynamic(symmetric=True))``. The functions with the names of
torchao (:func:`Int8DynamicActivationInt8WeightConfig` and others) create the same values. Parts are
frozen dataclasses, and layers decide by the class of a part. A subclass of :class:`Weights` or
:class:`Activations` is a new part, which files can store without further code.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar

from torchquant.scheme import (
    MAX_BITS,
    MIN_BITS,
    PER_CHANNEL,
    Granularity,
    PerAxis,
    PerGroup,
    PerTensor,
    PerToken,
    quant_range,
)

__all__ = [
    "Activations",
    "Dynamic",
    "Fusion",
    "Int8DynamicActivationInt8WeightConfig",
    "Int8StaticActivationInt8WeightConfig",
    "IntxActivationIntxWeightConfig",
    "Part",
    "QuantizationConfig",
    "Static",
    "Weights",
    "check_config",
    "check_fusion",
    "config_from_dict",
    "config_to_dict",
]

_GRANULARITIES = (PerTensor, PerAxis, PerGroup, PerToken)
# The classes that files can store: granularities, and every subclass of Part.
_CLASSES: dict[str, type] = {cls.__name__: cls for cls in _GRANULARITIES}
_EXAMPLE = "Int8DynamicActivationInt8WeightConfig()"


def _range(bits: int, symmetric: bool, narrow: bool | None = None) -> tuple[int, int]:
    return quant_range(bits, narrow_range=symmetric and bits == 8 if narrow is None else narrow)


def _flags(who: str, activation: bool, weight: bool) -> tuple[bool, bool]:
    _require_boolean(who, "activation_symmetric", activation)
    _require_boolean(who, "weight_symmetric", weight)
    return activation, weight


def _require_boolean(who: str, name: str, value: object, or_none: str = "") -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{who}: {name} must be True or False{or_none}, got {value!r}")


def _require_booleans(part: object, name: str, optional: bool = False) -> None:
    value = getattr(part, name)
    if not (optional and value is None):
        or_none = ", or None" if optional else ""
        _require_boolean(type(part).__name__, name, value, or_none)


def _require_bits(who: str, name: str, bits: object) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(
            f"{who}: {name} must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}"
        )


class Part:
    """Base class of frozen dataclasses that files can store.

    The values of a part are numbers, strings, None, and other parts. A subclass is registered under
    its name, so that :func:`config_from_dict` finds it.

    Raises:
        TypeError: a subclass is defined with the name of another part.

    Example:
        >>> Weights(bits=4).with_bits(2)
        Weights(bits=2, symmetric=True, narrow_range=None, granularity=PerAxis(axis=0))
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        other = _CLASSES.get(cls.__name__, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"Part: the name of a part must be unique, got {cls.__name__!r} for "
                f"{cls.__module__}.{cls.__qualname__} and for {other.__module__}."
                f"{other.__qualname__}; rename the new class"
            )
        _CLASSES[cls.__name__] = cls

    def with_bits(self, bits: int) -> Any:
        """The same part with a different number of bits."""
        return replace(self, bits=bits)  # type: ignore[type-var]

    def deployed(self) -> Any:
        """The part of the deployed layer, for a part that trains; by default the part itself."""
        return self


@dataclass(frozen=True)
class Weights(Part):
    """The quantization of a weight.

    Args:
        bits: 2 to 8.
        symmetric: if True, weights have no zero point; if False, one zero point per scale.
        narrow_range: whether the least integer is excluded; None excludes it only for symmetric
            weights of 8 bits, whose range is then [-127, 127].
        granularity: the elements that share a scale; ``PerAxis(0)`` is one scale per output
            channel.

    Raises:
        TypeError: a flag is not a bool, or granularity is not one of the granularity classes.
        ValueError: bits is not an integer from 2 to 8.

    Example:
        >>> Weights().range, Weights(bits=4).range, Weights(symmetric=False).range
        ((-127, 127), (-8, 7), (-128, 127))
    """

    bits: int = 8
    symmetric: bool = True
    narrow_range: bool | None = None
    granularity: Granularity = PER_CHANNEL

    def __post_init__(self) -> None:
        _require_bits(type(self).__name__, "bits", self.bits)
        _require_booleans(self, "symmetric")
        _require_booleans(self, "narrow_range", optional=True)
        if not isinstance(self.granularity, _GRANULARITIES):
            raise TypeError(
                f"{type(self).__name__}: granularity must be PerTensor(), PerAxis(axis), "
                f"PerGroup(group_size) or PerToken(), got {self.granularity!r}"
            )

    @property
    def range(self) -> tuple[int, int]:
        """Least and greatest integer of a weight."""
        return _range(self.bits, self.symmetric, self.narrow_range)

    def __str__(self) -> str:
        zero = "" if self.symmetric else " with zero point"
        where = {PER_CHANNEL: "per channel", PerTensor(): "per tensor"}
        return f"int{self.bits} {where.get(self.granularity, self.granularity)}{zero}"


@dataclass(frozen=True)
class Activations(Part):
    """The quantization of the activations that enter a layer; the base class of such parts.

    Example:
        >>> isinstance(Dynamic(), Activations), Activations.needs_calibration
        (True, False)
    """

    # True if ranges have to be observed or learned before a layer can be quantized.
    needs_calibration: ClassVar[bool] = False


@dataclass(frozen=True)
class Dynamic(Activations):
    """One scale per token, computed from the range of the token at run time.

    This needs no calibration data, and a token gives the same bits alone and in any batch.

    Args:
        bits: 2 to 8.
        symmetric: if True, activations are in [-qmax, qmax]; if False, they use the whole range,
            with one zero point per token. The latter is about 5 % slower, and more accurate for
            values that are not centred at 0 (after GELU or ReLU, and usually in transformers).

    Raises:
        TypeError: symmetric is not a bool.
        ValueError: bits is not an integer from 2 to 8.

    Example:
        >>> Dynamic().range, Dynamic(symmetric=True).range
        ((-128, 127), (-127, 127))
    """

    bits: int = 8
    symmetric: bool = False

    def __post_init__(self) -> None:
        _require_bits(type(self).__name__, "bits", self.bits)
        _require_booleans(self, "symmetric")

    @property
    def range(self) -> tuple[int, int]:
        """Least and greatest integer of an activation."""
        return _range(self.bits, self.symmetric)

    def __str__(self) -> str:
        return f"int{self.bits} per token{'' if self.symmetric else ' with zero point'}"


@dataclass(frozen=True)
class Static(Activations):
    """One scale for the whole tensor, observed or learned before; values outside saturate.

    Args:
        bits: 2 to 8.
        symmetric: if True, activations have no zero point.
        narrow_range: whether the least integer is excluded; None excludes it only for symmetric
            activations of 8 bits, as for observed ranges. Learned steps use all integers.

    Raises:
        TypeError: a flag is not a bool.
        ValueError: bits is not an integer from 2 to 8.

    Example:
        >>> Static().range, Static(symmetric=True, narrow_range=False).range
        ((-128, 127), (-128, 127))
    """

    needs_calibration: ClassVar[bool] = True
    bits: int = 8
    symmetric: bool = False
    narrow_range: bool | None = None

    def __post_init__(self) -> None:
        _require_bits(type(self).__name__, "bits", self.bits)
        _require_booleans(self, "symmetric")
        _require_booleans(self, "narrow_range", optional=True)

    @property
    def range(self) -> tuple[int, int]:
        """Least and greatest integer of an activation."""
        return _range(self.bits, self.symmetric, self.narrow_range)

    def __str__(self) -> str:
        return f"int{self.bits} per tensor{'' if self.symmetric else ' with zero point'}"


@dataclass(frozen=True)
class QuantizationConfig(Part):
    """The quantization of a layer: of its weight, and of the activations that enter the layer.

    Args:
        weights: an instance of :class:`Weights`.
        activations: an instance of :class:`Dynamic`, :class:`Static`, or another subclass of
            :class:`Activations`.

    Raises:
        TypeError: weights is not a :class:`Weights`, or activations is not an
            :class:`Activations`.

    Example:
        >>> QuantizationConfig(Weights(bits=4)) == IntxActivationIntxWeightConfig(4)
        True
    """

    weights: Weights = field(default_factory=Weights)
    activations: Any = field(default_factory=Dynamic)

    def __post_init__(self) -> None:
        for name, kind in (("weights", Weights), ("activations", Activations)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                example = {"weights": "Weights()", "activations": "Dynamic() or Static()"}[name]
                raise TypeError(f"QuantizationConfig: {name} must be {example}, got {value!r}")


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
        _require_boolean(who, "activation_narrow_range", activation_narrow_range, ", or None")
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
    _require_bits(who, "weight_bits", weight_bits)
    _require_bits(who, "activation_bits", activation_bits)
    _require_boolean(who, "static", static)
    flags = _flags(who, activation_symmetric, weight_symmetric)
    activations = Static if static else Dynamic
    return QuantizationConfig(
        Weights(weight_bits, flags[1]), activations(activation_bits, flags[0])
    )


@dataclass(frozen=True)
class Fusion:
    """What :func:`torchquant.quantize_` may compute together with the quantized layers.

    With the defaults, the results of a model change only by rounding.

    Args:
        activations: if True, an activation module after a layer becomes part of the layer, which
            computes it while the sums are in registers. Results change by rounding: the library's
            polynomials replace those of torch (:mod:`torchquant.functional.activations` states
            their errors), and a bfloat16 or float16 model rounds once less, because the values
            between the two modules stay in float32.
        projections: if True, layers that are applied to the same tensor (query, key and value; gate
            and up) are computed together, so that the tensor is quantized once. Results keep their
            bits. This takes effect only while gradients (``torch.no_grad``,
            ``torch.inference_mode``) and autocast are off.

    Raises:
        TypeError: a flag is not a bool.

    Example:
        >>> Fusion(activations=False)
        Fusion(activations=False, projections=True)
    """

    activations: bool = True
    projections: bool = True

    def __post_init__(self) -> None:
        _require_booleans(self, "activations")
        _require_booleans(self, "projections")


# ---------------------------------------------------------------- checks


def check_config(who: str, config: QuantizationConfig | None) -> QuantizationConfig:
    """Return ``config``, or the default configuration for None.

    Raises:
        TypeError: config is not a :class:`QuantizationConfig`; the message starts with ``who``.

    Example:
        >>> check_config("quantize_", None) == Int8DynamicActivationInt8WeightConfig()
        True
    """
    if config is None:
        return QuantizationConfig()
    if isinstance(config, QuantizationConfig):
        return config
    if callable(config) and getattr(config, "__module__", None) == __name__:
        got = f"{config.__name__} without parentheses; call it: {config.__name__}()"
    elif isinstance(config, type) or type(config).__module__ in ("builtins", __name__):
        got = repr(config)
    else:  # torchao has classes of the same names
        got = f"{config!r} of {type(config).__module__}"
    raise TypeError(
        f"{who}: config must be a torchquant configuration such as {_EXAMPLE}, got {got}"
    )


def check_fusion(who: str, fusion: Fusion | None) -> Fusion:
    """Return ``fusion``, or the default value for None.

    Raises:
        TypeError: fusion is not a :class:`Fusion`; the message starts with ``who``.

    Example:
        >>> check_fusion("quantize_", None) == Fusion()
        True
    """
    if fusion is None:
        return Fusion()
    if not isinstance(fusion, Fusion):
        raise TypeError(f"{who}: fusion must be a torchquant.Fusion(), got {fusion!r}")
    return fusion


# ---------------------------------------------------------------- JSON


def config_to_dict(config: Any) -> dict[str, Any]:
    """Convert a configuration or a part to JSON values; the key ``type`` is the name of its class.

    Example:
        >>> config_to_dict(Dynamic(symmetric=True))
        {'type': 'Dynamic', 'bits': 8, 'symmetric': True}
    """
    values = {entry.name: getattr(config, entry.name) for entry in fields(config)}
    parts = {
        name: config_to_dict(value) if is_dataclass(value) else value
        for name, value in values.items()
    }
    return {"type": type(config).__name__, **parts}


def config_from_dict(values: dict[str, Any]) -> Any:
    """Create the configuration or part from the result of :func:`config_to_dict`.

    Raises:
        ValueError: no class has the name, or a value is missing, superfluous or not valid.

    Example:
        >>> config_from_dict(config_to_dict(QuantizationConfig())) == QuantizationConfig()
        True
    """
    values = dict(values)
    name = values.pop("type", None)
    if name not in _CLASSES:
        raise ValueError(
            f"configuration type must be one of {', '.join(_CLASSES)}, got {name!r}; the file may "
            "be from a newer torchquant, or the module that defines this type is not imported"
        )
    parts = {
        key: config_from_dict(value) if isinstance(value, dict) else value
        for key, value in values.items()
    }
    try:
        return _CLASSES[name](**parts)
    except TypeError as error:
        raise ValueError(f"configuration {name} does not fit this torchquant: {error}") from None
