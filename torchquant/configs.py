"""What to quantize how: frozen dataclasses, so that a wrong combination cannot be written.

Class names follow torchao; the fields are torchquant's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


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


def _require_booleans(config: Config | Fusion) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if not isinstance(value, bool):
            raise TypeError(
                f"{type(config).__name__}: {field.name} must be True or False, got {value!r}"
            )


Config = Int8DynamicActivationInt8WeightConfig  # a union, once there is a second one

_BY_NAME = {cls.__name__: cls for cls in (Int8DynamicActivationInt8WeightConfig,)}


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
        return _BY_NAME[name](**values)
    except TypeError as error:
        raise ValueError(f"configuration {name} does not fit this torchquant: {error}") from None


__all__ = [
    "Config",
    "Fusion",
    "Int8DynamicActivationInt8WeightConfig",
    "check_config",
    "check_fusion",
    "config_from_dict",
    "config_to_dict",
]
