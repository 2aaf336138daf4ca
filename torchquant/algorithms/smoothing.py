"""SmoothQuant's factors: how much of the range of a channel its weights take over."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchquant.configs import QuantizationConfig, Static
from torchquant.functional import choose_qparams, dequantize, fake_quantize, quantize_per_token
from torchquant.scheme import PerToken

__all__ = ["smoothing_error", "smoothing_factors"]

_LEAST = 1e-6  # of the mean square of all outputs; less in a row counts as this much
_TINY = 1e-30


def smoothing_factors(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """The factors by which channels are divided, and the weights that read them multiplied.

    Args:
        inputs: float ``[K]``, the greatest magnitude of each channel, or another measure of it.
        weights: float ``[K]``, the greatest magnitude of the weights that read it.
        alpha: from 0 to 1: how much of the difference between the channels the weights take over;
            with 1 all channels get the same range.

    Returns:
        float64 ``[K]``, ``inputs ** alpha / weights ** (1 - alpha)``, divided by the geometric mean
        of all channels; 1 for a channel without values or without weights.

    Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
    Language Models" (2022).

    Example:
        >>> smoothing_factors(torch.tensor([16.0, 1.0]), torch.tensor([1.0, 1.0]), 0.5)
        tensor([2.0000, 0.5000], dtype=torch.float64)
    """
    inputs, weights = inputs.double(), weights.double()
    usable = (inputs > 0) & (weights > 0) & inputs.isfinite() & weights.isfinite()
    if not bool(usable.any()):
        return torch.ones_like(inputs)
    logarithms = alpha * inputs.log() - (1 - alpha) * weights.log()
    logarithms = logarithms - logarithms[usable].mean()
    return torch.where(usable, logarithms, 0.0).exp()


def smoothing_error(
    rows: Tensor,
    weight: Tensor,
    factors: Tensor,
    config: QuantizationConfig,
    outputs: Tensor | None = None,
) -> float:
    """The error of a quantized linear layer whose inputs were divided by factors.

    Each row counts relative to its own outputs, because a few tokens have much larger values than
    all others.

    Args:
        rows: float ``[rows, K]``, inputs before the division.
        weight: float ``[N, K]``, the weight before the multiplication.
        factors: float ``[K]``.
        config: how weight and activations are quantized.
        outputs: ``rows @ weight.T``, if it is known.

    Returns:
        The mean over all rows of the squared error, relative to the square of the float outputs.

    Example:
        >>> rows, weight = torch.tensor([[100.0, 0.3]]), torch.tensor([[0.01, 1.0]])
        >>> config = QuantizationConfig()
        >>> plain = smoothing_error(rows, weight, torch.ones(2), config)
        >>> smoothing_error(rows, weight, torch.tensor([100.0, 1.0]), config) < plain
        True
    """
    rows, weight, factors = rows.float(), weight.float(), factors.float()
    expected = F.linear(rows, weight) if outputs is None else outputs
    weights = config.weights
    multiplied = weight * factors
    scale, zero_point = choose_qparams(
        multiplied,
        bits=weights.bits,
        symmetric=weights.symmetric,
        narrow_range=weights.narrow_range,
        granularity=weights.granularity,
    )
    qmin, qmax = weights.range
    rounded = fake_quantize(
        multiplied, scale, zero_point, qmin=qmin, qmax=qmax, granularity=weights.granularity
    )
    actual = F.linear(_quantized_rows(rows / factors, config), rounded)
    squares = expected.square().mean(-1)
    errors = (actual - expected).square().mean(-1)
    return float((errors / squares.clamp(min=_LEAST * float(squares.mean()) + _TINY)).mean())


def _quantized_rows(rows: Tensor, config: QuantizationConfig) -> Tensor:
    """The values that quantized activations have."""
    activations = config.activations
    if activations is None:
        return rows
    if isinstance(activations, Static):
        scale, zero_point = choose_qparams(
            rows, bits=activations.bits, symmetric=activations.symmetric
        )
        qmin, qmax = activations.range
        return fake_quantize(rows, scale, zero_point, qmin=qmin, qmax=qmax)
    integers, scale, zero_point = quantize_per_token(
        rows, symmetric=activations.symmetric, bits=activations.bits
    )
    return dequantize(integers, scale, zero_point, granularity=PerToken())
