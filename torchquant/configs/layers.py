"""The parts of a quantized layer's configuration: weights, activations, and both together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torchquant.configs.calibration import Calibration
from torchquant.configs.part import GRANULARITIES, Part, require_bits, require_booleans
from torchquant.scheme import PER_CHANNEL, Granularity, PerGroup, PerTensor, quant_range

_EXAMPLE = "Int8DynamicActivationInt8WeightConfig()"
_OURS = "torchquant."


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
        require_bits(type(self).__name__, "bits", self.bits)
        require_booleans(self, "symmetric")
        require_booleans(self, "narrow_range", optional=True)
        if not isinstance(self.granularity, GRANULARITIES):
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
        place = where.get(self.granularity, str(self.granularity))
        if isinstance(self.granularity, PerGroup):
            place = f"in groups of {self.granularity.group_size}"
        return f"int{self.bits} {place}{zero}"


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
        require_bits(type(self).__name__, "bits", self.bits)
        require_booleans(self, "symmetric")

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
        observer: how :func:`torchquant.calibrate` chooses the range, for example
            ``torchquant.configs.Percentile(99.9)``; None is ``Histogram()``.

    Raises:
        TypeError: a flag is not a bool, or observer is not a
            :class:`torchquant.configs.Calibration`.
        ValueError: bits is not an integer from 2 to 8.

    Example:
        >>> Static().range, Static(symmetric=True, narrow_range=False).range
        ((-128, 127), (-128, 127))
    """

    needs_calibration: ClassVar[bool] = True
    bits: int = 8
    symmetric: bool = False
    narrow_range: bool | None = None
    observer: Calibration | None = None

    def __post_init__(self) -> None:
        require_bits(type(self).__name__, "bits", self.bits)
        require_booleans(self, "symmetric")
        require_booleans(self, "narrow_range", optional=True)
        if self.observer is not None and not isinstance(self.observer, Calibration):
            raise TypeError(
                "Static: observer must be None or a part of torchquant.configs such as "
                f"Percentile(99.9), got {self.observer!r}"
            )

    @property
    def range(self) -> tuple[int, int]:
        """Least and greatest integer of an activation."""
        return _range(self.bits, self.symmetric, self.narrow_range)

    def __str__(self) -> str:
        return f"int{self.bits} per tensor{'' if self.symmetric else ' with zero point'}"


@dataclass(frozen=True)
class Float(Part):
    """The value that leaves a layer stays float32: a chain of int8 layers ends there on purpose.

    Example:
        >>> QuantizationConfig(activations=Static(), output=Float()).output
        Float()
    """

    def __str__(self) -> str:
        return "float"


@dataclass(frozen=True)
class QuantizationConfig(Part):
    """The quantization of a layer: of its weight, and of the activations that enter the layer.

    Args:
        weights: an instance of :class:`Weights`.
        activations: an instance of :class:`Dynamic`, :class:`Static`, or another subclass of
            :class:`Activations`; or None, with which activations stay float.
        output: the value that leaves the layer, after an addition and an activation that are
            computed with it, in a region whose values are int8. A :class:`Static` rounds it to
            these integers, whatever reads it; a :class:`Float` keeps it float32; None rounds it
            where a layer with static activations reads it, to the integers of this layer.

    Raises:
        TypeError: weights is not a :class:`Weights`, activations is not an :class:`Activations` and
            not None, or output is not one of its parts.
        ValueError: output is given although activations are not static.

    Example:
        >>> from torchquant.configs import IntxActivationIntxWeightConfig
        >>> QuantizationConfig(Weights(bits=4)) == IntxActivationIntxWeightConfig(4)
        True
    """

    weights: Weights = field(default_factory=Weights)
    activations: Any = field(default_factory=Dynamic)
    output: Static | Float | None = field(default=None, metadata={"left_out": True})

    def __post_init__(self) -> None:
        if self.output is not None and not isinstance(self.output, (Static, Float)):
            raise TypeError(
                f"QuantizationConfig: output must be None, Static() or Float(), got {self.output!r}"
            )
        for name, kind in (("weights", Weights), ("activations", Activations)):
            value = getattr(self, name)
            if not isinstance(value, kind) and (name, value) != ("activations", None):
                example = {"weights": "Weights()", "activations": "Dynamic(), Static() or None"}[
                    name
                ]
                raise TypeError(f"QuantizationConfig: {name} must be {example}, got {value!r}")
        if self.output is not None and not isinstance(self.activations, Static):
            raise ValueError(
                "QuantizationConfig: output must be None unless activations are Static(), got "
                f"{self.output!r} with {self.activations!r}; values between layers are int8 only "
                "where the layers have static activations"
            )


def check_config(who: str, config: QuantizationConfig | None) -> QuantizationConfig:
    """Return ``config``, or the default configuration for None.

    Raises:
        TypeError: config is not a :class:`QuantizationConfig`; the message starts with ``who``.

    Example:
        >>> from torchquant.configs import Int8DynamicActivationInt8WeightConfig
        >>> check_config("quantize_", None) == Int8DynamicActivationInt8WeightConfig()
        True
    """
    if config is None:
        return QuantizationConfig()
    if isinstance(config, QuantizationConfig):
        return config
    if callable(config) and str(getattr(config, "__module__", "")).startswith(_OURS):
        got = f"{config.__name__} without parentheses; call it: {config.__name__}()"
    elif isinstance(config, type) or type(config).__module__.startswith(("builtins", _OURS)):
        got = repr(config)
    else:  # torchao has classes of the same names
        got = f"{config!r} of {type(config).__module__}"
    raise TypeError(
        f"{who}: config must be a torchquant configuration such as {_EXAMPLE}, got {got}"
    )


def _range(bits: int, symmetric: bool, narrow: bool | None = None) -> tuple[int, int]:
    return quant_range(bits, narrow_range=symmetric and bits == 8 if narrow is None else narrow)
