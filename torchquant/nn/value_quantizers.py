"""Quantizers of values that are int8 in a region but that no layer reads, such as a summand.

In training, the layer from whose output such a value is computed holds its quantizer, so that the
state dict, the stages and the devices of the model reach it. The first batch shows which values
these are, so a state dict can have quantizers that a newly prepared model does not have yet: they
are made when it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torchquant.configs import Static
from torchquant.training.observed_quantizer import ObservedQuantizer
from torchquant.training.observers import MovingAverageMinMaxObserver

VALUE_QUANTIZERS = "value_quantizers"  # an nn.ModuleDict below the layer


def value_quantizer(layer: nn.Module, key: str) -> ObservedQuantizer | None:
    """The quantizer that a layer holds under a key, or None.

    Example:
        >>> value_quantizer(nn.Linear(4, 4), "0_1") is None
        True
    """
    held = layer._modules.get(VALUE_QUANTIZERS)
    found = None if held is None else held._modules.get(key)
    return found if isinstance(found, ObservedQuantizer) else None


def add_value_quantizer(
    layer: nn.Module, key: str, activations: Static, averaging_constant: float
) -> ObservedQuantizer:
    """Let a layer hold a quantizer for a value that is computed from its output.

    Its range is a moving average, as for the inputs of layers whose steps are not learned: the
    values have 8 bits, at which the initial step of LSQ is far too coarse.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> quantizer = add_value_quantizer(layer, "0_1", Static(), 0.01)
        >>> value_quantizer(layer, "0_1") is quantizer
        True
    """
    with torch.inference_mode(False):
        observer = MovingAverageMinMaxObserver(
            averaging_constant=averaging_constant,
            bits=activations.bits,
            symmetric=activations.symmetric,
        )
        quantizer = ObservedQuantizer(observer)
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        quantizer.to(device).train(layer.training)
        if VALUE_QUANTIZERS not in layer._modules:
            layer.add_module(VALUE_QUANTIZERS, nn.ModuleDict())
        held = layer._modules[VALUE_QUANTIZERS]
        assert held is not None
        held.add_module(key, quantizer)
    return quantizer


def keep_value_quantizers(layer: nn.Module, keys: set[str]) -> None:
    """Remove the quantizers that a layer holds under other keys.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> _ = add_value_quantizer(layer, "0_1", Static(), 0.01)
        >>> keep_value_quantizers(layer, set())
        >>> list(layer.children())
        []
    """
    held = layer._modules.get(VALUE_QUANTIZERS)
    if held is None:
        return
    for key in [*held._modules]:
        if key not in keys:
            del held._modules[key]
    if not held._modules:
        del layer._modules[VALUE_QUANTIZERS]


def follow_state(
    layer: nn.Module,
    state: Mapping[str, Any],
    prefix: str,
    activations: Any,
    averaging_constant: float,
) -> None:
    """Hold the quantizers of a state dict, and no others.

    A region makes those that are missing at its next batch.

    Args:
        layer: the layer that the state dict is loaded into.
        state: the state dict.
        prefix: the name of the layer in it, with a dot.
        activations: the deployed activations of the layer.
        averaging_constant: see :class:`torchquant.QATConfig`.
    """
    start = f"{prefix}{VALUE_QUANTIZERS}."
    keys = {name[len(start) :].partition(".")[0] for name in state if name.startswith(start)}
    if not any(name.startswith(prefix) for name in state):
        return  # the state dict has nothing of the layer
    keep_value_quantizers(layer, keys)
    if isinstance(activations, Static):
        for key in sorted(keys):
            if value_quantizer(layer, key) is None:
                part = Static(8, activations.symmetric)
                add_value_quantizer(layer, key, part, averaging_constant)


__all__ = ["value_quantizer"]
