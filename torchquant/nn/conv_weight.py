"""The integers of a convolution's weight: symmetric, per output channel or per tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant import functional, ops
from torchquant.configs import QuantizationConfig
from torchquant.scheme import PerAxis, PerTensor


def weight_refusal(config: QuantizationConfig) -> str | None:
    """The reason why no convolution can have the weights of a configuration, or None.

    Example:
        >>> from torchquant.configs import Weights
        >>> weight_refusal(QuantizationConfig(Weights(symmetric=False)))
        'convolutions need symmetric weights'
    """
    weights = config.weights
    if weights.granularity not in (PerAxis(0), PerTensor()):
        return (
            f"convolutions need weights with PerAxis(0) or PerTensor(), not {weights.granularity}"
        )
    return None if weights.symmetric else "convolutions need symmetric weights"


@torch.no_grad()
def quantize_weight(
    weight: Tensor, part: Any, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The integers of a weight, and the scale of each output channel.

    Args:
        weight: float ``[O, C / groups, ...]``.
        part: the weights of a configuration, deployed or in training.
        scale: float32 ``[O]``; None derives the scales from the range of each channel, or of the
            whole weight if ``part`` is per tensor.

    Returns:
        int8 of the weight's shape, and float32 ``[O]``.

    Example:
        >>> from torchquant.configs import Weights
        >>> quantize_weight(torch.tensor([[[-1.27, 0.5]]]), Weights())
        (tensor([[[-127,   50]]], dtype=torch.int8), tensor([0.0100]))
    """
    qmin, qmax = part.range
    rows = weight.detach().reshape(weight.shape[0], -1)
    if scale is None and getattr(part, "granularity", None) == PerTensor():
        least, greatest = torch.aminmax(rows)
        scale, _ = functional.qparams_from_range(
            least.float().reshape(1),
            greatest.float().reshape(1),
            qmin=qmin,
            qmax=qmax,
            symmetric=True,
        )
    packed, scales, _ = ops.quantize_pack(rows, scale, qmin=qmin, qmax=qmax, symmetric=True)
    return ops.unpack_weight(packed, *rows.shape).reshape(weight.shape), scales


__all__ = ["quantize_weight", "weight_refusal"]
