"""What trained layers of all kinds share: quantizers, activations, the straight-through rule."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchquant import functional, ops
from torchquant.configs import Dynamic
from torchquant.nn.conv_geometry import is_channels_last
from torchquant.nn.intx_weight import group_size_of
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


class Given(NamedTuple):
    """The input of a layer, rounded if its activations are static.

    Args:
        values: the input; gradients reach it.
        scale, zero_point: the deployed ones of static activations; None for dynamic activations.
        exact: False if the values are between the integers, such as those of a dropout.
    """

    values: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    exact: bool = True


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


def rounded(quantizer: ObservedQuantizer | LSQQuantizer, value: Tensor) -> Tensor:
    """A value that is observed and rounded, in its memory format.

    Example:
        >>> rounded(ObservedQuantizer(), torch.tensor([0.0, 255.0, 7.2]))
        tensor([  0., 255.,   7.])
    """
    last = is_channels_last(value)  # quantizers return contiguous tensors
    pixels = value.permute(0, 2, 3, 1) if last else value
    values: Tensor = quantizer(pixels)
    return values.permute(0, 3, 1, 2) if last else values


def current_qparams(quantizer: ObservedQuantizer | LSQQuantizer) -> tuple[Tensor, Tensor]:
    """Scale and zero point with which :func:`rounded` has just rounded; no gradients.

    A learned offset that is NaN makes the scale NaN, because integers have no NaN.
    """
    if isinstance(quantizer, ObservedQuantizer):
        return quantizer.qparams()
    scale = quantizer.step.detach()
    offset = None if quantizer.offset is None else quantizer.offset.detach()
    zero_point = functional.learned_zero_point(scale, offset, quantizer.qmin, quantizer.qmax)
    if offset is not None:
        scale = torch.where(offset.isnan(), float("nan"), scale)
    return scale, zero_point


def observe(quantizer: ObservedQuantizer | LSQQuantizer | None, value: Tensor) -> None:
    """In training mode, update the range of static activations from a batch, without rounding."""
    if quantizer is None or not quantizer.training:
        return
    if isinstance(quantizer, LSQQuantizer):
        quantizer.prepare(value)
    elif quantizer.observing:
        quantizer.observe(value)


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
    config: TrainingConfig, outputs: int, inputs: int, device: torch.device
) -> LSQQuantizer | None:
    """The quantizer with the learned steps of a weight; None for scales from ranges.

    Args:
        config: how the layer is trained.
        outputs: the number of the layer's outputs, which are the weight's first dimension.
        inputs: the number of inputs of an output, of which groups are runs.
        device: the device of the state.
    """
    part = config.weights
    if not isinstance(part, LearnedWeights):
        return None
    size = group_size_of(part)
    return LSQQuantizer(
        part.bits,
        per_channel=True,
        num_channels=outputs,
        axis=0,
        group_size=size,
        num_groups=1 if size is None else -(-inputs // size),
        device=device,
    )


__all__ = ["activate"]
