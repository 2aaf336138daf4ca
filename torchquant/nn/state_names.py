"""Names of a layer's state: those of older versions, and the placeholder of the float weight.

No parameter, buffer or submodule of a quantized or trained layer has a name that begins with
``weight``, apart from the float weight that is trained and the placeholder of a quantized layer.
Libraries select tensors by patterns such as ``decoder.weight``, which also match such names:
transformers' ``tie_weights()`` would overwrite scales. It needs exactly one match, however, and
raises an error if there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLACEHOLDER = "weight_placeholder"


def rename_state(state: dict[str, Any], prefix: str, renamed: Mapping[str, str]) -> None:
    """Rename entries of a state dict that an older version wrote; ``state`` changes in place.

    Args:
        state: the state dict of a model.
        prefix: the name of a layer in the model with a dot after it, or an empty string.
        renamed: old names of tensors and submodules of the layer, and their new names.

    Example:
        >>> state = {"fc.weight_scale": 1, "fc.bias": 2}
        >>> rename_state(state, "fc.", {"weight_scale": "qweight_scale"})
        >>> state
        {'fc.qweight_scale': 1, 'fc.bias': 2}
    """
    changes = {}
    for key in state:
        if key.startswith(prefix):
            name, dot, rest = key[len(prefix) :].partition(".")
            if name in renamed:
                changes[key] = f"{prefix}{renamed[name]}{dot}{rest}"
    if changes:
        entries = {changes.get(key, key): value for key, value in state.items()}
        state.clear()
        state.update(entries)


__all__ = ["rename_state"]
