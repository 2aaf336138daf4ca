"""The entry of a layer in a file, in the current format and in older formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchquant.configs import (
    Dynamic,
    QuantizationConfig,
    Static,
    Weights,
    config_to_dict,
)
from torchquant.nn.base import QuantizedModule
from torchquant.nn.kinds import kind_of


def layer_entry(layer: QuantizedModule) -> dict[str, Any]:
    """The JSON values that a file stores for a layer in addition to its tensors.

    Raises:
        ValueError: the layer belongs to no kind.
    """
    kind = kind_of(layer)
    if kind is None:
        raise ValueError(
            f"save: each quantized layer must belong to a kind, got {type(layer).__name__}; "
            "register its kind with torchquant.nn.register"
        )
    return {"kind": kind.name, **layer.entry()}


def current_entry(entry: Any, format: int) -> dict[str, Any]:
    """Convert an entry of a file of the given format to the current format.

    Raises:
        KeyError, TypeError, ValueError: the entry is not valid: a value is missing, has the wrong
            type, or is not one of the permitted values.
    """
    if format >= 3:
        return dict(entry)
    # Formats 1 and 2 store only linear layers with int8 weights, and three configuration classes.
    entry = dict(entry)
    old = _old_config(entry.pop("config"))
    return {"kind": "linear", **entry, "config": config_to_dict(old), "format": "int8"}


def _old_config(values: Mapping[str, Any]) -> QuantizationConfig:
    values = dict(values)
    name = values.pop("type", None)
    if name not in _OLD_CONFIGS:
        raise ValueError(
            f"configuration type must be one of {', '.join(_OLD_CONFIGS)}, got {name!r}; the file "
            "may be from a newer torchquant"
        )
    allowed, static = _OLD_CONFIGS[name]
    unknown = sorted(values.keys() - allowed)
    if unknown:
        raise ValueError(
            f"configuration {name} does not fit this torchquant: unknown {', '.join(unknown)}"
        )
    weights = Weights(values.get("weight_bits", _OLD_BITS[name]), values.get("symmetric", True))
    bits, symmetric = values.get("activation_bits", 8), values.get("activation_symmetric", False)
    if values.get("static", static):
        narrow = values.get("activation_narrow_range")
        return QuantizationConfig(weights, Static(bits, symmetric, narrow))
    return QuantizationConfig(weights, Dynamic(bits, symmetric))


_FLAGS = frozenset(("activation_symmetric", "symmetric"))
_WIDTHS = frozenset(("weight_bits", "activation_bits", "static", "activation_narrow_range"))
# Name -> the fields of the class, and the default of its field `static`.
_OLD_CONFIGS: dict[str, tuple[frozenset[str], bool]] = {
    "Int8DynamicActivationInt8WeightConfig": (_FLAGS, False),
    "Int8StaticActivationInt8WeightConfig": (_FLAGS | {"activation_narrow_range"}, True),
    "IntxActivationIntxWeightConfig": (_FLAGS | _WIDTHS, False),
}
_OLD_BITS = {name: 4 if name.startswith("Intx") else 8 for name in _OLD_CONFIGS}
