"""What trained layers of all kinds share: quantizers, activations, the straight-through rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant import ops
from torchquant.configs import Dynamic
from torchquant.scheme import Granularity
from torchquant.training.configuration import (
    LearnedActivations,
    LearnedWeights,
    ObservedActivations,
    TrainingConfig,
)
from torchquant.training.learned_steps import LSQQuantizer
from torchquant.training.observed_quantizer import ObservedQuantizer
from torchquant.training.observers import MovingAverageMinMaxObserver

ACTIVATIONS = ("none", "relu")
ACTIVATION_PARTS = (Dynamic, ObservedActivations, LearnedActivations)


def activate(output: Tensor, activation: str) -> Tensor:
    """Apply one of the activation functions that a layer can apply in training.

    Example:
        >>> activate(torch.tensor([-1.0, 2.0]), "relu")
        tensor([0., 2.])
    """
    return torch.relu(output) if activation == "relu" else output


class StraightThrough(torch.autograd.Function):
    """Returns the second argument; the gradient goes to the first."""

    @staticmethod
    def forward(value: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def learned_values(
    quantizer: LSQQuantizer, input: Tensor, given: Tensor, granularity: Granularity
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A tensor that is rounded to learned steps, with the steps and offsets of this forward.

    Args:
        quantizer: the learned steps.
        input: what is rounded; gradients reach it and the steps.
        given: from what steps are initialised if necessary: input, or a parameter of its values.
        granularity: the elements that share a step.
    """
    step, offset = quantizer.prepare(given)
    values = ops.fake_quantize_learned(
        input,
        step,
        offset,
        qmin=quantizer.qmin,
        qmax=quantizer.qmax,
        grad_factor=quantizer.grad_factor(input),
        granularity=granularity,
    )
    return values, step.detach(), None if offset is None else offset.detach()


def input_quantizer(
    config: TrainingConfig, features: int, device: torch.device
) -> ObservedQuantizer | LSQQuantizer | None:
    """The quantizer of a layer's input; None for dynamic activations.

    Args:
        config: how the layer is trained.
        features: the number of features of the input.
        device: the device of the state.
    """
    part = config.activations
    if isinstance(part, LearnedActivations):
        return LSQQuantizer(
            part.bits,
            symmetric=part.zero_point != "learned",
            signed=part.zero_point != "unsigned",
            num_features=features,
            device=device,
        )
    if isinstance(part, ObservedActivations):
        observer = MovingAverageMinMaxObserver(
            averaging_constant=part.averaging_constant, bits=part.bits, symmetric=part.symmetric
        )
        return ObservedQuantizer(observer.to(device))
    return None


def weight_quantizer(
    config: TrainingConfig, outputs: int, device: torch.device
) -> LSQQuantizer | None:
    """The quantizer with the learned steps of a weight; None for scales from ranges.

    Args:
        config: how the layer is trained.
        outputs: the number of the layer's outputs, which are the weight's first dimension.
        device: the device of the state.
    """
    part = config.weights
    if not isinstance(part, LearnedWeights):
        return None
    return LSQQuantizer(part.bits, per_channel=True, num_channels=outputs, axis=0, device=device)


__all__ = ["activate"]
