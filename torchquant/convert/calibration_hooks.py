"""Prepared layers: float layers whose inputs an observer sees while the model is calibrated.

A prepared layer stays the same object. Its observer is in a forward pre-hook, which is copied and
pickled with the layer, and which is no part of a state dict. The layers of a model that are
prepared are those that have such a hook.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchquant.configs import QuantizationConfig
from torchquant.convert.adjustment import Adjustment, adjust
from torchquant.report import RegionReport
from torchquant.training.calibration import observer_for
from torchquant.training.observers import Observer


class InputObserver:
    """A forward pre-hook that shows the input of a layer to an observer.

    Args:
        config: what the layer is prepared for.
        observer: sees the inputs while ``observing`` is True.

    Attributes:
        observing: False except during :func:`torchquant.calibrate`.
        refused: the modules around the layer that are no region, and why.
    """

    refused: tuple[RegionReport, ...] = ()

    def __init__(self, config: QuantizationConfig, observer: Observer) -> None:
        self.config = config
        self.observer = observer
        self.observing = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.observing:
            values = args or tuple(kwargs.values())
            self.see(values[0])

    def see(self, input: Any) -> None:
        """Show a tensor to the observer, which follows it to its device."""
        if not isinstance(input, Tensor):
            return  # the layer itself raises
        if input.is_nested:
            input = input.values()
        if self.observer.num_batches.device != input.device:
            self.observer.to(input.device)
        self.observer(input)

    def missing_range(self) -> str | None:
        """Why there is no range yet, or None."""
        return missing_range(self.observer)

    def __repr__(self) -> str:
        return f"InputObserver({self.observer})"


def missing_range(observer: Observer) -> str | None:
    """Why an observer has no range, in the words of an error, or None if it has one.

    Example:
        >>> from torchquant.observers import MinMaxObserver
        >>> missing_range(MinMaxObserver())
        'MinMaxObserver: no batch reached it; call calibrate(model, loader) first'
    """
    batches, bad = int(observer.num_batches), int(observer.nonfinite)
    least, greatest = observer.min_val, observer.max_val
    if batches and bool(((least <= greatest) & ((least != 0) | (greatest != 0))).any()):
        return None
    if not batches:
        reason = "no batch reached it; call calibrate(model, loader) first"
    elif bool((least <= greatest).any()):
        reason = "it saw only zeros; calibrate with batches like those of the application"
    elif bad:
        reason = "it saw no finite values, only NaN and infinities; check the inputs of the model"
    else:
        reason = "it saw only empty tensors; calibrate with batches that have samples"
    return f"{observer.title()}: {reason}"


def observe_input(layer: nn.Module, name: str, config: QuantizationConfig) -> InputObserver:
    """Prepare a layer: add the hook that observes its input.

    Args:
        layer: a float layer.
        name: its name in the model, for messages.
        config: what it is prepared for; its activations name the observer.
    """
    devices = [parameter.device for parameter in layer.parameters() if not parameter.is_meta]
    with torch.inference_mode(False):  # batches may come outside of inference mode
        observer = observer_for(config.activations, devices[0] if devices else "cpu")
    observer.set_layer_name(name)
    hook = InputObserver(config, observer)
    layer.register_forward_pre_hook(hook, with_kwargs=True)
    return hook


def hook_of(layer: nn.Module) -> InputObserver | None:
    """The hook of a prepared layer, or None.

    Example:
        >>> hook_of(nn.Linear(4, 4)) is None
        True
    """
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, InputObserver):
            return hook
    return None


def prepared_layers(model: nn.Module) -> dict[str, InputObserver]:
    """The hooks of a model's prepared layers, by the layer's first name."""
    found = ((name, hook_of(module)) for name, module in model.named_modules())
    return {name: hook for name, hook in found if hook is not None}


def release(layer: nn.Module) -> None:
    """Remove the hook of a prepared layer, and what an algorithm found; other hooks stay."""
    adjust(layer, Adjustment())
    for key, hook in list(layer._forward_pre_hooks.items()):
        if isinstance(hook, InputObserver):
            del layer._forward_pre_hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)
