"""How a model is trained for quantization: parts for ranges that are observed or learned."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torchquant.configs import (
    Activations,
    Dynamic,
    Part,
    QuantizationConfig,
    Static,
    Weights,
    check_config,
)
from torchquant.configs.part import require_bits, require_boolean
from torchquant.scheme import MAX_BITS, quant_range

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
    """Weights with a learned step per output channel (LSQ); symmetric, with all levels.

    Args:
        bits: 2 to 8.

    Raises:
        ValueError: bits is not an integer from 2 to 8.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020.

    Example:
        >>> LearnedWeights().range, LearnedWeights(2).range
        ((-128, 127), (-2, 1))
    """

    symmetric: ClassVar[bool] = True  # LSQ's weights have no zero point
    bits: int = 8

    def __post_init__(self) -> None:
        require_bits("LearnedWeights", "bits", self.bits)

    @property
    def range(self) -> tuple[int, int]:
        """Least and greatest integer of a weight."""
        return quant_range(self.bits)

    def deployed(self) -> Weights:
        """The weights of the converted layer, which keep all levels."""
        return Weights(self.bits, narrow_range=False if self.bits == 8 else None)

    def __str__(self) -> str:
        return f"int{self.bits} learned"


@dataclass(frozen=True)
class ObservedActivations(Activations):
    """One scale for the activations, from a moving average of the ranges that observers measure.

    Args:
        bits: 2 to 8.
        symmetric: no zero point.
        averaging_constant: weight of the newest batch in the moving average; in (0, 1].

    Raises:
        TypeError: averaging_constant is not a number, or symmetric is not a bool.
        ValueError: bits or averaging_constant is out of its range.

    Example:
        >>> ObservedActivations().deployed()
        Static(bits=8, symmetric=False, narrow_range=None)
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
    """One learned step for the activations (LSQ, LSQ+); all levels are used.

    Args:
        bits: 2 to 8.
        zero_point: "none": symmetric around 0; "unsigned": all levels on the positive side, for
            activations that are never negative (behind a ReLU); "learned": an offset is learned
            next to the step (LSQ+) and becomes an integer zero point.

    Raises:
        ValueError: bits is not an integer from 2 to 8, or zero_point is another word.

    Source: Esser et al. (2020); Bhalgat et al., "LSQ+", 2020.

    Example:
        >>> LearnedActivations(4, "unsigned").range, LearnedActivations(4, "unsigned").deployed()
        ((0, 15), Static(bits=4, symmetric=False, narrow_range=None))
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
        """The activations of the converted layer: signed integers, with all levels."""
        symmetric = self.zero_point == "none"
        narrow = False if symmetric and self.bits == 8 else None
        return Static(self.bits, symmetric, narrow)

    def __str__(self) -> str:
        return f"int{self.bits} learned"


@dataclass(frozen=True)
class TrainingConfig(Part):
    """How a layer is trained: parts for weights and activations, and what the verb does with them.

    Args:
        weights: :class:`torchquant.configs.Weights` (each channel's own range at each step) or
            :class:`LearnedWeights`.
        activations: :class:`torchquant.configs.Dynamic` (each token's own range),
            :class:`ObservedActivations` or :class:`LearnedActivations`.
        edge_bits: bits for weights and activations of the first and the last layer; None: as in all
            other layers. LSQ keeps these layers at 8. At 8 bits their weights take each channel's
            own range, also where ``weights`` are learned: LSQ's first step is six times as coarse.
        simulate: compute with the float values of the integers instead of the integer kernel, for
            comparison. Results then differ from the deployed ones by fp32 rounding.

    Raises:
        TypeError: a part is of another type, or simulate is not a bool.
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
        if not isinstance(self.activations, Activations) or self.activations.needs_calibration:
            raise TypeError(
                "TrainingConfig: activations must be Dynamic(), ObservedActivations() or "
                f"LearnedActivations(), got {self.activations!r}"
            )
        if self.edge_bits is not None:
            require_bits("TrainingConfig", "edge_bits", self.edge_bits)
        require_boolean("TrainingConfig", "simulate", self.simulate)

    @property
    def learned(self) -> bool:
        """Whether steps are parameters that an optimizer moves."""
        return isinstance(self.weights, LearnedWeights) or isinstance(
            self.activations, LearnedActivations
        )

    def deployed(self) -> QuantizationConfig:
        """The configuration of the layers that :func:`torchquant.convert_` makes."""
        return QuantizationConfig(self.weights.deployed(), self.activations.deployed())

    def inner(self) -> TrainingConfig:
        """The configuration of the layers between the first and the last one."""
        return replace(self, edge_bits=None)

    def edge(self) -> TrainingConfig:
        """The configuration of the first and the last layer."""
        if self.edge_bits is None:
            return self
        weights = self.weights.with_bits(self.edge_bits)
        # LSQ's first step, 2 mean|w| / sqrt(Qp), is six times a channel's own at 8 bits.
        if isinstance(weights, LearnedWeights) and self.edge_bits == MAX_BITS:
            weights = Weights(self.edge_bits)
        activations = self.activations.with_bits(self.edge_bits)
        return replace(self, weights=weights, activations=activations, edge_bits=None)


def QATConfig(
    weight_bits: int = 8,
    activation_bits: int = 8,
    activations: Literal["dynamic", "static"] = "dynamic",
    learned_weights: bool = False,
    learned_activations: bool = False,
    learned_offset: bool = False,
    weight_symmetric: bool = True,
    activation_symmetric: bool = False,
    activation_signed: bool = True,
    averaging_constant: float = 0.01,
    edge_bits: int | None = None,
    simulate: bool = False,
) -> TrainingConfig:
    """How a model is trained for quantization, in flags; :class:`TrainingConfig` has the parts.

    Weights have one scale per output channel: from the channel's own range at each step, or a
    learned step (LSQ, Esser et al., ICLR 2020). Activations are quantized per token with the range
    of the token, or (``activations="static"``) with one scale: a moving average of observed ranges,
    or a learned step.

    Args:
        weight_bits, activation_bits: 2 to 8.
        activations: "dynamic" (per token) or "static".
        learned_weights: learn the weights' steps.
        learned_activations: learn the activations' step. Static activations only: the scale of a
            token's own range is computed, there is nothing to learn.
        learned_offset: learn an offset next to the step (LSQ+, Bhalgat et al., 2020); it becomes an
            integer zero point.
        weight_symmetric: weights without zero point.
        activation_symmetric: observed or per-token activations without zero point. Next to a
            learned step there is a zero point where ``learned_offset`` is set or
            ``activation_signed`` is not.
        activation_signed: False for learned steps of activations that are never negative (behind
            a ReLU): all levels for the positive side.
        averaging_constant: weight of the newest batch in the moving average of observed ranges.
        edge_bits, simulate: see :class:`TrainingConfig`.

    Returns:
        The configuration in parts.

    Raises:
        TypeError: an option is of the wrong type.
        ValueError: an option is out of its range, or two options exclude each other.

    Example:
        >>> QATConfig(weight_bits=4, learned_weights=True).deployed().weights.range
        (-8, 7)
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
    if activations not in ("dynamic", "static"):
        raise ValueError(f'{who}: activations must be "dynamic" or "static", got {activations!r}')
    _check_constant(who, averaging_constant)
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
            "observed ranges find their zero point themselves"
        )
    part: Activations
    if activations == "dynamic":
        part = Dynamic(activation_bits, activation_symmetric)
    elif learned_activations:
        sign: Literal["none", "unsigned"] = "none" if activation_signed else "unsigned"
        part = LearnedActivations(activation_bits, "learned" if learned_offset else sign)
    else:
        part = ObservedActivations(activation_bits, activation_symmetric, averaging_constant)
    weights = (
        LearnedWeights(weight_bits) if learned_weights else Weights(weight_bits, weight_symmetric)
    )
    return TrainingConfig(weights, part, edge_bits, simulate)


def training_config(who: str, config: TrainingConfig | QuantizationConfig | None) -> TrainingConfig:
    """How to train for a configuration to deploy; a TrainingConfig itself; the default for None.

    Raises:
        TypeError: config is another value; ``who`` starts the message.
        ValueError: no training without learned steps ends in this configuration.

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
        activations = ObservedActivations(activations.bits, activations.symmetric)
    training = TrainingConfig(config.weights, activations)
    if training.activations.deployed().range != config.activations.range:
        raise ValueError(
            f"{who}: config must leave activation_narrow_range at None, got {config}; "
            "observed ranges give the default, and QATConfig(learned_activations=True) the other"
        )
    return training


def _check_constant(who: str, constant: object) -> None:
    if isinstance(constant, bool) or not isinstance(constant, (int, float)):
        raise TypeError(f"{who}: averaging_constant must be a number, got {constant!r}")
    if not 0 < constant <= 1:
        raise ValueError(f"{who}: averaging_constant must be in (0, 1], got {constant!r}")
