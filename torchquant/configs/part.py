"""Parts of configurations: frozen dataclasses that files can store as JSON."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from torchquant.scheme import MAX_BITS, MIN_BITS, PerAxis, PerGroup, PerTensor, PerToken

GRANULARITIES = (PerTensor, PerAxis, PerGroup, PerToken)
# The classes that files can store: granularities, and every subclass of Part.
_CLASSES: dict[str, type] = {cls.__name__: cls for cls in GRANULARITIES}


class Part:
    """Base class of frozen dataclasses that files can store.

    The values of a part are numbers, strings, None, and other parts. A subclass is registered under
    its name, so that :func:`config_from_dict` finds it.

    Raises:
        TypeError: a subclass is defined with the name of another part.

    Example:
        >>> from torchquant.configs import Weights
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


def config_to_dict(config: Any) -> dict[str, Any]:
    """Convert a configuration or a part to JSON values; the key ``type`` is the name of its class.

    A part that a configuration does not have is left out, so that earlier versions read the rest.

    Example:
        >>> from torchquant.configs import Dynamic
        >>> config_to_dict(Dynamic(symmetric=True))
        {'type': 'Dynamic', 'bits': 8, 'symmetric': True}
    """
    values = {entry.name: getattr(config, entry.name) for entry in fields(config)}
    for entry in fields(config):
        if entry.metadata.get("left_out") and values[entry.name] is None:
            del values[entry.name]
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
        >>> from torchquant.configs import QuantizationConfig
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


def require_boolean(who: str, name: str, value: object, or_none: str = "") -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{who}: {name} must be True or False{or_none}, got {value!r}")


def require_booleans(part: object, name: str, optional: bool = False) -> None:
    value = getattr(part, name)
    if not (optional and value is None):
        or_none = ", or None" if optional else ""
        require_boolean(type(part).__name__, name, value, or_none)


def require_bits(who: str, name: str, bits: object) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(
            f"{who}: {name} must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}"
        )
