"""The entry of a layer in a file, in the current format and in older formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from torchquant.configs import (
    Dynamic,
    QuantizationConfig,
    Static,
    Weights,
    config_to_dict,
)
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.kinds import kind_of
from torchquant.nn.state_names import rename_state


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

    The dtype of an entry of formats 1 to 3 is None: it is the dtype of the layer in the model.

    Raises:
        KeyError, TypeError, ValueError: the entry is not valid: a value is missing, has the wrong
            type, or is not one of the permitted values.
    """
    if format >= 4:
        return dict(entry)
    if format == 3:
        return {"dtype": None, **entry}
    # Formats 1 and 2 store only linear layers with int8 weights, and three configuration classes.
    entry = dict(entry)
    old = _old_config(entry.pop("config"))
    config = config_to_dict(old)
    return {"kind": "linear", "dtype": None, **entry, "config": config, "format": "int8"}


def current_names(state: dict[str, Any], model: nn.Module, format: int) -> dict[str, Any]:
    """Rename the tensors of a file of the given format as the layers of the model name them."""
    if format >= 4:
        return state
    state = dict(state)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (QuantizedModule, TrainedModule)):
            rename_state(state, f"{name}." if name else "", module.renamed)
    return state


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
