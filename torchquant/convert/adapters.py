"""Layers that are being trained next to frozen ones: adapters such as LoRA's.

A verb leaves them in float unless it is asked for them in particular: quantizing one would end its
training without an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from torchquant.nn.base import QuantizedModule
from torchquant.nn.kinds import weight_shape

# Adapters are small. With more trained weights than this share, the model itself is being trained,
# with some of its layers frozen.
_MOST_TRAINED = 0.25
_REMEDY = "quantize it with a filter_fn that selects only such layers"


def adapter_reasons(model: nn.Module, layers: Iterable[nn.Module]) -> dict[int, str]:
    """The reasons to leave layers that are adapters, by id.

    peft's layers name their adapters in ``adapter_layer_names``. Any other layer is an adapter if
    its weight requires a gradient, and three quarters of all weights are frozen. A quantized layer
    counts as frozen if its bias is; without a bias it does not count, because its integers never
    require a gradient.

    Args:
        model: the model.
        layers: its layers of a kind.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
        >>> _ = model[0].requires_grad_(False)
        >>> adapter_reasons(model, model)[id(model[1])].partition(";")[0]
        'is being trained (requires_grad) while the other layers are frozen'
    """
    reasons: dict[int, str] = {}
    trained, total = {}, 0
    for layer in layers:
        if isinstance(layer, QuantizedModule) and (_trains(layer) or not _has_values(layer)):
            continue
        elements = _elements(layer)
        total += elements
        if _weight_trains(layer):
            trained[id(layer)] = elements
    if sum(trained.values()) <= _MOST_TRAINED * total:
        text = f"is being trained (requires_grad) while the other layers are frozen; {_REMEDY}"
        reasons = dict.fromkeys(trained, text)
    for module in model.modules():
        for adapter in _adapters(module):
            what = "an adapter that is being trained" if _trains(adapter) else "an adapter"
            reasons[id(adapter)] = f"{what}; merge it into its layer, or {_REMEDY}"
    return reasons


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _has_values(layer: nn.Module) -> bool:
    """True if the layer has a parameter with elements, and not just one that holds its dtype."""
    return any(parameter.numel() for parameter in layer.parameters())


def _weight_trains(layer: nn.Module) -> bool:
    """True if a weight requires a gradient; a bias alone says nothing about its layer."""
    return any(p.requires_grad and not is_lazy(p) and p.dim() > 1 for p in layer.parameters())


def _elements(layer: nn.Module) -> int:
    rows, *rest = weight_shape(layer)
    return reduce(lambda product, size: product * size, rest, rows)


def _adapters(module: nn.Module) -> Iterator[nn.Module]:
    """The modules inside the adapters of one of peft's layers."""
    names: Any = getattr(module, "adapter_layer_names", None)
    if not isinstance(names, (tuple, list)):
        return
    for name in names:
        part: Any = module
        for attribute in str(name).split("."):
            part = part._modules.get(attribute) if isinstance(part, nn.Module) else None
        if isinstance(part, nn.Module):
            yield from part.modules()


__all__ = ["adapter_reasons"]
