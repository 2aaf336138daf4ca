"""Configurations of quantization-aware training, with parts for observed and learned ranges."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torchquant.configs import (
    Activations,
    Dynamic,
    MovingAverage,
    Part,
    QuantizationConfig,
    Static,
    Weights,
    check_config,
)
from torchquant.configs.part import require_bits, require_boolean
from torchquant.scheme import MAX_BITS, PER_CHANNEL, Granularity, PerGroup, quant_range

__all__ = [
    "LearnedActivations",
    "LearnedWeights",
    "ObservedActivations",
    "QATConfig",
    "TrainingConfig",
    "training_config",
]


@dataclass(frozen=True)
class LearnedWeights(Part):
    """Weights with learned steps (LSQ): symmetric, with all integers.

    Args:
        bits: 2 to 8.
        granularity: the weights that share a step: ``PerAxis(0)``, those of an output channel; or
            :class:`torchquant.PerGroup`, a group of inputs of an output channel.

    Raises:
        TypeError: granularity is not one of these.
        ValueError: bits is not an integer from 2 to 8.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020.

    Example:
        >>> LearnedWeights().range, LearnedWeights(2).range
        ((-128, 127), (-2, 1))
    """

    symmetric: ClassVar[bool] = True  # weights of LSQ have no zero point
    bits: int = 8
    granularity: Granularity = PER_CHANNEL

    def __post_init__(self) -> None:
        require_bits("LearnedWeights", "bits", self.bits)
        if self.granularity != PER_CHANNEL and not isinstance(self.granularity, PerGroup):
            raise TypeError(
                "LearnedWeights: granularity must be PerAxis(0) or PerGroup(group_size), got "
                f"{self.granularity!r}"
            )

    @property
    def range(self) -> tuple[int, int]:
        """Least and greatest integer of a weight."""
        return quant_range(self.bits)

    def deployed(self) -> Weights:
        """The weights of the converted layer, which use all integers."""
        narrow = False if self.bits == 8 else None
        return Weights(self.bits, narrow_range=narrow, granularity=self.granularity)

    def __str__(self) -> str:
        if isinstance(self.granularity, PerGroup):
            return f"int{self.bits} learned in groups of {self.granularity.group_size}"
        return f"int{self.bits} learned"


@dataclass(frozen=True)
class ObservedActivations(Activations):
    """One scale for the activations, from a moving average of the ranges that observers measure.

    Args:
        bits: 2 to 8.
        symmetric: if True, activations have no zero point.
        averaging_constant: weight of the newest batch in the moving average; in (0, 1].

    Raises:
        TypeError: averaging_constant is not a number, or symmetric is not a bool.
        ValueError: bits or averaging_constant is out of its range.

    Example:
        >>> ObservedActivations().deployed()
        Static(bits=8, symmetric=False, narrow_range=None, observer=None)
    """

    bits: int = 8
    symmetric: bool = False
    averaging_constant: float = 0.01

    def __post_init__(self) -> None:
        self.deployed()  # checks bits and symmetric
        _check_constant("ObservedActivations", self.averaging_constant)

    @property
    def range(self) -> tuple[int, int]:
        """Least and greatest integer of an activation."""
        return self.deployed().range

    def deployed(self) -> Static:
        """The activations of the converted layer."""
        return Static(self.bits, self.symmetric)

    def __str__(self) -> str:
        return f"int{self.bits} observed"


@dataclass(frozen=True)
class LearnedActivations(Activations):
    """One learned step for the activations (LSQ, LSQ+), which use all integers.

    Args:
        bits: 2 to 8.
        zero_point: "none": symmetric around 0; "unsigned": all integers are for positive values,
            for activations that are never negative (after a ReLU); "learned": an offset is learned
            in addition to the step (LSQ+) and becomes an integer zero point.

    Raises:
        ValueError: bits is not an integer from 2 to 8, or zero_point is not one of these values.

    Source: Esser et al. (2020); Bhalgat et al., "LSQ+", 2020.

    Example:
        >>> LearnedActivations(4, "unsigned").range, LearnedActivations(4, "unsigned").deployed()
        ((0, 15), Static(bits=4, symmetric=False, narrow_range=None, observer=None))
    """

    bits: int = 8
    zero_point: Literal["none", "unsigned", "learned"] = "none"

    def __post_init__(self) -> None:
        require_bits("LearnedActivations", "bits", self.bits)
        if self.zero_point not in ("none", "unsigned", "learned"):
            raise ValueError(
                'LearnedActivations: zero_point must be "none", "unsigned" or "learned", got '
                f"{self.zero_point!r}"
            )

    @property
    def range(self) -> tuple[int, int]:
        """Least and greatest integer of an activation in training."""
        return quant_range(self.bits, signed=self.zero_point != "unsigned")

    def deployed(self) -> Static:
        """The activations of the converted layer, which use all signed integers."""
        symmetric = self.zero_point == "none"
        narrow = False if symmetric and self.bits == 8 else None
        return Static(self.bits, symmetric, narrow)

    def __str__(self) -> str:
        return f"int{self.bits} learned"


@dataclass(frozen=True)
class TrainingConfig(Part):
    """The training of a layer: parts for weights and activations, and options.

    Args:
        weights: a :class:`torchquant.configs.Weights`, with scales from the range of each channel
            or group at each step, or a :class:`LearnedWeights`.
        activations: a :class:`torchquant.configs.Dynamic`, with a scale from the range of each
            token, an :class:`ObservedActivations` or a :class:`LearnedActivations`; or None, with
            which activations stay float.
        edge_bits: bits for weights and activations of the first and the last layer; None: the same
            as in other layers. The LSQ paper uses 8 bits for these layers. At 8 bits, their weights
            have scales from the range of each channel even if ``weights`` are learned, because the
            initial step of LSQ is six times as coarse.
        simulate: if True, multiply dequantized floats instead of integers, for comparison. Results
            then differ from those of the deployed layer by fp32 rounding.

    Raises:
        TypeError: weights or activations is not one of these parts, or simulate is not a bool.
        ValueError: edge_bits is not an integer from 2 to 8.

    Example:
        >>> TrainingConfig(LearnedWeights(4)) == QATConfig(weight_bits=4, learned_weights=True)
        True
    """

    weights: Any = field(default_factory=Weights)
    activations: Any = field(default_factory=Dynamic)
    edge_bits: int | None = None
    simulate: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.weights, (Weights, LearnedWeights)):
            raise TypeError(
                "TrainingConfig: weights must be Weights() or LearnedWeights(), got "
                f"{self.weights!r}"
            )
        part = self.activations
        if part is not None and (not isinstance(part, Activations) or part.needs_calibration):
            raise TypeError(
                "TrainingConfig: activations must be Dynamic(), ObservedActivations(), "
                f"LearnedActivations() or None, got {part!r}"
            )
        if self.edge_bits is not None:
            require_bits("TrainingConfig", "edge_bits", self.edge_bits)
        require_boolean("TrainingConfig", "simulate", self.simulate)

    @property
    def learned(self) -> bool:
        """True if steps are parameters, which an optimizer updates."""
        return isinstance(self.weights, LearnedWeights) or isinstance(
            self.activations, LearnedActivations
        )

    def deployed(self) -> QuantizationConfig:
        """The configuration of the layers that :func:`torchquant.convert_` creates."""
        part = self.activations
        return QuantizationConfig(
            self.weights.deployed(), None if part is None else part.deployed()
        )

    def inner(self) -> TrainingConfig:
        """The configuration of the layers between the first and the last layer."""
        return replace(self, edge_bits=None)

    def edge(self) -> TrainingConfig:
        """The configuration of the first and the last layer."""
        if self.edge_bits is None:
            return self
        weights = self.weights.with_bits(self.edge_bits)
        # At 8 bits, the initial step of LSQ, 2 mean|w| / sqrt(Qp), is six times the channel's.
        if isinstance(weights, LearnedWeights) and self.edge_bits == MAX_BITS:
            weights = Weights(self.edge_bits, granularity=weights.granularity)
        part = self.activations
        activations = None if part is None else part.with_bits(self.edge_bits)
        return replace(self, weights=weights, activations=activations, edge_bits=None)


def QATConfig(
    weight_bits: int = 8,
    activation_bits: int = 8,
    activations: Literal["dynamic", "static"] | None = "dynamic",
    learned_weights: bool = False,
    learned_activations: bool = False,
    learned_offset: bool = False,
    weight_symmetric: bool = True,
    activation_symmetric: bool = False,
    activation_signed: bool = True,
    averaging_constant: float = 0.01,
    edge_bits: int | None = None,
    simulate: bool = False,
    group_size: int | None = None,
) -> TrainingConfig:
    """Create a :class:`TrainingConfig` from options.

    Weights have one scale per output channel, or per group of inputs of an output channel: from the
    range of its weights at each step, or a learned step (LSQ, Esser et al., ICLR 2020). Dynamic
    activations have one scale per token, from the range of the token. Static activations have one
    scale: a moving average of observed ranges, or a learned step.

    Args:
        weight_bits: 2 to 8.
        activation_bits: 2 to 8.
        activations: "dynamic" or "static"; None: activations stay float, as with
            :func:`torchquant.IntxWeightOnlyConfig`.
        learned_weights: if True, the steps of weights are learned.
        learned_activations: if True, the step of activations is learned; requires static
            activations, because dynamic scales are computed from each token.
        learned_offset: if True, an offset is learned in addition to the step of activations (LSQ+,
            Bhalgat et al., 2020); it becomes an integer zero point.
        weight_symmetric: if True, weights have no zero point.
        activation_symmetric: if True, dynamic or observed activations have no zero point. For
            learned steps, ``learned_offset`` and ``activation_signed`` decide.
        activation_signed: False is for learned steps of activations that are never negative (after
            a ReLU): all integers are then for positive values.
        averaging_constant: weight of the newest batch in the moving average of observed ranges.
        edge_bits: bits of the first and the last layer; see :class:`TrainingConfig`.
        simulate: multiply dequantized floats; see :class:`TrainingConfig`.
        group_size: the inputs of an output channel that share a scale; the last group may be
            shorter. None is one scale per output channel. Only linear layers without static
            activations have groups.

    Returns:
        The configuration in parts.

    Raises:
        TypeError: a flag is not a bool, or averaging_constant is not a number.
        ValueError: bits, averaging_constant or group_size is out of its range, activations is not
            one of the two strings or None, or two options exclude each other.

    Example:
        >>> QATConfig(weight_bits=4, learned_weights=True).deployed().weights.range
        (-8, 7)
        >>> QATConfig(weight_bits=4, group_size=32).weights.granularity
        PerGroup(group_size=32)
    """
    who = "QATConfig"
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        require_bits(who, name, bits)
    if edge_bits is not None:
        require_bits(who, "edge_bits", edge_bits)
    flags = {
        "learned_weights": learned_weights,
        "learned_activations": learned_activations,
        "learned_offset": learned_offset,
        "weight_symmetric": weight_symmetric,
        "activation_symmetric": activation_symmetric,
        "activation_signed": activation_signed,
        "simulate": simulate,
    }
    for name, value in flags.items():
        require_boolean(who, name, value)
    if activations not in ("dynamic", "static", None):
        raise ValueError(
            f'{who}: activations must be "dynamic" or "static", or None, got {activations!r}'
        )
    _check_constant(who, averaging_constant)
    granularity = _granularity(who, group_size, activations == "static")
    quantized = (activation_bits != 8, activation_symmetric, learned_activations)
    if activations is None and any(quantized):
        raise ValueError(
            f"{who}: activation_bits, activation_symmetric and learned_activations must be left "
            "out with activations=None, with which activations stay float"
        )
    if learned_activations and activations == "dynamic":
        raise ValueError(
            f'{who}: learned_activations needs activations="static", got "dynamic": a dynamic '
            "scale is computed from each token's own range at run time, so there is no step to "
            'learn; pass activations="static", or learn the weights\' steps only'
        )
    if learned_offset and not (learned_activations and activation_signed):
        raise ValueError(
            f"{who}: learned_offset needs learned_activations=True and activation_signed=True, got "
            f"{learned_activations} and {activation_signed}; it is the offset next to an "
            "activation's learned step"
        )
    if learned_weights and not weight_symmetric:
        raise ValueError(
            f"{who}: weight_symmetric must be True with learned_weights=True, got False; LSQ's "
            "weights have no zero point"
        )
    if not activation_signed and not learned_activations:
        raise ValueError(
            f"{who}: activation_signed must be True unless learned_activations is, got False; "
            "observed ranges determine their zero point"
        )
    part: Activations | None
    if activations is None:
        part = None
    elif activations == "dynamic":
        part = Dynamic(activation_bits, activation_symmetric)
    elif learned_activations:
        sign: Literal["none", "unsigned"] = "none" if activation_signed else "unsigned"
        part = LearnedActivations(activation_bits, "learned" if learned_offset else sign)
    else:
        part = ObservedActivations(activation_bits, activation_symmetric, averaging_constant)
    weights = (
        LearnedWeights(weight_bits, granularity)
        if learned_weights
        else Weights(weight_bits, weight_symmetric, granularity=granularity)
    )
    return TrainingConfig(weights, part, edge_bits, simulate)


def training_config(who: str, config: TrainingConfig | QuantizationConfig | None) -> TrainingConfig:
    """Return the training for a configuration to deploy; a TrainingConfig is returned unchanged.

    None is the default configuration.

    Raises:
        TypeError: config is not a configuration; the message starts with ``who``.
        ValueError: config has a range of activations that needs learned steps, or an observer that
            training cannot use.

    Example:
        >>> from torchquant import Int8StaticActivationInt8WeightConfig
        >>> training_config("prepare_qat_", Int8StaticActivationInt8WeightConfig()).activations
        ObservedActivations(bits=8, symmetric=False, averaging_constant=0.01)
    """
    if config is None:
        return TrainingConfig()
    if isinstance(config, TrainingConfig):
        return config
    config = check_config(who, config)
    activations = config.activations
    if isinstance(activations, Static):
        observer = activations.observer or MovingAverage()
        if not isinstance(observer, MovingAverage):
            raise ValueError(
                f"{who}: config must have observer=None or MovingAverage(), got {observer}, whose "
                "range would need all batches at once; training averages over the batches, and "
                "prepare_(model, config) with calibrate(model, loader) needs no training"
            )
        activations = ObservedActivations(
            activations.bits, activations.symmetric, observer.averaging_constant
        )
    training = TrainingConfig(config.weights, activations)
    if config.activations is None:
        return training
    if training.activations.deployed().range != config.activations.range:
        raise ValueError(
            f"{who}: config must leave activation_narrow_range at None, got {config}; "
            "observed ranges give the default, and QATConfig(learned_activations=True) the other"
        )
    return training


def _granularity(who: str, group_size: object, static: bool) -> Granularity:
    if group_size is None:
        return PER_CHANNEL
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(
            f"{who}: group_size must be a positive integer, or None for one scale per output "
            f"channel, got {group_size!r}"
        )
    if static:
        raise ValueError(
            f'{who}: group_size must be None with activations="static", got {group_size}; layers '
            'whose weights have groups take activations="dynamic" or None'
        )
    return PerGroup(group_size)


def _check_constant(who: str, constant: object) -> None:
    if isinstance(constant, bool) or not isinstance(constant, (int, float)):
        raise TypeError(f"{who}: averaging_constant must be a number, got {constant!r}")
    if not 0 < constant <= 1:
        raise ValueError(f"{who}: averaging_constant must be in (0, 1], got {constant!r}")
