"""A layer's entry in a file, in today's form and in the forms of older files."""

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
    """What a file holds of a layer next to its tensors.

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
    """An entry of a file of ``format`` in today's form.

    Raises:
        KeyError, TypeError, ValueError: the entry is not valid.
    """
    if format >= 3:
        return dict(entry)
    # Formats 1 and 2 hold linear layers of int8 weights, and configurations of three classes.
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
# Name -> its fields, and whether it is static where no field decides.
_OLD_CONFIGS: dict[str, tuple[frozenset[str], bool]] = {
    "Int8DynamicActivationInt8WeightConfig": (_FLAGS, False),
    "Int8StaticActivationInt8WeightConfig": (_FLAGS | {"activation_narrow_range"}, True),
    "IntxActivationIntxWeightConfig": (_FLAGS | _WIDTHS, False),
}
_OLD_BITS = {name: 4 if name.startswith("Intx") else 8 for name in _OLD_CONFIGS}
