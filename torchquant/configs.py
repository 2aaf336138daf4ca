"""What to quantize how: frozen dataclasses, so that a wrong combination cannot be written.

Class names follow torchao; the fields are torchquant's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from torchquant.scheme import MAX_BITS, MIN_BITS, quant_range


@dataclass(frozen=True)
class Int8DynamicActivationInt8WeightConfig:
    """int8 weights, one scale per output channel; int8 activations, one scale per token.

    The default choice for Linear layers: activation scales are found at run time, so there is no
    calibration data, and each token's range is its own, so a token gives the same bits alone and in
    any batch.

    Args:
        activation_symmetric: activations in [-127, 127]; False: [-128, 127] with a zero point per
            token, finer wherever values lean to one side (after GELU or ReLU, say, but inside
            transformers in general) and some 5 % slower, hence the default.
        symmetric: weights in [-127, 127]; False: [-128, 127] with a zero point per channel.

    Example:
        >>> Int8DynamicActivationInt8WeightConfig(activation_symmetric=True)
        Int8DynamicActivationInt8WeightConfig(activation_symmetric=True, symmetric=True)
    """

    activation_symmetric: bool = False
    symmetric: bool = True

    def __post_init__(self) -> None:
        _require_booleans(self)

    @property
    def static(self) -> bool:
        """Whether activations have one scale for good; here each token's is found at run time."""
        return False

    @property
    def weight_bits(self) -> int:
        """Bits of a weight: 8."""
        return 8

    @property
    def activation_bits(self) -> int:
        """Bits of an activation: 8."""
        return 8

    @property
    def weight_range(self) -> tuple[int, int]:
        """Least and greatest integer of a weight."""
        return quant_range(8, narrow_range=self.symmetric)

    @property
    def activation_range(self) -> tuple[int, int]:
        """Least and greatest integer of an activation."""
        return quant_range(8, narrow_range=self.activation_symmetric)


@dataclass(frozen=True)
class Int8StaticActivationInt8WeightConfig:
    """int8 weights, one scale per output channel; int8 activations, one scale for the tensor.

    The scale of the activations has to be learned or observed before:
    :func:`torchquant.prepare_qat_` and :func:`torchquant.convert_`. No range is searched for at run
    time, and values beyond the range saturate.

    Args:
        activation_symmetric: activations without zero point.
        symmetric: weights in [-127, 127]; False: [-128, 127] with a zero point per channel.
        activation_narrow_range: whether activations leave out -128; None: where they are symmetric,
            which is what observed ranges give. Learned steps use all 256 levels.

    Example:
        >>> Int8StaticActivationInt8WeightConfig().activation_range
        (-128, 127)
    """

    activation_symmetric: bool = False
    symmetric: bool = True
    activation_narrow_range: bool | None = None

    def __post_init__(self) -> None:
        _require_booleans(self, optional=("activation_narrow_range",))

    @property
    def static(self) -> bool:
        """Whether activations have one scale for good: they have."""
        return True

    @property
    def weight_bits(self) -> int:
        """Bits of a weight: 8."""
        return 8

    @property
    def activation_bits(self) -> int:
        """Bits of an activation: 8."""
        return 8

    @property
    def weight_range(self) -> tuple[int, int]:
        """Least and greatest integer of a weight."""
        return quant_range(8, narrow_range=self.symmetric)

    @property
    def activation_range(self) -> tuple[int, int]:
        """Least and greatest integer of an activation."""
        return _activation_range(8, self.activation_symmetric, self.activation_narrow_range)


@dataclass(frozen=True)
class IntxActivationIntxWeightConfig:
    """Weights and activations of 2 to 8 bits each, on the int8 kernels.

    Integers of fewer bits are stored and multiplied as int8: the same bits as a narrower kernel
    would give, no faster than 8 bits.

    Args:
        weight_bits: 2 to 8; one scale per output channel.
        activation_bits: 2 to 8.
        static: one scale for the activations, learned or observed before; False: one per token,
            found at run time.
        activation_symmetric: activations without zero point.
        symmetric: weights without zero point.
        activation_narrow_range: static activations only: whether they leave out the least integer;
            None: where they have 8 bits and are symmetric.

    Example:
        >>> config = IntxActivationIntxWeightConfig(weight_bits=4)
        >>> config.weight_range, config.activation_range
        ((-8, 7), (-128, 127))
    """

    weight_bits: int = 4
    activation_bits: int = 8
    static: bool = False
    activation_symmetric: bool = False
    symmetric: bool = True
    activation_narrow_range: bool | None = None

    def __post_init__(self) -> None:
        _require_bits(self, "weight_bits", "activation_bits")
        _require_booleans(
            self, but=("weight_bits", "activation_bits"), optional=("activation_narrow_range",)
        )
        if self.activation_narrow_range is not None and not self.static:
            raise ValueError(
                "IntxActivationIntxWeightConfig: activation_narrow_range must be None unless "
                f"static=True, got {self.activation_narrow_range}; the range of a token has all "
                "levels that its zero point can use"
            )

    @property
    def weight_range(self) -> tuple[int, int]:
        """Least and greatest integer of a weight."""
        return quant_range(self.weight_bits, narrow_range=self.symmetric and self.weight_bits == 8)

    @property
    def activation_range(self) -> tuple[int, int]:
        """Least and greatest integer of an activation."""
        return _activation_range(
            self.activation_bits, self.activation_symmetric, self.activation_narrow_range
        )


Config: TypeAlias = (
    Int8DynamicActivationInt8WeightConfig
    | Int8StaticActivationInt8WeightConfig
    | IntxActivationIntxWeightConfig
)


@dataclass(frozen=True)
class QATConfig:
    """How a model is trained for quantization: widths, and where ranges come from.

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
        learned_offset: learn an offset beside the step (LSQ+, Bhalgat et al., 2020); it becomes an
            integer zero point.
        symmetric: weights without zero point.
        activation_symmetric: observed or per-token activations without zero point. Beside a learned
            step there is one where ``learned_offset`` is set or ``activation_signed`` is not.
        activation_signed: False for learned steps of activations that are never negative (behind
            a ReLU): all levels for the positive side.
        averaging_constant: weight of the newest batch in the moving average of observed ranges.
        edge_bits: bits for weights and activations of the first and the last layer; None: as
            everywhere. LSQ keeps them at 8. At 8 bits their weights take each channel's own range,
            also with ``learned_weights``: LSQ's first step is six times as coarse.
        simulate: compute with float values of the integers instead of the integer kernel: for
            comparison. Results then differ from the deployed ones by fp32 rounding.

    Raises:
        TypeError, ValueError: a value of another kind, or a combination without a meaning.

    Example:
        >>> QATConfig(weight_bits=4, learned_weights=True).deployed()
        IntxActivationIntxWeightConfig(weight_bits=4, activation_bits=8, static=False, \
activation_symmetric=False, symmetric=True, activation_narrow_range=None)
    """

    weight_bits: int = 8
    activation_bits: int = 8
    activations: Literal["dynamic", "static"] = "dynamic"
    learned_weights: bool = False
    learned_activations: bool = False
    learned_offset: bool = False
    symmetric: bool = True
    activation_symmetric: bool = False
    activation_signed: bool = True
    averaging_constant: float = 0.01
    edge_bits: int | None = None
    simulate: bool = False

    def __post_init__(self) -> None:
        _require_bits(self, "weight_bits", "activation_bits")
        if self.edge_bits is not None:
            _require_bits(self, "edge_bits")
        others = (
            "weight_bits",
            "activation_bits",
            "edge_bits",
            "activations",
            "averaging_constant",
        )
        _require_booleans(self, but=others)
        if self.activations not in ("dynamic", "static"):
            raise ValueError(
                f'QATConfig: activations must be "dynamic" or "static", got {self.activations!r}'
            )
        constant = self.averaging_constant
        if isinstance(constant, bool) or not isinstance(constant, (int, float)):
            raise TypeError(f"QATConfig: averaging_constant must be a number, got {constant!r}")
        if not 0 < constant <= 1:
            raise ValueError(f"QATConfig: averaging_constant must be in (0, 1], got {constant!r}")
        if self.learned_activations and not self.static:
            raise ValueError(
                'QATConfig: learned_activations needs activations="static", got "dynamic": a '
                "dynamic scale is computed from each token's own range at run time, so there is no "
                'step to learn; pass activations="static", or learn the weights\' steps only'
            )
        if self.learned_offset and not (self.learned_activations and self.activation_signed):
            raise ValueError(
                "QATConfig: learned_offset needs learned_activations=True and "
                f"activation_signed=True, got {self.learned_activations} and "
                f"{self.activation_signed}; it is the offset beside an activation's learned step"
            )
        if self.learned_weights and not self.symmetric:
            raise ValueError(
                "QATConfig: symmetric must be True with learned_weights=True, got False; LSQ's "
                "weights have no zero point"
            )
        if not self.activation_signed and not self.learned_activations:
            raise ValueError(
                "QATConfig: activation_signed must be True unless learned_activations is, got "
                "False; observed ranges find their zero point themselves"
            )

    @property
    def static(self) -> bool:
        """Whether activations have one scale."""
        return self.activations == "static"

    @property
    def weight_range(self) -> tuple[int, int]:
        """Least and greatest integer of a weight; learned steps use all levels."""
        narrow = self.symmetric and self.weight_bits == 8 and not self.learned_weights
        return quant_range(self.weight_bits, narrow_range=narrow)

    @property
    def activation_range(self) -> tuple[int, int]:
        """Least and greatest integer of an activation; learned steps use all levels."""
        return self.deployed().activation_range

    def deployed(self) -> Config:
        """The configuration of the layers that :func:`torchquant.convert_` makes."""
        symmetric = self.activation_symmetric
        narrow = None
        if self.learned_activations:
            symmetric = self.activation_signed and not self.learned_offset
            narrow = False if symmetric and self.activation_bits == 8 else None
        if (self.weight_bits, self.activation_bits) != (8, 8):
            return IntxActivationIntxWeightConfig(
                self.weight_bits,
                self.activation_bits,
                self.static,
                symmetric,
                self.symmetric,
                narrow,
            )
        if self.static:
            return Int8StaticActivationInt8WeightConfig(symmetric, self.symmetric, narrow)
        return Int8DynamicActivationInt8WeightConfig(symmetric, self.symmetric)


@dataclass(frozen=True)
class Fusion:
    """What :func:`torchquant.quantize_` may compute together with the layers that it quantizes.

    On by default is only what leaves a model's results as they are, but for rounding.

    Args:
        activations: an activation module behind a layer becomes part of it: computed on the sums
            while they are in registers. Results change by rounding: the library's own polynomials
            instead of torch's (errors in :mod:`torchquant.functional.activations`), and in a
            bfloat16 or float16 model one rounding less, for between the two values stay fp32.
        projections: layers applied to one tensor (query, key and value; gate and up) are computed
            together, which quantizes it once. Results stay the same bits. In effect where gradients
            are off (``torch.no_grad``, ``torch.inference_mode``) and autocast is.

    Example:
        >>> Fusion(activations=False)
        Fusion(activations=False, projections=True)
    """

    activations: bool = True
    projections: bool = True

    def __post_init__(self) -> None:
        _require_booleans(self)


def _require_booleans(
    config: object, but: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> None:
    for field in fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if field.name in but or isinstance(value, bool):
            continue
        if field.name in optional and value is None:
            continue
        or_none = ", or None" if field.name in optional else ""
        raise TypeError(
            f"{type(config).__name__}: {field.name} must be True or False{or_none}, got {value!r}"
        )


def _require_bits(config: object, *names: str) -> None:
    for name in names:
        bits = getattr(config, name)
        if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
            raise ValueError(
                f"{type(config).__name__}: {name} must be an integer from {MIN_BITS} to "
                f"{MAX_BITS}, got {bits!r}"
            )


def _activation_range(bits: int, symmetric: bool, narrow: bool | None) -> tuple[int, int]:
    return quant_range(bits, narrow_range=symmetric and bits == 8 if narrow is None else narrow)


_BY_NAME = {cls.__name__: cls for cls in get_args(Config)}


def check_config(who: str, config: Config | None) -> Config:
    """The configuration itself, the default one for None.

    Raises:
        TypeError: anything else; ``who`` starts the message.

    Example:
        >>> check_config("quantize_", None)
        Int8DynamicActivationInt8WeightConfig(activation_symmetric=False, symmetric=True)
    """
    if config is None:
        return Int8DynamicActivationInt8WeightConfig()
    if not isinstance(config, Config):
        raise TypeError(
            f"{who}: config must be a torchquant configuration such as "
            f"Int8DynamicActivationInt8WeightConfig(), got {config!r}"
        )
    return config


def check_fusion(who: str, fusion: Fusion | None) -> Fusion:
    """The value itself, the default one for None.

    Raises:
        TypeError: anything else; ``who`` starts the message.

    Example:
        >>> check_fusion("quantize_", None) == Fusion()
        True
    """
    if fusion is None:
        return Fusion()
    if not isinstance(fusion, Fusion):
        raise TypeError(f"{who}: fusion must be a torchquant.Fusion(), got {fusion!r}")
    return fusion


def config_to_dict(config: Config) -> dict[str, Any]:
    """A configuration as JSON-ready values; the key ``type`` names its class.

    Example:
        >>> config_to_dict(Int8DynamicActivationInt8WeightConfig())["symmetric"]
        True
    """
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {"type": type(config).__name__, **values}


def config_from_dict(values: dict[str, Any]) -> Config:
    """The configuration that :func:`config_to_dict` wrote.

    Raises:
        ValueError: no class of that name, or fields that it does not have.

    Example:
        >>> config_from_dict(config_to_dict(Int8DynamicActivationInt8WeightConfig()))
        Int8DynamicActivationInt8WeightConfig(activation_symmetric=False, symmetric=True)
    """
    values = dict(values)
    name = values.pop("type", None)
    if name not in _BY_NAME:
        raise ValueError(
            f"configuration type must be one of {', '.join(_BY_NAME)}, got {name!r}; the file may "
            "be from a newer torchquant"
        )
    try:
        return _BY_NAME[name](**values)  # type: ignore[no-any-return]
    except TypeError as error:
        raise ValueError(f"configuration {name} does not fit this torchquant: {error}") from None


__all__ = [
    "Config",
    "Fusion",
    "Int8DynamicActivationInt8WeightConfig",
    "Int8StaticActivationInt8WeightConfig",
    "IntxActivationIntxWeightConfig",
    "QATConfig",
    "check_config",
    "check_fusion",
    "config_from_dict",
    "config_to_dict",
]
