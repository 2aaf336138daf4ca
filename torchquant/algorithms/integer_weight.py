"""A weight as integers, scales and zero points: what algorithms that choose integers return."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchquant import functional
from torchquant.configs import Weights
from torchquant.nn.intx_weight import group_size_of, integers_of, values_of
from torchquant.scheme import PER_CHANNEL, PerAxis, PerGroup, PerTensor

__all__ = ["IntegerWeight", "check_weights", "nearest", "rounded"]


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """The integers of a weight, with the scales and zero points of its channels or groups.

    Attributes:
        qweight: int8 ``[N, K]``.
        scale: float32 ``[N]``, or ``[N, groups]`` with groups.
        zero_point: int8 of the shape of ``scale``; None for symmetric weights.
        group_size: the number of adjacent inputs that share a scale, where the last group may be
            shorter; None for one scale per output.

    Example:
        >>> weight = IntegerWeight(torch.tensor([[7, -3]], dtype=torch.int8), torch.tensor([0.5]))
        >>> weight.dequantize()
        tensor([[ 3.5000, -1.5000]])
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    group_size: int | None = None

    @property
    def granularity(self) -> PerAxis | PerGroup:
        """The elements that share a scale; a weight with one scale for all repeats it."""
        return PER_CHANNEL if self.group_size is None else PerGroup(self.group_size)

    def dequantize(self) -> Tensor:
        """The float32 weight ``[N, K]`` that the integers represent."""
        part = Weights(granularity=self.granularity)
        return values_of(self.qweight, self.scale, self.zero_point, part)


def check_weights(who: str, weight: Tensor, weights: Weights) -> None:
    """Raise unless an algorithm can choose the integers of a weight.

    Args:
        who: the function, with which messages start.
        weight: float ``[N, K]``.
        weights: per tensor, per output channel or in groups.

    Raises:
        TypeError: weight is not a float tensor, or weights is not a :class:`torchquant.Weights`.
        ValueError: weight does not have two dimensions, holds no element, or weights have another
            granularity.

    Example:
        >>> check_weights("gptq", torch.zeros(2, 3), Weights())
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{who}: weight must be a float tensor, got {got}")
    if not isinstance(weights, Weights):
        raise TypeError(
            f"{who}: weights must be torchquant.Weights(...), got {weights!r}; a configuration has "
            "it as config.weights"
        )
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(
            f"{who}: weight must have shape [outputs, inputs] and elements, got "
            f"{list(weight.shape)}; flatten the kernels of a convolution"
        )
    granularity = weights.granularity
    if granularity not in (PER_CHANNEL, PerTensor()) and not isinstance(granularity, PerGroup):
        raise ValueError(
            f"{who}: weights must have PerTensor(), PerAxis(0) or PerGroup(group_size), got "
            f"{granularity}"
        )


@torch.no_grad()
def nearest(weight: Tensor, weights: Weights) -> IntegerWeight:
    """Round a weight to the nearest integers, with the bits of :func:`torchquant.quantize_`.

    Scales and zero points follow from the range of each channel or group.

    Args:
        weight: float32, bfloat16 or float16 ``[N, K]``.
        weights: per tensor, per output channel or in groups.

    Returns:
        The integers. With one scale for the whole tensor, ``scale`` repeats it for each output.

    Raises:
        TypeError, ValueError: see :func:`check_weights`.

    Example:
        >>> found = nearest(torch.tensor([[7.0, -3.4, 1.0, 0.6]]), Weights(4))
        >>> found.qweight, found.scale
        (tensor([[ 7, -3,  1,  1]], dtype=torch.int8), tensor([1.]))
    """
    check_weights("nearest", weight, weights)
    if weights.granularity != PerTensor():
        return IntegerWeight(*integers_of(weight, weights), group_size_of(weights))
    qmin, qmax = weights.range
    least, greatest = (end.float().reshape(1) for end in torch.aminmax(weight.detach()))
    scale, zero_point = functional.qparams_from_range(
        least, greatest, qmin=qmin, qmax=qmax, symmetric=weights.symmetric
    )
    zeros = None if weights.symmetric else zero_point.to(torch.int8)
    outputs = weight.shape[0]
    return rounded(
        weight,
        weights,
        scale.expand(outputs).contiguous(),
        None if zeros is None else zeros.expand(outputs).contiguous(),
    )


@torch.no_grad()
def rounded(
    weight: Tensor, weights: Weights, scale: Tensor, zero_point: Tensor | None = None
) -> IntegerWeight:
    """Round a weight to the nearest integers on given scales and zero points.

    Args:
        weight: float32, bfloat16 or float16 ``[N, K]``.
        weights: bits, symmetry and granularity.
        scale: float32 ``[N]``, or ``[N, groups]`` with groups.
        zero_point: int8 of the shape of ``scale``; None for symmetric weights.

    Example:
        >>> rounded(torch.tensor([[7.0, -3.4]]), Weights(4), torch.tensor([2.0])).qweight
        tensor([[ 4, -2]], dtype=torch.int8)
    """
    part = weights
    if weights.granularity == PerTensor():
        part = replace(weights, granularity=PER_CHANNEL)
    integers = integers_of(weight, part, scale, zero_point)
    return IntegerWeight(*integers, group_size_of(weights))
