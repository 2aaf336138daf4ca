"""Merge adapters into the integers of a quantized layer, and restore the integers.

The float weight of the layer plus the change is quantized again, with the configuration of the
layer. This is not exact: each weight moves by up to half a step, so a change that is smaller than
the steps can get lost. The first merge keeps the integers, and ``unmerge`` restores them exactly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.nn.base import QuantizedModule

Change = Callable[[nn.Module, str], None]

_KEPT = "_torchquant_unmerged"  # attribute of a module of peft: the state before the first merge
_OWN = ("input_scale", "input_zero_point")  # what a static layer cannot derive from a weight


def merge(wrapper: Any, names: list[str], change: Change) -> None:
    """Merge the adapters ``names`` of a module of peft into its quantized layer.

    Args:
        wrapper: a module of peft whose base layer is quantized.
        names: adapters that are not merged yet.
        change: adds one adapter to a float layer, in place.

    Raises:
        ValueError: the result is not finite; the layer is unchanged.
    """
    layer = wrapper.get_base_layer()
    state = _changed(layer, names, change)
    kept = {key: value.clone() for key, value in layer.state_dict().items()}
    warnings.warn(
        "Merging adapters into quantized layers rounds the weights to integers again, so results "
        "change by that rounding; to merge exactly, call torchquant.to_float_(model) first.",
        stacklevel=4,
    )
    if not wrapper.merged:
        wrapper.__dict__[_KEPT] = kept
    layer.load_state_dict(state)
    wrapper.merged_adapters.extend(names)


def unmerge(wrapper: Any, names: list[str], change: Change) -> None:
    """Undo :func:`merge`; ``change`` subtracts an adapter that was merged into a float layer."""
    layer = wrapper.get_base_layer()
    kept = wrapper.__dict__.get(_KEPT)
    layer.load_state_dict(_changed(layer, names, change) if kept is None else kept)
    forget(wrapper)
    wrapper.merged_adapters.clear()


def forget(wrapper: Any) -> None:
    """Drop the integers that :func:`merge` kept."""
    wrapper.__dict__.pop(_KEPT, None)


@torch.no_grad()
def _changed(layer: QuantizedModule, names: list[str], change: Change) -> dict[str, Tensor]:
    floating = _float32(layer)
    for parameter in floating.parameters():
        parameter.requires_grad_(False)
    for name in names:
        change(floating, name)
        if not all(bool(value.isfinite().all()) for value in floating.parameters()):
            raise ValueError(
                f"merge: the merged weights must be finite, adapter {name!r} makes some of them "
                "NaN or infinite; its training has diverged"
            )
    own = {name: getattr(layer, name, None) for name in _OWN}
    given = {name: value for name, value in own.items() if value is not None}
    changed = type(layer).from_float(floating, layer.config, **given).state_dict()
    dtypes = {key: value.dtype for key, value in layer.state_dict().items()}
    return {key: value.to(dtypes[key]) for key, value in changed.items()}


def _float32(layer: QuantizedModule) -> nn.Module:
    """The float layer in float32, also if the layer computes in bfloat16."""
    copy = type(layer).from_entry(layer.entry())
    adopt = getattr(copy, "adopt", None)  # the class from which the layer was made
    if adopt is not None:
        adopt(layer)
    copy.load_state_dict(layer.state_dict(), assign=True)
    return copy.float().to_float()
