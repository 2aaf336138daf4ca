"""The layers that a walk compresses, and how the model that it runs gets their integers."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.algorithms.inputs import quantized_input
from torchquant.configs import QuantizationConfig
from torchquant.convert.adjustment import Adjustment, give_integers
from torchquant.convert.plan import Step
from torchquant.graph.held import Held
from torchquant.graph.modules import replace_module
from torchquant.nn.kinds import weight_shape

__all__ = ["CopiedPlace", "FloatPlace", "Place"]


class Place:
    """A layer that a walk compresses.

    Args:
        name: the layer's name in the model.
        layer: the float layer.
        config: the configuration of the quantized layer.
        module: the module that the model calls now.

    Example:
        >>> from torchquant import Weights
        >>> linear = nn.Linear(64, 32)
        >>> place = Place("fc", linear, QuantizationConfig(), linear)
        >>> place.kind, place.terms, place.weights == Weights()
        ('Linear', 64, True)
    """

    def __init__(
        self, name: str, layer: nn.Module, config: QuantizationConfig, module: nn.Module
    ) -> None:
        self.name, self.config = name, config
        self.layer: Any = layer
        self.module: Any = module

    @property
    def kind(self) -> str:
        """The name of the float layer's class."""
        return type(self.layer).__name__

    @property
    def weights(self) -> Any:
        """The weights of the configuration."""
        return self.config.weights

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, outputs first."""
        return weight_shape(self.layer)

    @property
    def terms(self) -> int:
        """K, the number of terms of an output."""
        return prod(self.shape[1:])

    def seen(self, input: Tensor) -> Tensor:
        """What the quantized layer reads of an input."""
        return input

    def install(self, found: Adjustment | None) -> None:
        """Let the model compute with the integers that were found; None for the nearest ones."""
        raise NotImplementedError

    def restore(self) -> None:
        """Let the model compute as before the walk."""


class FloatPlace(Place):
    """A layer of a float model, which the walk replaces by a quantized layer until its end.

    Args:
        step: the layer's step in the plan of the verb.

    Attributes:
        followers: layers with the same weight, which get the same integers.

    Example:
        >>> from torchquant.convert.plan import find_layers
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> (step,) = find_layers(model)
        >>> step.config = QuantizationConfig()
        >>> place = FloatPlace(step)
        >>> place.install(None)
        >>> before = type(model[0]).__name__
        >>> place.restore()
        >>> before, type(model[0]).__name__
        ('QuantizedLinear', 'Linear')
    """

    def __init__(self, step: Step) -> None:
        super().__init__(step.name, step.module, step.config, step.module)
        self._class = step.kind.layer_class(step.config, step.module)
        self._owners, self._held = step.owners, step.held
        self.followers: list[FloatPlace] = []

    def install(self, found: Adjustment | None) -> None:
        new = self._class.from_float(self.layer, self.config)
        if found is not None:
            give_integers(found, new)
        self._put(new)
        for follower in self.followers:
            follower.install(found)

    def restore(self) -> None:
        for follower in self.followers:
            follower.restore()
        if self.module is not self.layer:
            self._put(self.layer)

    def _put(self, new: nn.Module) -> None:
        old, self.module = self.module, new  # first, so that restore() undoes half of a change
        replace_module(self._owners, old, new)
        for held in self._held:
            Held(held.name, old, held.container, held.key).replace(new)


class CopiedPlace(Place):
    """A prepared layer, beside its quantized layer in a converted copy of the model.

    Args:
        name: the layer's name in the model.
        layer: the prepared layer.
        quantized: the layer in the copy; it has the nearest integers.

    Example:
        >>> import torchquant
        >>> linear = nn.Linear(64, 32)
        >>> CopiedPlace("fc", linear, torchquant.QuantizedLinear.from_float(linear)).shape
        (32, 64)
    """

    def __init__(self, name: str, layer: nn.Module, quantized: Any) -> None:
        super().__init__(name, layer, quantized.config, quantized)

    def seen(self, input: Tensor) -> Tensor:
        return quantized_input(self.module, input)

    @torch.no_grad()
    def install(self, found: Adjustment | None) -> None:
        if found is not None:
            give_integers(found, self.module)
